"""A walk through a quantized graph, node by node, with the float model beside it.

Every node is computed for all samples before the next one: for the quantized model, as far as it is settled, and for
the float model. Who visits an operation sees its inputs as all operations before it have left them, next to what they
ought to be. So each operation is settled knowing the errors of those before it, at the cost of one pass of each model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from ..affine_quantizer import AffineQuantizer
from ..constant_quantizers import BiasQuantizer, WeightQuantizer
from ..graph.parameters import tensor_at
from ..integer_operations import BlockRounding, IntegerOperation
from ..progress import track
from .layer import Layer, layers_of

Values = list[Any]


class LayerVisit:
    """What is known where the walk reaches a layer.

    All tensors have the dtype of the model, float32, and its device. Inputs are [batch, channels, ...] of convolutions
    and [..., channels] of linears, outputs alike; weights and biases have the shapes of the model's parameters.

    Attributes:
        layer: the layer.
        node: that computes it.
        inputs: what the quantized model gives it, one tensor per batch.
        float_inputs: what the float model gives it, of the same shapes.
    """

    def __init__(self, walk: Walk, layer: Layer, node: fx.Node, inputs: Values, float_inputs: Values) -> None:
        self.walk, self.layer, self.node, self.inputs, self.float_inputs = walk, layer, node, inputs, float_inputs
        self._float_outputs: Values | None = None
        self._outputs: Values | None = None
        self._bias_of_outputs: Tensor | None = None

    @property
    def float_outputs(self) -> Values:
        """What the layer gives in the float model, one tensor per batch; `layer.output_axis` holds the channels."""
        if self._float_outputs is None:
            weight, bias = self.float_weight, self.float_bias
            self._float_outputs = [self.layer.run(x, weight, bias) for x in self.float_inputs]
        return self._float_outputs

    @property
    def float_weight(self) -> Tensor:
        """The weight of the float model."""
        return self.walk.original(self.layer.weight)

    @property
    def float_bias(self) -> Tensor | None:
        """The bias of the float model."""
        return None if self.layer.bias is None else self.walk.original(self.layer.bias)

    @property
    def weight(self) -> Tensor:
        """The weight of the quantized model, before it is quantized."""
        return self.walk.parameter(self.layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the quantized model, before it is quantized."""
        return None if self.layer.bias is None else self.walk.parameter(self.layer.bias)

    @property
    def outputs(self) -> Values:
        """What the layer gives in the quantized model, one tensor per batch, before its output is quantized.

        With the weight as it is; a bias that is set later is not in them.
        """
        if self._outputs is None:
            weight, self._bias_of_outputs = self.layer.quantizer(self.weight), self.bias
            self._outputs = [self.layer.run(x, weight, self._bias_of_outputs) for x in self.inputs]
        return self._outputs

    @property
    def input_step(self) -> Tensor | None:
        """The step size (0-d) of the layer's input where its bias is stored as integers, whose step size it is part of.

        None where the layer has no such bias.
        """
        bias = self.node.args[2] if len(self.node.args) > 2 else None
        if not isinstance(bias, fx.Node) or bias.op != "call_module":
            return None
        input_step = bias.args[1]
        assert isinstance(input_step, fx.Node)
        return self.walk.parameter(str(input_step.target))

    def final_outputs(self, bias: Tensor | None) -> Values | None:
        """What the layer gives with its last weight and this bias, if that is known; it takes the outputs' memory."""
        if self._outputs is None:
            return None
        if bias is not None and self._bias_of_outputs is not None:
            shift = (bias - self._bias_of_outputs).reshape(-1, *[1] * (-1 - self.layer.output_axis))
            for output in self._outputs:
                output += shift
        return self._outputs

    def set_weight(self, weight: Tensor) -> None:
        """Replaces the weight of the quantized model by one of its size."""
        self.forget_outputs()
        self.walk.replace(self.layer.weight, weight)

    def forget_outputs(self) -> None:
        """To be called by who changes the weight's step sizes."""
        self._outputs = None

    def set_bias(self, bias: Tensor) -> None:
        """Replaces the bias of the quantized model, which must have one, by another of its size."""
        assert self.layer.bias is not None
        self.walk.replace(self.layer.bias, bias)


class TensorVisit:
    """What is known where the walk reaches an activation quantizer.

    Attributes:
        quantizer: the quantizer.
        values: the tensor in the quantized model, before it is quantized, one per batch: float32, of any shape.
        float_values: the tensor in the float model, of the same shapes.
        readers: the layers that read the quantized tensor.
        others: how many other operations read it.
        shared: whether the quantizer has other tensors to quantize as well.
    """

    def __init__(
        self,
        walk: Walk,
        quantizer: AffineQuantizer,
        values: Values,
        float_values: Values,
        readers: Sequence[Layer],
        others: int,
        shared: bool,
    ) -> None:
        self.walk, self.quantizer, self.values, self.float_values = walk, quantizer, values, float_values
        self.readers, self.others, self.shared = readers, others, shared


class Visitor(Protocol):
    """Who settles operations on the way."""

    def visit_tensor(self, visit: TensorVisit) -> None:
        """Called for every call of an activation quantizer that quantizes, before it does."""

    def visit_layer(self, visit: LayerVisit) -> None:
        """Called for every layer, before its output is computed."""


