"""What the algorithms that choose a weight's codes share: which codes are free, and which of two choices is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..constant_quantizers import WeightQuantizer
from ..saturation import LARGEST_PAIR
from .output_error import OutputError
from .walk import LayerVisit


def step_rows(visit: LayerVisit, error: OutputError) -> Tensor:
    """The step size of every value of `error.rows`."""
    weight = visit.weight
    return error.matrix.rows(visit.layer.quantizer.step_for(weight).expand_as(weight).float())


def code_limits(weight: Tensor, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """Least and largest code of every value of a weight: whatever is chosen between them is stored as it is.

    They leave pairs that must not saturate no sum above the limit. What a pair of one sign has to give up is divided
    evenly, as `shrink_pairs` does.
    """
    if quantizer.pairs_axis is not None:
        return _pair_limits(weight / quantizer.step_for(weight), quantizer)
    bound = torch.full_like(weight, quantizer.bound, dtype=torch.float32)
    return -bound, bound


def limit_rows(visit: LayerVisit, error: OutputError) -> tuple[Tensor, Tensor]:
    """`code_limits` of every value of `error.rows`."""
    least, most = code_limits(visit.weight, visit.layer.quantizer)
    return error.matrix.rows(least), error.matrix.rows(most)


def keep_better(visit: LayerVisit, error: OutputError, codes: Tensor) -> None:
    """Gives the layer the codes, or to output channels where these have the larger error, the codes that it has.

    Args:
        visit: of the layer.
        error: of its output.
        codes: of the shape of `error.rows`.
    """
    matrix, quantizer, weight = error.matrix, visit.layer.quantizer, visit.weight
    step = quantizer.step_for(weight)
    now = quantizer.codes(weight) * step
    new = quantizer.codes(matrix.weight(codes) * step) * step
    better = error.of(matrix.rows(new)) < error.of(matrix.rows(now))
    visit.set_weight(matrix.weight(torch.where(better[..., None], matrix.rows(new), matrix.rows(now))))


def _pair_limits(scaled: Tensor, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """Limits of the codes of a weight in units of its step sizes, of its shape."""
    assert quantizer.pairs_axis is not None
    axis, bound = quantizer.pairs_axis, quantizer.bound
    walked = scaled.movedim(axis, 0)
    if walked.dim() > 2:
        walked = walked.movedim(1, -1)
    flat = walked.reshape(walked.shape[0], -1).clamp(-bound, bound)
    width = flat.shape[1] // 2 * 2
    one, two = flat[:, 0:width:2], flat[:, 1:width:2]
    first = (LARGEST_PAIR / 2 + (one.abs() - two.abs()) / 2).round().clamp(1, LARGEST_PAIR - 1)
    alike = one * two >= 0
    limits = []
    for mine, share in ((one, first), (two, LARGEST_PAIR - first)):
        share = share.clamp(max=bound)
        # Codes of different signs may have any magnitude, so long as neither sign turns.
        low = torch.where(alike, -share, torch.where(mine > 0, -1.0, -float(bound)))
        high = torch.where(alike, share, torch.where(mine > 0, float(bound), 1.0))
        limits.append((low, high))
    least, most = torch.full_like(flat, -bound), torch.full_like(flat, bound)
    for offset, (low, high) in enumerate(limits):
        least[:, offset:width:2], most[:, offset:width:2] = low, high

    def back(rows: Tensor) -> Tensor:
        rows = rows.reshape(walked.shape)
        return (rows.movedim(-1, 1) if rows.dim() > 2 else rows).movedim(0, axis)

    return back(least), back(most)
