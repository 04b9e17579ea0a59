"""The straight-through gradients: what passes is selected, never multiplied, so that no infinity becomes NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from .affine import affine_mask
from .broadcasting import check_broadcast, compute_dtype
from .symmetric import symmetric_mask


def symmetric_gradient(grad: Tensor, inputs: Tensor, amax: Tensor, block_size: int | None = None) -> Tensor:
    """``grad`` where ``|inputs| <= amax``, else 0; in the dtype of ``grad``. NaN inputs and NaN amax pass nothing.

    Raises:
        ValueError: ``amax`` does not broadcast to ``inputs``, or to its blocks.
    """
    return torch.where(symmetric_mask(inputs, amax, block_size), grad, 0.0)


def affine_gradient(
    grad: Tensor,
    inputs: Tensor,
    step_size: Tensor,
    zero_point: Tensor,
    lo: int,
    hi: int,
    block_size: int | None = None,
) -> Tensor:
    """``grad`` where ``(lo - zero_point) * step_size <= inputs <= (hi - zero_point) * step_size``, else 0.

    In the dtype of ``grad``; NaN inputs pass nothing.

    Raises:
        ValueError: a parameter that does not broadcast to ``inputs``, or to its blocks.
    """
    return torch.where(affine_mask(inputs, step_size, zero_point, lo, hi, block_size), grad, 0.0)


def range_gradient(grad: Tensor, inputs: Tensor, min_range: Tensor, max_range: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of clamping to a range with learned ends, both of which belong to the inside.

    Returns:
        ``grad`` where ``min_range <= inputs <= max_range``, else 0, in its own dtype; the sum of ``grad`` where
        ``inputs < min_range``; the sum where ``inputs > max_range``. Sums are computed in float64, over what each value
        of the range applies to, and have the shape and dtype of their end. NaN inputs are in none of the three.

    Raises:
        ValueError: a range that does not broadcast to ``inputs``.
    """
    x, low, high = _with_ends(inputs, min_range, "min_range", max_range, "max_range")
    inside = torch.where((x >= low) & (x <= high), grad, 0.0)
    return inside, _sum_where(x < low, grad, low, min_range), _sum_where(x > high, grad, high, max_range)


def clip_gradient(grad: Tensor, inputs: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of :func:`qdq.clip.clip`, whose ends belong to the outside.

    Returns:
        ``grad`` where ``low < inputs < high``, else 0, in its own dtype; the sum of ``grad`` where ``inputs <= low``;
        the sum where ``inputs >= high``. Sums are computed in float64 and have the shape and dtype of their end. NaN
        inputs are in none of the three.

    Raises:
        ValueError: an end that is not a single value.
    """
    if low.numel() != 1 or high.numel() != 1:
        raise ValueError(
            f"clip values can only be scalar in training, got shapes {tuple(low.shape)} and {tuple(high.shape)}"
        )
    x, lowest, highest = _with_ends(inputs, low.reshape(()), "low", high.reshape(()), "high")
    inside = torch.where((x > lowest) & (x < highest), grad, 0.0)
    return inside, _sum_where(x <= lowest, grad, lowest, low), _sum_where(x >= highest, grad, highest, high)


def _with_ends(
    inputs: Tensor, low: Tensor, low_name: str, high: Tensor, high_name: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(inputs.dtype)
    lowest = check_broadcast(inputs, low.to(dtype), low_name)
    return inputs.to(dtype), lowest, check_broadcast(inputs, high.to(dtype), high_name)


def _sum_where(mask: Tensor, grad: Tensor, fitted: Tensor, end: Tensor) -> Tensor:
    """The sum of ``grad`` where ``mask``, over the axes along which ``fitted`` broadcasts, like ``end``."""
    chosen = torch.where(mask, grad, 0.0)
    missing = chosen.dim() - fitted.dim()
    axes = [axis for axis in range(chosen.dim()) if axis < missing or fitted.shape[axis - missing] == 1]
    # An empty list of axes would reduce all of them.
    total = chosen.sum(axes, dtype=torch.float64) if axes else chosen.to(torch.float64)
    return total.to(end.dtype).reshape(end.shape)
