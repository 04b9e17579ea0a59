"""Triton: histograms with int64 counts. Each program counts in shared memory and adds what it found to the whole."""
# pyright: reportMissingImports=false
# Triton has wheels for Linux only; nothing imports this file without it.

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import ceil_div, is_wide, launch
from .triton_values import widen

_BLOCK = 2048
# Blocks that one program counts: more where there are enough to keep a device busy.
_STEPS = 16
_MANY = 2**20
# The most bins that fit into the shared memory of every supported device; more are counted in global memory.
_SHARED_BINS = 4096


@triton.jit(do_not_specialize=["width_bits", "inverse_bits", "end_bits", "first", "num_bins"])
def _count(
    x,
    counts,
    n,
    width_bits,
    inverse_bits,
    end_bits,
    first,
    num_bins,
    ABSOLUTE: tl.constexpr,
    SHARED: tl.constexpr,
    BINS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    # Triton passes Python's numbers as float32: these come as the bits of float64.
    width = width_bits.to(tl.int64).to(tl.float64, bitcast=True)
    inverse = inverse_bits.to(tl.int64).to(tl.float64, bitcast=True)
    end = end_bits.to(tl.int64).to(tl.float64, bitcast=True)
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    if SHARED:
        found = tl.zeros((BINS,), tl.int32)
    left_out = tl.zeros((BLOCK,), tl.int32)
    zeros = tl.zeros((BLOCK,), tl.int32)
    for i in range(STEPS):
        places = (program * STEPS + i) * BLOCK + tl.arange(0, BLOCK)
        exists = places < n
        values = widen(tl.load(x + places, mask=exists, other=0.0), tl.float64)
        zeros += (exists & (values == 0.0)).to(tl.int32)
        if ABSOLUTE:
            values = tl.abs(values)
        # The product may lie across an edge: compare with the edges on both sides.
        number = tl.floor(values * inverse)
        number = tl.where(number * width > values, number - 1.0, number)
        number = tl.where((number + 1.0) * width <= values, number + 1.0, number)
        place = number - first.to(tl.float64)
        if ABSOLUTE:
            inside = exists & (values <= end)
            place = tl.where(place > (num_bins - 1).to(tl.float64), (num_bins - 1).to(tl.float64), place)
        else:
            inside = exists & (place >= 0.0) & (place < num_bins.to(tl.float64))
        left_out += (exists & (inside == 0)).to(tl.int32)
        index = tl.where(inside, place, 0.0).to(tl.int32)
        if SHARED:
            found += tl.histogram(index, BINS, mask=inside)
        else:
            # Zeros are added below: what a ReLU leaves would queue for one address.
            one = tl.full((BLOCK,), 1, tl.int64)
            tl.atomic_add(counts + index, one, mask=inside & (values != 0.0), sem="relaxed")
    all_zeros = tl.sum(zeros, axis=0).to(tl.int64)
    if SHARED:
        bins = tl.arange(0, BINS)
        tl.atomic_add(counts + bins, found.to(tl.int64), mask=(bins < num_bins) & (found > 0), sem="relaxed")
    else:
        tl.atomic_add(counts - first, all_zeros, mask=(first <= 0) & (-first < num_bins), sem="relaxed")
    tl.atomic_add(counts + num_bins, tl.sum(left_out, axis=0).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + num_bins + 1, all_zeros, sem="relaxed")


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def run_histogram(x: Tensor, width: float, first: int, num_bins: int, end: float | None) -> Tensor:
    """Count dense ``x`` in ``num_bins`` bins from ``first * width`` on; with ``end``, ``|x|`` up to that value.

    Returns:
        int64 of ``num_bins + 2`` elements: the counts, then how many values lie in no bin, and how many are 0.
    """
    counts = torch.zeros(num_bins + 2, dtype=torch.int64, device=x.device)
    n = x.numel()
    if n:
        bins = max(32, triton.next_power_of_2(num_bins))
        numbers = (_bits(width), _bits(1.0 / width), _bits(0.0 if end is None else end), first, num_bins)
        constants = {"ABSOLUTE": end is not None, "SHARED": bins <= _SHARED_BINS, "BINS": bins, "WIDE": is_wide(n)}
        steps = _STEPS if n >= _MANY else 1
        launch(_count, ceil_div(n, _BLOCK * steps), x, counts, n, *numbers, BLOCK=_BLOCK, STEPS=steps, **constants)
    return counts
