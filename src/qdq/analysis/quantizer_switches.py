"""The quantizers of a graph, switched on and off one by one on a copy that shares the model's parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from ..affine_quantizer import AffineQuantizer
from ..calib.collectors import HistogramCollector
from ..constant_quantizers import BiasQuantizer, WeightQuantizer
from ..fingerprint import fingerprint_of
from ..graph.parameters import tensor_at
from ..graph.record import KEY, record_of
from ..integer_operations import IntegerOperation
from ..quiet import pytorch_internals

Quantizer = AffineQuantizer | WeightQuantizer


class QuantizerSwitches:
    """A copy of a quantized model, with a switch for each of its quantizers of activations and weights.

    The integer bias of an operation is on where the quantizers of its input and of its weight are. Quantizers that are
    off in the model have no switch. Where an algorithm chose the codes of a weight, the weight with its quantizer off,
    or another in its place, is that from before the choice, as long as nobody else has written to it.

    Attributes:
        model: the copy. Its parameters are those of the model, which nothing here writes to.
        quantizers: by their paths, in the order in which the graph calls them.
        captured: names of the tensors of the captured graph, which patterns of recipes speak of.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.model = _copy(graph_module)
        explanation = record_of(graph_module).explanation
        self.captured = frozenset(entry.tensor for entry in explanation or ())
        self._modules = dict(self.model.named_modules())
        self._names: dict[nn.Module, str] = {module: name for name, module in self._modules.items()}
        self.calls = [n for n in self.model.graph.nodes if n.op == "call_module"]
        called = {str(n.target): self._modules[str(n.target)] for n in self.calls}
        self.quantizers: dict[str, Quantizer] = {
            name: m for name, m in called.items() if isinstance(m, (AffineQuantizer, WeightQuantizer)) and m.enabled
        }
        self._biases: dict[str, tuple[str, ...]] = {}
        for node in self.calls:
            module = self._modules[str(node.target)]
            if isinstance(module, BiasQuantizer) and module.enabled:
                steps = [str(a.target) for a in node.args[1:] if isinstance(a, fx.Node)]
                self._biases[str(node.target)] = tuple(step.rpartition(".")[0] for step in steps)
        self._unrounded: dict[str, Tensor] = {}
        known = record_of(graph_module).unrounded
        for name, quantizer in self.quantizers.items():
            if isinstance(quantizer, WeightQuantizer):
                path, weight = self._stored(name)
                if path in known and known[path].chosen == fingerprint_of(weight):
                    self._unrounded[name] = known[path].weight.to(weight.device)
        self._replaced: dict[str, Quantizer | _InPlaceOf] = {}

    def set(self, on: Collection[str], replaced: Mapping[str, Quantizer] | None = None) -> None:
        """Switches the quantizers `on` on and all others off.

        Args:
            on: their paths.
            replaced: others to run in the place of quantizers that are off. The operations around them compute in
                float, as around one that is off.
        """
        for name, quantizer in self.quantizers.items():
            quantizer.enabled = name in on
        for name in self._biases:
            module = self._modules[name]
            assert isinstance(module, BiasQuantizer)
            module.enabled = self._active(name, on)
        for name in list(self._replaced):
            self._put(name, self._modules[name])
        self._replaced = dict(replaced or {})
        for name, weight in self._unrounded.items():
            if name not in on:
                self._replaced[name] = _InPlaceOf(weight, self._replaced.get(name, self.quantizers[name]))
        for name, module in self._replaced.items():
            self._put(name, module)

    def changed(self, before: Collection[str], after: Collection[str], replaced: Collection[str] = ()) -> set[fx.Node]:
        """The nodes that compute something else when those of `after` are on than when those of `before` are."""
        return {
            node
            for node in self.calls
            if not node.kwargs.get("on_grid")
            and (node.target in replaced or self._differs(str(node.target), before, after))
        }

    def calls_of(self, name: str) -> Iterator[fx.Node]:
        """The nodes that call a quantizer."""
        return (node for node in self.calls if node.target == name)

    def weight_of(self, name: str) -> tuple[str, Tensor]:
        """Path and value of the weight that a quantizer quantizes, before codes were chosen for it."""
        path, weight = self._stored(name)
        return path, self._unrounded.get(name, weight)

    def _stored(self, name: str) -> tuple[str, Tensor]:
        source = next(self.calls_of(name)).args[0]
        assert isinstance(source, fx.Node)
        path = str(source.target)
        return path, tensor_at(self.model, path)

    def _differs(self, name: str, before: Collection[str], after: Collection[str]) -> bool:
        return self._active(name, before) != self._active(name, after)

    def _active(self, name: str, on: Collection[str]) -> bool:
        module = self._modules[name]
        if isinstance(module, IntegerOperation):
            around = (*module.inputs, *module.output, *module.constants)
            return all(self._active(self._names[m], on) for m in around)
        if isinstance(module, BiasQuantizer):
            return name in self._biases and all(q in on for q in self._biases[name])
        return name in on

    def _put(self, name: str, module: nn.Module) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(owner), leaf, module)


class _InPlaceOf(nn.Module):
    """Gives what a quantizer makes of a weight, in place of the one that it is called with."""

    def __init__(self, weight: Tensor, quantizer: nn.Module) -> None:
        super().__init__()
        self.weight, self.quantizer = weight, quantizer
        self.step_size = quantizer.step_size  # biases read it

    def forward(self, _weight: Tensor) -> Tensor:
        return self.quantizer(self.weight)


def bits_of(quantizer: Quantizer) -> int:
    """The bits of a quantizer's codes."""
    return quantizer.num_bits


def activation_at(
    quantizer: AffineQuantizer,
    bits: int,
    histogram: HistogramCollector | None,
    through: Callable[[Tensor], Tensor] | None = None,
) -> AffineQuantizer:
    """The quantizer with codes of other bits, its range found anew from what calibration saw.

    Without a histogram, or where a recipe gives the range, the range stays and the step size alone changes. `through`
    is the elementwise function that alone reads the tensor, where there is one.
    """
    other = copy.deepcopy(quantizer)
    if quantizer.lo < 0:
        other.hi = 2 ** (bits - 1) - 1
        other.lo = -other.hi if quantizer.lo == -quantizer.hi else -other.hi - 1
    else:
        other.lo, other.hi = 0, 2**bits - 1
    if histogram is not None and histogram.total and not quantizer.fixed:
        other.find_range(histogram, through=through)
    else:
        step, zero = float(quantizer.step_size), int(quantizer.zero_point)
        least = max(quantizer.lo, -quantizer.hi) if quantizer.symmetric else quantizer.lo
        other.set_range((least - zero) * step, (quantizer.hi - zero) * step)
    return other


def weight_at(quantizer: WeightQuantizer, bits: int, weight: Tensor, method: str) -> WeightQuantizer:
    """The quantizer with codes of other bits, its step sizes found anew by a method of `Recipe.weight_calibration`."""
    other = copy.deepcopy(quantizer)
    other.num_bits = bits
    if bits < 8:
        other.pairs_axis = None  # sums of products of two codes fit 16 bits by themselves
    other.fit(weight, method)
    return other


def _copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    tensors = [*graph_module.parameters(), *graph_module.buffers()]
    shared: dict[int, Any] = {id(t): t for t in tensors}
    record = graph_module.meta[KEY]
    shared[id(record)] = record
    with pytorch_internals():
        return copy.deepcopy(graph_module, shared)
