"""The range of each activation, chosen by what it does to the layers that read it.

No rule finds good ranges everywhere: clipping rare large values gains precision for all others in one layer and
destroys the meaning of the next. So every rule proposes a range, and the one with the least error in the outputs of the
layers that read the tensor is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .walk import LayerVisit, TensorVisit

Range = tuple[float, float]


@dataclass
class OutputRanges:
    """Chooses among proposed ranges.

    Attributes:
        proposals: quantizer's name -> rule -> the range it proposes.
        chosen: quantizer's name -> the rule whose range was taken.
        samples: so many samples are compared.
    """

    proposals: Mapping[str, Mapping[str, Range]]
    samples: int = 16
    chosen: dict[str, str] = field(default_factory=dict)

    def visit_layer(self, visit: LayerVisit) -> None:
        """Nothing."""

    def visit_tensor(self, visit: TensorVisit) -> None:
        """Sets the range of the quantizer, unless it is shared with other tensors."""
        proposals = self.proposals.get(visit.quantizer.name, {})
        if visit.shared or len(proposals) < 2:
            return
        errors = dict.fromkeys(proposals, 0.0)
        given = _first(visit.values, self.samples)
        for layer in visit.readers:
            weight, bias = visit.walk.original(layer.weight), None
            for x in given:
                expected = layer.run(x, weight, bias)
                scale = float(expected.square().sum()) or 1.0
                for rule, (low, high) in proposals.items():
                    visit.quantizer.set_range(low, high)
                    difference = layer.run(visit.quantizer(x), weight, bias) - expected
                    errors[rule] += _squares(difference, layer.output_axis) / scale
        if visit.others or not visit.readers:
            for x in given:
                scale = float(x.square().sum()) or 1.0
                for rule, (low, high) in proposals.items():
                    visit.quantizer.set_range(low, high)
                    errors[rule] += float((visit.quantizer(x) - x).square().sum()) / scale
        best = min(errors, key=lambda rule: errors[rule])
        visit.quantizer.set_range(*proposals[best])
        self.chosen[visit.quantizer.name] = best


def _first(values: list[Tensor], count: int) -> list[Tensor]:
    """The first `count` samples."""
    taken, rest = [], count
    for value in values:
        if rest <= 0:
            break
        taken.append(value[:rest] if value.dim() else value)
        rest -= value.shape[0] if value.dim() else 1
    return taken


def _squares(difference: Tensor, axis: int) -> float:
    """The squared error without the mean of every channel, which the bias can take."""
    others = [d for d in range(difference.dim()) if d != axis % difference.dim()]
    return float((difference - difference.mean(others, keepdim=True)).square().sum())
