"""Absolute maxima and ranges of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def absmax(x: Tensor, axis: int | None = None) -> Tensor:
    """The largest absolute value of ``x``, or of each slice along ``axis``.

    Args:
        x: floating point, any shape.
        axis: the axis that keeps its own maxima; negative counts from the end; None for one of the whole tensor.

    Returns:
        A 0-d tensor, or a 1-d one of ``x.shape[axis]`` elements, in the dtype of ``x``; 0 where nothing is reduced.
        NaN where any value is NaN.

    Raises:
        ValueError: ``axis`` is out of range.
    """
    shape, axes = _reduction(x, axis)
    if _is_empty(x, axes):
        return x.new_zeros(shape)
    low, high = _extrema(x, axis, axes)
    return torch.maximum(low.abs(), high.abs())


def minmax(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of ``x``, or of each slice along ``axis``, as :func:`absmax` takes them.

    The sign of a zero among them is not defined.

    Returns:
        Two tensors of the shape and dtype of :func:`absmax`. Both are NaN where any value is NaN.

    Raises:
        ValueError: nothing to reduce, as no values have no smallest; ``axis`` is out of range.
    """
    _, axes = _reduction(x, axis)
    if _is_empty(x, axes):
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no smallest and largest value (axis={axis})")
    return _extrema(x, axis, axes)


def _reduction(x: Tensor, axis: int | None) -> tuple[tuple[int, ...], list[int]]:
    """The shape of the result, and the axes to be reduced."""
    if axis is None:
        return (), list(range(x.dim()))
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis {axis} is out of range for a tensor of {x.dim()} dimensions")
    kept = axis % x.dim()
    return (x.shape[kept],), [a for a in range(x.dim()) if a != kept]


def _is_empty(x: Tensor, axes: list[int]) -> bool:
    return math.prod([x.shape[a] for a in axes]) == 0


def _extrema(x: Tensor, axis: int | None, axes: list[int]) -> tuple[Tensor, Tensor]:
    x = x.detach()
    if axis is None:
        low, high = torch.aminmax(x)
        return low, high
    if not axes:  # an empty list of axes would reduce all of them
        return x.clone(), x.clone()
    return x.amin(axes), x.amax(axes)