class Walk:
    """The two models and what is known of them so far.

    Args:
        graph_module: calibrated. The parameters that visitors replace are replaced in it.
        batches: per batch the values of the graph's placeholders, in their order.
    """

    def __init__(self, graph_module: fx.GraphModule, batches: Sequence[Sequence[Any]]) -> None:
        self.graph_module, self.batches = graph_module, batches
        self._modules: dict[str, nn.Module] = dict(graph_module.named_modules())
        self._originals: dict[str, Tensor] = {}
        self._layers = layers_of(graph_module)
        # How many tensors each activation quantizer quantizes.
        self._uses = Counter(
            str(n.target) for n in graph_module.graph.nodes if n.op == "call_module" and not n.kwargs.get("on_grid")
        )

    @torch.no_grad()
    def run(self, visitors: Sequence[Visitor], progress: bool = True, label: str = "improving") -> None:
        """Goes through the graph once."""
        nodes = list(self.graph_module.graph.nodes)
        last = _last_uses(nodes)
        values: dict[fx.Node, tuple[Values, Values]] = {}
        placeholders = 0
        for index, node in enumerate(track(nodes, label, len(nodes), progress)):
            if node.op == "placeholder":
                given = [batch[placeholders] for batch in self.batches]
                values[node] = given, given
                placeholders += 1
            elif node.op == "output":
                break
            elif not self._is_constant(node):
                values[node] = self._computed(node, values, visitors)
            for dead in last.get(index, ()):
                values.pop(dead, None)

    def parameter(self, path: str) -> Tensor:
        """A parameter or buffer of the quantized model."""
        return tensor_at(self.graph_module, path)

    def original(self, path: str) -> Tensor:
        """The same in the float model."""
        return self._originals[path] if path in self._originals else self.parameter(path)

    def replace(self, path: str, value: Tensor) -> None:
        """Gives the quantized model another parameter; the float model keeps its own."""
        old = self.parameter(path)
        self._originals.setdefault(path, old)
        owner, _, leaf = path.rpartition(".")
        module = self.graph_module.get_submodule(owner)
        value = value.detach().to(old.dtype).reshape(old.shape)
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(value, requires_grad=module._parameters[leaf].requires_grad))  # type: ignore[union-attr]
        else:
            setattr(module, leaf, value)

    @property
    def replaced(self) -> list[str]:
        """Paths of the parameters that were replaced."""
        return list(self._originals)

    def _is_constant(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._modules[str(node.target)], (WeightQuantizer, BiasQuantizer))
        return node.op == "get_attr"

    def _constant(self, node: fx.Node, quantized: bool) -> Any:
        """Read when it is used, as visitors may have changed it."""
        if node.op == "get_attr":
            return self.parameter(str(node.target)) if quantized else self.original(str(node.target))
        if not quantized:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return self._constant(source, quantized=False)
        arguments = [self._constant(a, quantized=True) for a in node.args if isinstance(a, fx.Node)]
        return self._modules[str(node.target)](*arguments)

    def _computed(
        self, node: fx.Node, values: dict[fx.Node, tuple[Values, Values]], visitors: Sequence[Visitor]
    ) -> tuple[Values, Values]:
        module = self._modules[str(node.target)] if node.op == "call_module" else None
        if isinstance(module, AffineQuantizer):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            quantized, in_float = values[source]
            if not node.kwargs.get("on_grid"):
                self._visit_tensor(node, module, quantized, in_float, visitors)
            return [module(x, **node.kwargs) for x in quantized], in_float
        layer = self._layers.get(node)
        known: list[Values | None] = [None, None]
        if layer is not None:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            visit = LayerVisit(self, layer, node, *values[source])
            for visitor in visitors:
                visitor.visit_layer(visit)
            bias = node.args[2] if len(node.args) > 2 else None
            known_bias = self._constant(bias, quantized=True) if isinstance(bias, fx.Node) else None
            known = [visit.final_outputs(known_bias), visit.float_outputs]
        operation: Any = module.operation if isinstance(module, IntegerOperation) else module or node.target
        # What rounds its input does so in the quantized model alone; all else has quantizers of its own behind it.
        functions = module if isinstance(module, BlockRounding) else operation, operation
        constants = {
            quantized: {n: self._constant(n, quantized) for n in node.all_input_nodes if self._is_constant(n)}
            for quantized in (True, False)
        }
        results: list[Values] = []
        for track_index, quantized in enumerate((True, False)):
            computed = known[track_index]
            if computed is not None:
                results.append(computed)
                continue
            outputs = []
            for i in range(len(self.batches)):

                def value(n: fx.Node, i: int = i, t: int = track_index, q: bool = quantized) -> Any:
                    return constants[q][n] if n in constants[q] else values[n][t][i]

                given: Any = fx.map_arg((node.args, node.kwargs), value)
                args, kwargs = given
                if node.op == "call_method":
                    outputs.append(getattr(args[0], str(node.target))(*args[1:], **kwargs))
                else:
                    outputs.append(functions[track_index](*args, **kwargs))
            results.append(outputs)
        return results[0], results[1]

    def _visit_tensor(
        self,
        node: fx.Node,
        quantizer: AffineQuantizer,
        quantized: Values,
        in_float: Values,
        visitors: Sequence[Visitor],
    ) -> None:
        layers = [self._layers[user] for user in node.users if user in self._layers]
        others, shared = len(node.users) - len(layers), self._uses[str(node.target)] > 1
        visit = TensorVisit(self, quantizer, quantized, in_float, layers, others, shared)
        for visitor in visitors:
            visitor.visit_tensor(visit)


def _last_uses(nodes: Sequence[fx.Node]) -> dict[int, list[fx.Node]]:
    """Index of a node -> the nodes that nothing needs after it."""
    order = {node: i for i, node in enumerate(nodes)}
    last: dict[int, list[fx.Node]] = {}
    for node in nodes:
        end = max((order[user] for user in node.users), default=order[node])
        last.setdefault(end, []).append(node)
    return last
