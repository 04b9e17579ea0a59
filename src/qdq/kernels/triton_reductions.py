"""Triton: absolute maxima and ranges, per tensor and per channel.

Floating-point numbers are compared as integers of the same order (the bits, those of negative numbers inverted below
the sign). NaN becomes the largest of them, so that it wins; maxima of integers can be joined by atomics in any order.
"""
# pyright: reportMissingImports=false
# Triton has wheels for Linux only; nothing imports this file without it.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Layout
from .triton_launch import COMPUTE_TYPES, SHORT_ROW, ceil_div, elements_of, is_wide, launch, period_of, tile_of
from .triton_values import narrow, widen

_STEPS = 4
_PERIODS = (32, 8, 2, 1)


@triton.jit
def _key(values, inside, ABSOLUTE: tl.constexpr):
    """Integers in the order of ``values`` or their absolute values; NaN the largest; the smallest where not inside."""
    if values.dtype == tl.float64:
        bits = values.to(tl.int64, bitcast=True)
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
        key = magnitude if ABSOLUTE else bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        key = tl.where(values != values, 0x7FFFFFFFFFFFFFFF, key)
        key = tl.where(inside, key, -0x7FFFFFFFFFFFFFFF - 1)
    else:
        bits = values.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        key = magnitude if ABSOLUTE else bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = tl.where(values != values, 0x7FFFFFFF, key)
        key = tl.where(inside, key, -0x7FFFFFFF - 1)
    return key


@triton.jit
def _flipped(key, values, inside):
    """Keys in the opposite order, for the smallest value; NaN stays the largest."""
    return tl.where((values != values) | (inside == 0), key, ~key)


@triton.jit
def _flat(
    x,
    keys,
    n,
    ABSOLUTE: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    places = program * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    values = widen(tl.load(x + places, mask=places < n), COMPUTE)
    largest = _key(values, places < n, ABSOLUTE)
    smallest = _flipped(largest, values, places < n)
    for _ in tl.static_range(1, STEPS):
        places += BLOCK
        values = widen(tl.load(x + places, mask=places < n), COMPUTE)
        key = _key(values, places < n, ABSOLUTE)
        largest = tl.maximum(largest, key)
        smallest = tl.maximum(smallest, _flipped(key, values, places < n))
    tl.atomic_max(keys, tl.max(largest, axis=0), sem="relaxed")
    if not ABSOLUTE:
        tl.atomic_max(keys + 1, tl.max(smallest, axis=0), sem="relaxed")


@triton.jit
def _rows(
    x,
    keys,
    rows,
    inner,
    count,
    tiles,
    ABSOLUTE: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # Rows of ``inner`` neighbours of one channel.
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row = (program // tiles) * ROWS + tl.arange(0, ROWS)
    column = (program % tiles) * WIDTH + tl.arange(0, WIDTH)
    exists = row < rows
    inside = exists[:, None] & (column[None, :] < inner)
    values = widen(tl.load(x + (row * inner)[:, None] + column[None, :], mask=inside), COMPUTE)
    key = _key(values, inside, ABSOLUTE)
    tl.atomic_max(keys + row % count, tl.max(key, axis=1), mask=exists, sem="relaxed")
    if not ABSOLUTE:
        smallest = tl.max(_flipped(key, values, inside), axis=1)
        tl.atomic_max(keys + count + row % count, smallest, mask=exists, sem="relaxed")


@triton.jit
def _columns(
    x,
    keys,
    n,
    period,
    inner,
    count,
    tiles,
    ABSOLUTE: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDE: tl.constexpr,
    PERIODS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Columns of a matrix whose rows are ``period`` elements: those of a column belong to one channel.
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    column = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    exists = column < period
    places = (program // tiles) * PERIODS * period + column
    inside = exists & (places < n)
    values = widen(tl.load(x + places, mask=inside), COMPUTE)
    largest = _key(values, inside, ABSOLUTE)
    smallest = _flipped(largest, values, inside)
    for _ in range(1, PERIODS):
        places += period
        inside = exists & (places < n)
        values = widen(tl.load(x + places, mask=inside), COMPUTE)
        key = _key(values, inside, ABSOLUTE)
        largest = tl.maximum(largest, key)
        smallest = tl.maximum(smallest, _flipped(key, values, inside))
    channel = (column // inner) % count
    tl.atomic_max(keys + channel, largest, mask=exists, sem="relaxed")
    if not ABSOLUTE:
        tl.atomic_max(keys + count + channel, smallest, mask=exists, sem="relaxed")


@triton.jit
def _value(key):
    """The float32 or float64 whose key in an int32 or int64 it is."""
    if key.dtype == tl.int64:
        value = (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _decode(keys, low, high, count, ABSOLUTE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = place < count
    largest = _value(tl.load(keys + place, mask=exists))
    tl.store(high + place, narrow(largest, high.dtype.element_ty), mask=exists)
    if not ABSOLUTE:
        smallest = _value(~tl.load(keys + count + place, mask=exists))
        tl.store(low + place, narrow(smallest, low.dtype.element_ty), mask=exists)


def run_extrema(x: Tensor, layout: Layout, low: Tensor | None, high: Tensor) -> None:
    """The largest values of dense ``x`` into ``high``, one for each of ``layout.count`` channels, and the smallest.

    With ``low`` None, the largest absolute values into ``high``: 0 where there are none.
    """
    n, row, inner, count = layout
    whole = torch.int64 if x.dtype is torch.float64 else torch.int32
    absolute = low is None
    if absolute:
        keys = torch.zeros(count, dtype=whole, device=x.device)
    else:
        keys = torch.full((2 * count,), torch.iinfo(whole).min, dtype=whole, device=x.device)
    elements = elements_of(x)
    constants: dict[str, Any] = {"ABSOLUTE": absolute, "COMPUTE": COMPUTE_TYPES[x.dtype], "WIDE": is_wide(n)}
    if n and count == 1:
        programs = ceil_div(n, elements * _STEPS)
        launch(_flat, programs, x, keys, n, BLOCK=elements, STEPS=_STEPS, **constants)
    # A column of a few elements is better read as a part of its row.
    elif n and (inner >= SHORT_ROW or (inner > 1 and period_of(n, row) * 4 > n)):
        height, width = tile_of(inner, elements)
        rows, tiles = n // inner, ceil_div(inner, width)
        programs = ceil_div(rows, height) * tiles
        launch(_rows, programs, x, keys, rows, inner, count, tiles, ROWS=height, WIDTH=width, **constants)
    elif n:
        period, block = period_of(n, row), min(elements, 1024)
        tiles, matrix_rows = ceil_div(period, block), ceil_div(n, period)
        periods = next(periods for periods in _PERIODS if periods <= matrix_rows)
        programs = ceil_div(matrix_rows, periods) * tiles
        sizes = (n, period, inner, count, tiles)
        launch(_columns, programs, x, keys, *sizes, PERIODS=periods, BLOCK=block, **constants)
    launch(_decode, ceil_div(count, 256), keys, high if low is None else low, high, count, absolute, 256)
