"""What the CPU engine reads from tensors: absolute maxima, ranges and histograms, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .layout import Layout, is_dense, per_tensor
from .native import DTYPES, library, refuse
from .reference import compute_dtype

_kernels = library().functions
_threads = torch.get_num_threads


def absmax(x: Tensor, axis: int | None = None) -> Tensor:
    """:func:`qdq.kernels.reference.absmax`."""
    layout, source, shape = _sliced(x, axis)
    out = x.new_empty(shape)
    refuse(_kernels.qdq_absmax(DTYPES[x.dtype], source.data_ptr(), *layout, out.data_ptr(), _threads()))
    return out


def minmax(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """:func:`qdq.kernels.reference.minmax`."""
    layout, source, shape = _sliced(x, axis)
    if layout.n == 0:
        return reference.minmax(x, axis)
    low, high = x.new_empty(shape), x.new_empty(shape)
    pointers = low.data_ptr(), high.data_ptr()
    refuse(_kernels.qdq_minmax(DTYPES[x.dtype], source.data_ptr(), *layout, *pointers, _threads()))
    return low, high


def _sliced(x: Tensor, axis: int | None) -> tuple[Layout, Tensor, tuple[int, ...]]:
    """The layout of the slices of ``x`` along ``axis``, dense memory of ``x``, and the shape of a result."""
    compute_dtype(x.dtype)
    x = x.detach()
    if x.is_neg() or not is_dense(x):
        x = torch.empty_like(x).copy_(x)
    if axis is None:
        return per_tensor(x.numel()), x, ()
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis {axis} is out of range for a tensor of {x.dim()} dimensions")
    size = x.shape[axis]
    if size <= 1 or x.numel() == 0:
        return Layout(x.numel(), x.numel(), x.numel(), size), x, (size,)
    inner = x.stride(axis)
    return Layout(x.numel(), inner * size, inner, size), x, (size,)


def histogram(x: Tensor, width: float, first: int, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qdq.kernels.reference.histogram`."""
    return _histogram(0, x, width, first, num_bins)


def abs_histogram(x: Tensor, width: float, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qdq.kernels.reference.abs_histogram`."""
    return _histogram(1, x, width, 0, num_bins)


def _histogram(absolute: int, x: Tensor, width: float, first: int, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype not in DTYPES or not 0 < width < float("inf") or num_bins < 1:
        if absolute:
            return reference.abs_histogram(x, width, num_bins)
        return reference.histogram(x, width, first, num_bins)
    source = x.detach()
    if source.is_neg() or not is_dense(source):
        source = torch.empty_like(source).copy_(source)
    counts = torch.zeros(num_bins, dtype=torch.int64, device="cpu")
    others = torch.zeros(2, dtype=torch.int64, device="cpu")
    status = _kernels.qdq_histogram(
        DTYPES[x.dtype],
        absolute,
        source.data_ptr(),
        x.numel(),
        width,
        first,
        num_bins,
        counts.data_ptr(),
        others.data_ptr(),
        _threads(),
    )
    refuse(status)
    return counts, others[0], others[1]
