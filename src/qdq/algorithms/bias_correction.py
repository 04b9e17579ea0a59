"""Bias correction: what quantization shifts the mean of a layer's output by is taken off its bias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..affine_quantizer import AffineQuantizer
from ..graph.ops import Kind, clip_bounds, kind_of
from .algorithm import FEW_SAMPLES, Algorithm
from .walk import LayerVisit


@dataclass(frozen=True)
class BiasCorrection(Algorithm):
    """Corrects the bias of every layer that has one.

    The empirical form of Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization
    and Bias Correction" (ICCV 2019), section 4.2: the shift is measured layer by layer, with all layers before it
    quantized and corrected.

    The shift is the mean over the positions whose float value passes the ReLU or other clip behind the layer, if there
    is one, and lies within the range of the quantizer behind that: what happens where all is cut off anyway must not
    decide the bias of the rest. (In a network of ReLUs half of all positions are cut, and the errors of both halves
    differ.)

    A mean over few samples is uncertain. The correction is the shift times 1 - v / shift**2 (0 where that is negative),
    where v is the variance of the mean as the samples show it: what chance may have made is not corrected.

    Linears with several positions per sample (the tokens of a transformer) are left alone: what follows normalises
    every position by itself, and a few tokens of very large values, with errors as large, would decide the correction
    of all.
    """

    name: ClassVar[str] = "bias_correction"
    citation: ClassVar[str] = "Nagel et al. 2019, arXiv:1906.04721"

    @property
    def walk_samples(self) -> int:
        """Means of twice as many are no better: SQNR of trained MobileNets and ResNets differs by chance alone."""
        return FEW_SAMPLES

    def visit_layer(self, visit: LayerVisit) -> None:
        """Corrects the layer's bias."""
        axis = visit.layer.output_axis
        if visit.bias is None or (axis == -1 and visit.float_outputs[0].dim() > 2):
            return
        bounds = _kept_range(visit)
        pairs = zip(visit.float_outputs, visit.outputs, strict=True)
        parts = [_sums(wanted, given, axis, bounds) for wanted, given in pairs]
        sums, counts = (torch.cat(part) for part in zip(*parts, strict=True))
        count, samples = counts.sum(0).clamp(min=1), len(sums)
        mean = sums.sum(0) / count
        if samples > 1:
            # That of a ratio of two sums over samples: positions of one sample are not independent.
            squares = (sums - mean * counts).square().sum(0)
            variance = squares / count.square() * (samples / (samples - 1))
            mean = mean * (1 - variance / mean.square().clamp(min=torch.finfo(mean.dtype).tiny)).clamp(min=0)
        visit.set_bias(visit.bias + mean)


def _kept_range(visit: LayerVisit) -> tuple[float, float]:
    """Between what bounds values of a layer pass the clip and the quantizer behind it; infinite ones without."""
    low, high = -math.inf, math.inf
    users = list(visit.node.users)
    if len(users) == 1 and kind_of(users[0]) is Kind.CLIP:
        low, high = clip_bounds(users[0])
        users = list(users[0].users)
    if len(users) == 1 and users[0].op == "call_module":
        quantizer = visit.walk.graph_module.get_submodule(str(users[0].target))
        if isinstance(quantizer, AffineQuantizer) and quantizer.enabled and quantizer.calibrated:
            least, most = quantizer.range
            low, high = max(low, least), min(high, most)
    return low, high


def _sums(wanted: Tensor, given: Tensor, axis: int, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Sum and count of `wanted - given` where `wanted` lies within the bounds, float64: (samples, channels) each."""
    difference = wanted - given
    if bounds == (-math.inf, math.inf):
        kept = torch.ones((), device=wanted.device).expand_as(difference)
    else:
        # Of numbers, as a product with booleans and a sum of them take several times as long.
        kept = ((wanted > bounds[0]) & (wanted < bounds[1])).to(difference.dtype)
        difference *= kept
    if difference.dim() == -axis:  # a single sample, without a dimension for it
        difference, kept = difference[None], kept[None]
    if axis == -1:
        return difference.double(), kept.double()
    return difference.flatten(2).sum(2).double(), kept.flatten(2).sum(2).double()
