"""The elementwise function that lies between a quantized tensor and what reads it: a SiLU, a hard swish, a sigmoid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..affine_quantizer import AffineQuantizer
from ..integer_operations import IntegerOperation

aten = torch.ops.aten

# Each value of the result is a function of the values at the same place alone.
_ELEMENTWISE = {
    *(aten.sigmoid.default, aten.hardsigmoid.default, aten.tanh.default, aten.softplus.default),
    *(aten.silu.default, aten.hardswish.default, aten.gelu.default, aten.mish.default, aten.elu.default),
    *(aten.relu.default, aten.relu6.default, aten.leaky_relu.default, aten.hardtanh.default),
    *(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default),
    *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default),
    *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.pow.Tensor_Scalar, aten.exp.default),
}


def function_behind(graph_module: fx.GraphModule, call: fx.Node) -> Callable[[Tensor], Tensor] | None:
    """What the readers of a quantized tensor read: an elementwise function of it.

    Args:
        graph_module: quantized.
        call: of the quantizer.

    Returns:
        The function, with the quantizers inside of it left out; None where anything reads the tensor as it is, or more
        than one function of it is read.
    """
    modules: dict[str, nn.Module] = dict(graph_module.named_modules())
    functions: dict[fx.Node, Callable[..., Any] | None] = {call: None}
    for node in _after(call):
        function = _function(node, modules)
        if function is not None and all(source in functions for source in node.all_input_nodes):
            functions[node] = function
    read = [node for node in functions if any(user not in functions for user in node.users)]
    inside = [node for node in functions if node is not call and functions[node] is not _same]
    if len(read) != 1 or read[0] is call or not inside:
        return None

    def run(x: Tensor) -> Tensor:
        values: dict[fx.Node, Tensor] = {call: x}
        for node, function in functions.items():
            if function is not None:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = function(*args, **kwargs)
        return values[read[0]]

    return run


def _after(call: fx.Node) -> list[fx.Node]:
    nodes = list(call.graph.nodes)
    return nodes[nodes.index(call) + 1 :]


def _function(node: fx.Node, modules: dict[str, nn.Module]) -> Callable[..., Any] | None:
    """What an elementwise node computes in float; None for any other node."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, AffineQuantizer):
        return _same
    operation: Any = module.operation if isinstance(module, IntegerOperation) else node.target
    return operation if operation in _ELEMENTWISE and node.all_input_nodes else None


def _same(x: Tensor, on_grid: bool = False) -> Tensor:
    return x
