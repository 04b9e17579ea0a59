"""Tensors that linears alone read, and a multiplication per channel put before their quantizer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..affine_quantizer import AffineQuantizer
from ..graph.names import ORIGINAL_NAME, free_name
from ..integer_operations import IntegerOperation
from .layer import Layer, layers_of

aten = torch.ops.aten


@dataclass(frozen=True)
class ScalableInput:
    """A quantized tensor whose channels may be multiplied on their way to its quantizer.

    Attributes:
        quantizer_call: the node that quantizes it.
        readers: the linears that read it, in the order of the graph.
    """

    quantizer_call: fx.Node
    readers: tuple[Layer, ...]


def scalable_inputs(graph_module: fx.GraphModule) -> list[ScalableInput]:
    """The tensors that an operation in float computes and that linears alone read once quantized.

    What comes out of an operation in integers stays in integers, and a range that the user has set speaks of the
    values as they are: such tensors are left out.
    """
    modules = dict(graph_module.named_modules())
    layers = layers_of(graph_module)
    nodes = [n for n in graph_module.graph.nodes if n.op == "call_module"]
    calls = Counter(str(n.target) for n in nodes)
    found = []
    for node in nodes:
        quantizer = modules[str(node.target)]
        if not isinstance(quantizer, AffineQuantizer) or quantizer.fixed or calls[str(node.target)] > 1:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        quantized = source.op == "call_module" and isinstance(
            modules[str(source.target)], (AffineQuantizer, IntegerOperation)
        )
        readers = [layers.get(user) for user in node.users]
        linears = tuple(r for r in readers if r is not None and r.operation is aten.linear.default)
        others = len(linears) < len(readers) or any(node in user.args[1:] for user in node.users)
        if linears and not others and not quantized and source.op != "placeholder":
            found.append(ScalableInput(node, linears))
    return found


def multiply(graph_module: fx.GraphModule, given: ScalableInput, factors: Tensor) -> None:
    """Multiplies the channels (the last dimension) of a tensor before it is quantized, in place.

    Args:
        graph_module: quantized.
        given: the tensor.
        factors: [channels].
    """
    call = given.quantizer_call
    source = call.args[0]
    assert isinstance(source, fx.Node)
    path = free_name(f"{call.target}_factors".replace(".", "_"), lambda name: hasattr(graph_module, name))
    graph_module.register_buffer(path, factors.detach().clone())
    with graph_module.graph.inserting_before(call):
        constant = graph_module.graph.get_attr(path)
        product = graph_module.graph.call_function(aten.mul.Tensor, (source, constant))
    product.meta = {k: v for k, v in source.meta.items() if k in ("val", "nn_module_stack")}
    # No tensor of the captured graph has this name: what is known of one does not hold for the product.
    product.meta[ORIGINAL_NAME] = path
    call.update_arg(0, product)
    graph_module.recompile()
