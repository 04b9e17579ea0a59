"""What calibrators share: they collect tensors and compute an amax."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..kernels import engine, reference
from ..kernels.checks import unreadable

# What the compiled kernels compute on.
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Calibrator:
    """Base class of the calibrators that a :class:`qdq.TensorQuantizer` owns; its methods raise NotImplementedError.

    Args:
        num_bits: width of the codes, or (exponent bits, mantissa bits).
        axis: the axes that keep their own amax.
        unsigned: codes from 0.
    """

    def __init__(
        self, num_bits: int | tuple[int, int] = 8, axis: int | tuple[int, ...] | None = None, unsigned: bool = False
    ) -> None:
        self._num_bits = num_bits
        self._axis = axis
        self._unsigned = unsigned

    def collect(self, x: Tensor) -> None:
        """Add the values of ``x`` to what was seen."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget what was seen."""
        raise NotImplementedError

    def compute_amax(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The amax of what was seen; None before data."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_bits={self._num_bits}, axis={self._axis}, unsigned={self._unsigned})"


def engine_for(x: Tensor) -> ModuleType:
    """The engine that computes on ``x``: the reference while a compiler or a tracer looks on."""
    return reference if unreadable(x) else engine.for_tensor(x)


def reduce_amax(input: Tensor, axis: int | tuple[int, ...] | list[int] | None = None, keepdims: bool = True) -> Tensor:
    """The largest absolute value over the axes ``axis`` (None: all), without a gradient.

    One value is returned 0-d whatever ``keepdims``. An empty reduction gives 0. NaN propagates.

    Raises:
        ValueError: more axes than ``input`` has, or an axis that it does not have.
    """
    x = input.detach()
    axes = normalize_axes(axis, x.dim()) if axis is not None else tuple(range(x.dim()))
    kept = [i for i in range(x.dim()) if i not in axes]
    if x.numel() == 0:
        result = x.new_zeros(_shape_without(x, axes))
    elif not axes:
        result = x.abs()
    elif len(kept) <= 1 and x.dtype in FLOATS and (compute := engine_for(x)) is not reference:
        result = compute.absmax(x, kept[0] if kept else None).view(_shape_without(x, axes))
    else:
        # Two reductions read the tensor twice; abs() would write another tensor of that size as well.
        result = torch.maximum(x.amax(axes, keepdim=True), -x.amin(axes, keepdim=True)).abs()
    if result.numel() == 1:
        return result.reshape(())
    return result if keepdims or not axes else result.squeeze(axes)


def _shape_without(x: Tensor, axes: tuple[int, ...]) -> list[int]:
    return [1 if i in axes else size for i, size in enumerate(x.shape)]


def reduce_keeping(x: Tensor, axis: int | tuple[int, ...] | list[int] | None) -> Tensor:
    """The largest absolute value over all axes but those in ``axis``, which keep theirs; kept dimensions."""
    if axis is None:
        return reduce_amax(x)
    kept = normalize_axes(axis, x.dim())
    return reduce_amax(x, tuple(i for i in range(x.dim()) if i not in kept))


def reduce_blocks(x: Tensor, block_size: int) -> Tensor:
    """The largest absolute value of every `block_size` elements of the last axis, of which the last block may be short.

    Shape `x.shape[:-1] + (ceil(n / block_size),)`, no gradient. NaN propagates.
    """
    rows = x.detach().abs()
    short = -rows.shape[-1] % block_size
    return torch.nn.functional.pad(rows, (0, short)).unflatten(-1, (-1, block_size)).amax(-1)


def normalize_axes(axis: int | tuple[int, ...] | list[int], rank: int) -> tuple[int, ...]:
    """``axis`` as a tuple of distinct axes in ``[0, rank)``.

    Raises:
        ValueError: more axes than ``rank``, or one outside ``[-rank, rank)``.
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if len(axes) > rank:
        raise ValueError(f"Cannot reduce more axes than the tensor has: axis={axes}, {rank} dimensions")
    for a in axes:
        if not -rank <= a < rank:
            raise ValueError(f"axis {a} is out of range for a tensor of {rank} dimensions")
    return tuple(sorted({a % rank for a in axes}))
