"""Parts of a graph computed by themselves: as the quantized model computes them, or as the float model does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

from torch import Tensor, fx

from ..affine_quantizer import AffineQuantizer
from ..constant_quantizers import WeightQuantizer
from .float_values import operation_of
from .walk import Walk

Values = MutableMapping[fx.Node, Any]


def run_quantized(
    walk: Walk, nodes: Collection[fx.Node], values: Values, others: Mapping[str, Tensor] | None = None
) -> None:
    """Computes nodes with their quantizers, in their order.

    Args:
        walk: the two models.
        nodes: what is computed.
        values: of one batch; holds what the nodes read, and takes what they give.
        others: paths of parameters -> tensors in their place, a weight as it is after quantization.
    """
    others = others or {}

    def constant(node: fx.Node) -> Any:
        path = str(node.target)
        if node.op == "get_attr":
            return others[path] if path in others else walk.parameter(path)
        module = walk.graph_module.get_submodule(path)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if isinstance(module, WeightQuantizer) and str(source.target) in others:
            return others[str(source.target)]
        return module(*(constant(n) for n in node.all_input_nodes))

    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else constant(n))
        if node.op == "call_module":
            values[node] = walk.graph_module.get_submodule(str(node.target))(*args, **kwargs)
        else:
            values[node] = _called(node.op, node.target, args, kwargs)


def run_in_float(walk: Walk, nodes: Collection[fx.Node], values: Values) -> None:
    """Computes nodes as the float model does: see `run_quantized`."""

    def constant(node: fx.Node) -> Any:
        if node.op == "get_attr":
            return walk.original(str(node.target))
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return constant(source)

    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else constant(n))
        operation = operation_of(walk.graph_module, node)
        if isinstance(operation, AffineQuantizer):
            values[node] = args[0]
        else:
            values[node] = _called(node.op, operation, args, kwargs)


def _called(op: str, target: Any, args: Any, kwargs: Any) -> Any:
    return getattr(args[0], target)(*args[1:], **kwargs) if op == "call_method" else target(*args, **kwargs)
