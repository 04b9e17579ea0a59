"""Weight clipping: smaller step sizes cut off the largest weights, where the layer's output gains by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .algorithm import Algorithm
from .option_checks import check_integer, check_real
from .output_error import OutputError
from .walk import LayerVisit


@dataclass(frozen=True)
class WeightClipping(Algorithm):
    """Searches the step sizes of every layer's weight for the least squared error of its output.

    The search over amax is that of OMSE (Choukroun et al., "Low-bit Quantization of Neural Networks for Efficient
    Inference", 2019, arXiv:1902.06822), but the error is that of the layer's output given the quantized model's input,
    layer after layer, as in AIMET's sequential MSE. Candidates are the step size of the largest magnitude times factors
    from 1 down to `least`. An output channel's error depends on its own step sizes alone, so all channels are searched
    at once; blocks of one channel one after the other. No channel's error on the samples becomes larger.

    Attributes:
        candidates: count of the factors.
        least: the smallest factor.
        positions: so many positions of a layer's output are looked at, drawn where there are more.
        seed: of the draw.
    """

    name: ClassVar[str] = "weight_clipping"
    citation: ClassVar[str] = "Choukroun et al. 2019, arXiv:1902.06822"

    candidates: int = 20
    least: float = 0.4
    positions: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("candidates", self.candidates, least=2)
        check_real("least", self.least, above=0.0, below=1.0)
        check_integer("positions", self.positions, least=1)
        check_integer("seed", self.seed, least=0)

    def visit_layer(self, visit: LayerVisit) -> None:
        """Sets the step sizes; the weight stays."""
        error = OutputError(visit, self.positions, self.seed)
        if not error.constant.numel() or not error.count:
            return
        visit.forget_outputs()
        quantizer, input_step = visit.layer.quantizer, visit.input_step
        step = quantizer.step_size
        present = step.clone()
        quantizer.fit(visit.weight, "max")
        largest = step.clone()
        step.copy_(present)
        blocks = 0 if quantizer.block_size is None else step.shape[1]
        for where in [(slice(None), block) for block in range(blocks)] or [...]:
            best, least = present[where], self._errors(visit, error)
            for index in range(self.candidates):
                step[where] = largest[where] * (1 - (1 - self.least) * index / (self.candidates - 1))
                if input_step is not None and visit.bias is not None:
                    quantizer.fit_bias(visit.bias, input_step)
                found = self._errors(visit, error)
                better = found < least
                best, least = torch.where(better, step[where], best), torch.where(better, found, least)
            step[where] = best

    def _errors(self, visit: LayerVisit, error: OutputError) -> Tensor:
        """One error for every channel that has step sizes of its own; 0-d where the weight has one."""
        quantizer = visit.layer.quantizer
        weight = visit.weight
        stored = quantizer.codes(weight) * quantizer.step_for(weight)
        errors = error.of(error.matrix.rows(stored)).double()
        if quantizer.axis is None:
            return errors.sum()
        # The groups of a transposed convolution share the step sizes of their output channels.
        return errors.sum(0) if error.matrix.transposed else errors.flatten()
