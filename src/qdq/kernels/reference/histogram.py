"""Histograms with int64 counts, whose bins are numbered from 0 in steps of one width."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Temporaries of one chunk stay in the cache of a CPU: several times faster than passing over a large tensor again and
# again. On other devices chunks bound the memory only.
_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 24
# A quotient may round, so that the largest value of the data that fixed a width lies this far beyond the last edge.
_SLACK = 1 + 1e-12


def comparable(values: Tensor) -> Tensor:
    """``values`` in the dtype that they are compared with edges in: float64 on a CPU, else float32 or float64."""
    if values.device.type == "cpu":
        return values.to(torch.float64)
    return values if values.dtype in (torch.float32, torch.float64) else values.to(torch.float32)


def bin_index(values: Tensor, width: Tensor | float) -> Tensor:
    """The int64 k with ``k * width <= values < (k + 1) * width``, for finite values and positive widths."""
    return _bin_number(values, width).to(torch.int64)


def histogram(x: Tensor, width: float, first: int, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count the values of ``x`` in bins of equal width, the edges being the multiples of ``width``.

    Bin k holds ``(first + k) * width <= x < (first + k + 1) * width``. An edge is rounded once, and values are
    compared in float64 on a CPU; elsewhere in float32, or float64 for float64 values.

    Args:
        x: real values, any shape and strides.
        width: of a bin, positive and finite.
        first: number of the first bin.
        num_bins: number of bins.

    Returns:
        Counts, int64 of ``num_bins`` elements; how many values lie in no bin, among them NaN and infinity, int64 0-d;
        how many are exactly 0, int64 0-d: they count in their bin as well.

    Raises:
        ValueError: ``width`` is not positive and finite; ``num_bins`` is below 1.
        TypeError: complex values.
    """
    _check(x, width, num_bins)
    return _count(x, width, first, num_bins, absolute=False)


def abs_histogram(x: Tensor, width: float, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`histogram` of ``|x|`` from 0 on, whose last bin holds its upper end too.

    So that a width of ``max|x| / num_bins``, rounded, leaves nothing out, "end" is ``num_bins * width * (1 + 1e-12)``.
    """
    _check(x, width, num_bins)
    return _count(x, width, 0, num_bins, absolute=True)


def _check(x: Tensor, width: float, num_bins: int) -> None:
    if x.is_complex():
        raise TypeError(f"a histogram takes real values, got {x.dtype}")
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be positive and finite, got {width}")
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")


def _count(x: Tensor, width: float, first: int, num_bins: int, absolute: bool) -> tuple[Tensor, Tensor, Tensor]:
    # The element after the last bin takes what lies in no bin.
    counts = torch.zeros(num_bins + 1, dtype=torch.int64, device=x.device)
    zeros = torch.zeros((), dtype=torch.int64, device=x.device)
    for chunk in _flat_chunks(x.detach(), _CPU_CHUNK if x.device.type == "cpu" else _DEVICE_CHUNK):
        values = comparable(chunk)
        if absolute:
            values = values.abs()
        # Still floating point: infinity has no int64.
        place = _bin_number(values, width)
        if absolute:
            end = min(num_bins * width * _SLACK, torch.finfo(values.dtype).max)
            inside, place = values <= end, place.clamp_(max=num_bins - 1)
        else:
            place.sub_(first)
            inside = (place >= 0) & (place < num_bins)
        place = torch.where(inside, place, num_bins).to(torch.int32)
        counts += torch.bincount(place, minlength=num_bins + 1)
        zeros += chunk.numel() - torch.count_nonzero(chunk)
    return counts[:num_bins], counts[num_bins], zeros


def _bin_number(values: Tensor, width: Tensor | float) -> Tensor:
    index = torch.floor(values / width)
    # The quotient may round across an edge: compare with the edges on both sides.
    index -= (index * width > values).to(index.dtype)
    index += ((index + 1) * width <= values).to(index.dtype)
    return index


def _flat_chunks(x: Tensor, size: int) -> Iterator[Tensor]:
    """The values of ``x`` in any order, 1-d and at most ``size`` at a time; without a copy of all of ``x``."""
    in_memory_order = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    if x.numel() <= size:
        yield in_memory_order.reshape(-1)
    elif in_memory_order.is_contiguous():
        yield from in_memory_order.view(-1).split(size)
    else:
        longest = max(range(x.dim()), key=lambda axis: x.shape[axis])
        for part in x.split(max(1, x.shape[longest] * size // x.numel()), longest):
            yield from _flat_chunks(part, size)
