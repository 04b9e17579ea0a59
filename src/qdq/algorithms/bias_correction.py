"""Bias correction: what quantization shifts the mean of a layer's output by is taken off its bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .algorithm import Algorithm
from .walk import LayerVisit


@dataclass(frozen=True)
class BiasCorrection(Algorithm):
    """Corrects the bias of every layer that has one.

    The empirical form of Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization
    and Bias Correction" (ICCV 2019), section 4.2: the shift is measured layer by layer, with all layers before it
    quantized and corrected.

    A mean over few samples is uncertain. The correction is the shift times 1 - v / shift**2 (0 where that is negative),
    where v is the variance of the mean as the samples show it: what chance may have made is not corrected.

    Linears with several positions per sample (the tokens of a transformer) are left alone: what follows normalises
    every position by itself, and a few tokens of very large values, with errors as large, would decide the correction
    of all.
    """

    name: ClassVar[str] = "bias_correction"
    citation: ClassVar[str] = "Nagel et al. 2019, arXiv:1906.04721"
    # Means of twice as many are no better: SQNR of trained MobileNets and ResNets differs by chance (0.3 dB) alone.
    walk_samples: ClassVar[int] = 64

    def visit_layer(self, visit: LayerVisit) -> None:
        """Corrects the layer's bias."""
        axis = visit.layer.output_axis
        if visit.bias is None or (axis == -1 and visit.float_outputs[0].dim() > 2):
            return
        # One mean per sample and channel: positions of one image are not independent.
        shifts = torch.cat(
            [_shifts(wanted, given, axis) for wanted, given in zip(visit.float_outputs, visit.outputs, strict=True)]
        )
        mean = shifts.mean(0)
        if shifts.shape[0] > 1:
            variance = shifts.var(0) / shifts.shape[0]
            mean = mean * (1 - variance / mean.square().clamp(min=torch.finfo(mean.dtype).tiny)).clamp(min=0)
        visit.set_bias(visit.bias + mean)


def _shifts(wanted: Tensor, given: Tensor, axis: int) -> Tensor:
    """The mean of `wanted - given` over positions, float64: (samples, channels)."""
    difference = wanted - given
    if difference.dim() == -axis:  # a single sample, without a dimension for it
        difference = difference[None]
    return difference.double() if axis == -1 else difference.flatten(2).mean(2, dtype=torch.float64)
