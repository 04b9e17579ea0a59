"""`Layer`: an operation with a weight, as the algorithms that improve a quantized model see it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from ..constant_quantizers import BiasQuantizer, WeightQuantizer
from ..graph.ops import Kind, kind_of
from ..integer_operations import IntegerConvolution


@dataclass(frozen=True)
class Layer:
    """A convolution, transposed convolution or linear whose weight is quantized.

    Attributes:
        name: path of the weight in the model.
        operation: takes input, weight, bias and `rest`.
        weight, bias: paths of the parameters; `bias` is None where there is none.
        quantizer: of the weight.
        axis: of the weight, its output channels.
        output_axis: of the result, the same channels; counted from the end.
        rest, keywords: further arguments of `operation`.
    """

    name: str
    operation: Callable[..., Tensor]
    weight: str
    bias: str | None
    quantizer: WeightQuantizer
    axis: int
    output_axis: int
    rest: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The operation's result."""
        return self.operation(x, weight, bias, *self.rest, **self.keywords)


def layers_of(graph_module: fx.GraphModule) -> dict[fx.Node, Layer]:
    """The layers of a quantized graph, by the nodes that compute them, in their order.

    A weight that several operations read belongs to none of them alone, and such operations are no layers; nor are
    those whose weight quantizer is `fixed`.
    """
    modules, reads = dict(graph_module.named_modules()), _reads(graph_module.graph)
    found = {node: _layer_of(node, modules, reads) for node in graph_module.graph.nodes}
    return {node: layer for node, layer in found.items() if layer is not None}


def _reads(graph: fx.Graph) -> Counter[str]:
    """How many operations read each parameter, be it in float."""
    return Counter(str(node.target) for node in graph.nodes if node.op == "get_attr" for _ in node.users)


def _layer_of(node: fx.Node, modules: Mapping[str, nn.Module], reads: Mapping[str, int]) -> Layer | None:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if node.op == "call_function":
        if kind_of(node) not in (Kind.CONVOLUTION, Kind.TRANSPOSED_CONVOLUTION, Kind.LINEAR):
            return None
        operation: Any = node.target
    elif isinstance(module, IntegerConvolution):
        operation = module.operation
    else:
        return None
    if len(node.args) < 2:
        return None
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "call_module" or len(weight.users) != 1:
        return None
    quantizer = modules.get(str(weight.target))
    if not isinstance(quantizer, WeightQuantizer) or quantizer.fixed:
        return None
    bias = node.args[2] if len(node.args) > 2 else None
    if isinstance(bias, fx.Node) and bias.op == "call_module":
        assert isinstance(modules[str(bias.target)], BiasQuantizer)
        bias = bias.args[0]
    if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr" and reads[str(bias.target)] == 1):
        return None
    source = weight.args[0]
    assert isinstance(source, fx.Node)
    if reads[str(source.target)] != 1:
        return None
    spatial = re.search(r"conv(?:_transpose)?(\d)d", str(operation))
    return Layer(
        name=str(source.target),
        operation=operation,
        weight=str(source.target),
        bias=None if bias is None else str(bias.target),
        quantizer=quantizer,
        axis=1 if "conv_transpose" in str(operation) else 0,
        output_axis=-1 - int(spatial[1]) if spatial else -1,
        rest=tuple(node.args[3:]),
        keywords=dict(node.kwargs),
    )
