"""The range of each activation, chosen by what it does to the layers that read it.

No rule finds good ranges everywhere: clipping rare large values gains precision for all others in one layer and
destroys the meaning of the next. So every rule proposes a range, and the one with the least error in the outputs of the
layers that read the tensor is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .walk import LayerVisit, TensorVisit

Range = tuple[float, float]


@dataclass
class OutputRanges:
    """Chooses among proposed ranges.

    The first rule of each quantizer is the usual one. Another is taken where its error is less than `margin` times that
    of the usual one: differences below are as often chance, and a choice by chance adds up over many layers.

    Attributes:
        proposals: quantizer's name -> rule -> the range it proposes.
        chosen: quantizer's name -> the rule whose range was taken.
        batches: so many batches are compared at least, and more where they hold fewer than `values` values.
        margin: see above.
        values: a tensor of which the walk knows fewer keeps the usual range. What cuts off one value in a thousand
            seems to cost nothing where no such value is among those compared.
    """

    proposals: Mapping[str, Mapping[str, Range]]
    batches: int = 1
    margin: float = 0.6
    values: int = 8192
    chosen: dict[str, str] = field(default_factory=dict)

    def visit_layer(self, visit: LayerVisit) -> None:
        """Nothing."""

    def visit_tensor(self, visit: TensorVisit) -> None:
        """Sets the range of the quantizer, unless it is shared with other tensors."""
        proposals = self.proposals.get(visit.quantizer.name, {})
        if visit.shared or len(proposals) < 2:
            return
        given = self._compared(visit.values)
        usual = next(iter(proposals))
        if not given:
            visit.quantizer.set_range(*proposals[usual])
            self.chosen[visit.quantizer.name] = usual
            return
        errors = dict.fromkeys(proposals, 0.0)
        several = len(visit.readers) + bool(visit.others) > 1
        for layer in visit.readers:
            weight = visit.walk.original(layer.weight)
            # Errors of several readers are compared by their share of what each computes.
            total = sum(_squares(layer.run(x, weight, None)) for x in given) if several else 1.0
            for rule, (low, high) in proposals.items():
                visit.quantizer.set_range(low, high)
                # A layer is linear: what it makes of the error is the error of what it computes.
                differences = (layer.run(visit.quantizer(x).sub_(x), weight, None) for x in given)
                errors[rule] += sum(_squares(_centred(d, layer.output_axis)) for d in differences) / (total or 1.0)
        if visit.others or not visit.readers:
            total = sum(map(_squares, given)) or 1.0
            for rule, (low, high) in proposals.items():
                visit.quantizer.set_range(low, high)
                errors[rule] += sum(_squares(visit.quantizer(x).sub_(x)) for x in given) / total
        best = min(errors, key=lambda rule: errors[rule])
        if errors[best] >= self.margin * errors[usual]:
            best = usual
        visit.quantizer.set_range(*proposals[best])
        self.chosen[visit.quantizer.name] = best

    def _compared(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """The batches that are compared; none where all of them hold too few values."""
        counts = list(itertools.accumulate(x.numel() for x in values))
        enough = next((index for index, count in enumerate(counts, 1) if count >= self.values), None)
        return values[: max(self.batches, enough)] if enough is not None else ()


def _squares(x: Tensor) -> float:
    # One pass in float32: the comparison has a margin, and a copy in float64 would take most of its time.
    flat = x.float().flatten()
    return float(torch.dot(flat, flat))


def _centred(difference: Tensor, axis: int) -> Tensor:
    """An error without the mean of every channel, which the bias can take; in place."""
    others = [d for d in range(difference.dim()) if d != axis % difference.dim()]
    return difference.sub_(difference.mean(others, keepdim=True))
