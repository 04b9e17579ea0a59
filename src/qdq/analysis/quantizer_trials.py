"""What is tried of a quantized model: each quantizer, with its own bits and with others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..affine_quantizer import AffineQuantizer
from ..algorithms.layer import layers_of
from ..calibration import functions_behind, histogram_of
from ..constant_quantizers import WeightQuantizer
from ..graph.names import original_name
from ..graph.ops import Kind, kind_of, module_path
from ..graph.record import Record
from ..integer_operations import IntegerOperation
from .partial_run import Values
from .quantizer_switches import Quantizer, QuantizerSwitches, activation_at, bits_of, weight_at

# What has more bits than int8 is no weight of any target.
MOST_WEIGHT_BITS = 8


@dataclasses.dataclass(frozen=True)
class Trial:
    """Quantizers that are tried together, with their own codes or with others.

    Attributes:
        name, kind, bits, patterns: as in `QuantizerSensitivity`.
        quantizers: their paths.
        replaced: those with other bits, by the paths of the quantizers that they stand for.
    """

    name: str
    kind: str
    bits: int
    patterns: tuple[str, ...]
    quantizers: frozenset[str]
    replaced: Mapping[str, Quantizer] = dataclasses.field(default_factory=dict)

    @property
    def tried(self) -> bool:
        """Whether the bits are not the model's own."""
        return bool(self.replaced)


def trials_of(
    switches: QuantizerSwitches, record: Record, kinds: Collection[str], bits: Sequence[int] = ()
) -> list[Trial]:
    """One trial per quantizer (and layer) with its own bits, in the graph's order, then one per number of other bits.

    Weights are tried with 8 bits at most, layers with their own alone.
    """
    trials = []
    for name, quantizer in switches.quantizers.items():
        kind = "weight" if isinstance(quantizer, WeightQuantizer) else "activation"
        if kind in kinds:
            patterns = _patterns(switches, name)
            trials.append(Trial(name, kind, bits_of(quantizer), patterns, frozenset([name])))
    functions = functions_behind(switches.model) if bits else {}
    others = [
        _at(switches, record, trial, number, functions.get(trial.name))
        for number in bits
        for trial in trials
        if _may(trial, number)
    ]
    if "layer" in kinds:
        trials += _layers(switches)
    return trials + others


def elements_of(trials: Sequence[Trial], switches: QuantizerSwitches, values: Values, samples: int) -> list[int]:
    """How many elements the quantizers of each trial quantize: of the weight, or of the activation per sample.

    Args:
        values: of all nodes, for so many `samples`.
    """
    sizes = {}
    for name, quantizer in switches.quantizers.items():
        calls = [node for node in switches.calls_of(name) if not node.kwargs.get("on_grid")]
        count = sum(values[node].numel() for node in calls)
        sizes[name] = round(count / samples) if isinstance(quantizer, AffineQuantizer) else count
    return [sum(sizes[name] for name in trial.quantizers) for trial in trials]


def _may(trial: Trial, bits: int) -> bool:
    return bits != trial.bits and (trial.kind == "activation" or bits <= MOST_WEIGHT_BITS)


def _at(
    switches: QuantizerSwitches,
    record: Record,
    trial: Trial,
    bits: int,
    through: Callable[[Tensor], Tensor] | None,
) -> Trial:
    quantizer = switches.quantizers[trial.name]
    other: Quantizer
    if isinstance(quantizer, WeightQuantizer):
        method = "max" if record.recipe is None else record.recipe.weight_calibration
        other = weight_at(quantizer, bits, switches.weight_of(trial.name)[1], method)
    else:
        known = record.seen
        histogram = None if known is None else histogram_of(switches.model, quantizer, known)
        other = activation_at(quantizer, bits, histogram, through)
    return dataclasses.replace(trial, bits=bits, replaced={trial.name: other})


def _layers(switches: QuantizerSwitches) -> Iterator[Trial]:
    for node, layer in layers_of(switches.model).items():
        around = {str(n.target) for n in node.args[:2] if isinstance(n, fx.Node)}
        around.intersection_update(switches.quantizers)
        if any(switches.quantizers[name] is layer.quantizer for name in around):
            yield Trial(layer.name, "layer", layer.quantizer.num_bits, (layer.name,), frozenset(around))


def _patterns(switches: QuantizerSwitches, name: str) -> tuple[str, ...]:
    """The operations that compute with the codes of a quantizer: what must be excluded for it to go."""
    if isinstance(switches.quantizers[name], WeightQuantizer):
        return (switches.weight_of(name)[0],)
    found: dict[str, None] = {}
    for call in switches.calls_of(name):
        for node in (*_writers(switches, call.args[0]), *_readers(switches, call)):
            found[_operation(switches, node)] = None
    return tuple(found)


def _writers(switches: QuantizerSwitches, node: Any) -> Iterator[fx.Node]:
    """The operation that computes a tensor, before the clips that were fused with it and factors that came later."""
    while isinstance(node, fx.Node) and (kind_of(node) is Kind.CLIP or _multiplies(switches, node)):
        node = node.args[0]
    if isinstance(node, fx.Node) and _computes(switches, node):
        yield node


def _readers(switches: QuantizerSwitches, node: fx.Node) -> Iterator[fx.Node]:
    for reader in node.users:
        if _multiplies(switches, reader):
            yield from _readers(switches, reader)
        elif _computes(switches, reader):
            yield reader
        elif kind_of(reader) in (Kind.CLIP, Kind.MOVE) or reader.op == "call_module":
            yield from _readers(switches, reader)


def _multiplies(switches: QuantizerSwitches, node: fx.Node) -> bool:
    """Whether a node is a product with factors that an algorithm put there: no operation of the model's own."""
    return node.target is torch.ops.aten.mul.Tensor and original_name(node) not in switches.captured


def _computes(switches: QuantizerSwitches, node: fx.Node) -> bool:
    """Whether a node may be an integer operation: one that a recipe can keep in float."""
    if node.op == "call_module":
        module = switches.model.get_submodule(str(node.target))
        return isinstance(module, IntegerOperation) and bool(module.output)
    return kind_of(node) not in (Kind.OTHER, Kind.CLIP, Kind.MOVE)


def _operation(switches: QuantizerSwitches, node: fx.Node) -> str:
    """A pattern for one operation: its weight, else its module where that is of PyTorch, else its node's name."""
    for source in node.all_input_nodes:
        if isinstance(switches.quantizers.get(str(source.target)), WeightQuantizer):
            return switches.weight_of(str(source.target))[0]
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if stack and str(stack[-1][1]).startswith("torch.nn.modules") and module_path(node):
        return module_path(node)
    return original_name(node)
