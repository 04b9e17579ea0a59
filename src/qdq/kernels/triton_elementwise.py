"""Triton: one pass over a tensor in the order of memory, for each way that parameters lie over it.

``flat``: one parameter for all. ``rows``: neighbours share a parameter; a program holds some of these rows, so that
parameters are read and prepared once a row. ``columns``: neighbours have different parameters, which repeat with a
period; a program holds some columns of the matrix whose rows are periods, and prepares parameters once a column.
"""
# pyright: reportMissingImports=false
# Triton has wheels for Linux only; nothing imports this file without it.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..formats import FloatFormat
from .layout import Layout
from .triton_launch import (
    COMPUTE_TYPES,
    SHORT_ROW,
    ceil_div,
    elements_of,
    has_fast_doubles,
    is_wide,
    launch,
    period_of,
    tile_of,
)
from .triton_operations import apply, passes, prepare
from .triton_values import narrow, widen

_PERIODS = 8


@triton.jit
def _transfer(
    x,
    g,
    out,
    p,
    q,
    r,
    s,
    places,
    inside,
    OP: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    MAXIMUM: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    GRADIENT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    values = widen(tl.load(x + places, mask=inside), COMPUTE)
    if GRADIENT:
        chosen = tl.where(passes(OP, values, p, q), tl.load(g + places, mask=inside), 0.0)
    else:
        results = apply(OP, values, p, q, r, s, LO, HI, MAXIMUM, MIN_EXPONENT, MANTISSA_BITS)
        chosen = narrow(results, out.dtype.element_ty)
    tl.store(out + places, chosen, mask=inside)


@triton.jit
def _flat(
    x,
    g,
    out,
    a,
    b,
    n,
    OP: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    MAXIMUM: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    GRADIENT: tl.constexpr,
    PARAMETERS: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOUBLES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    places = program * BLOCK + tl.arange(0, BLOCK)
    if PARAMETERS:
        first, second = widen(tl.load(a), COMPUTE), widen(tl.load(b), COMPUTE)
        p, q, r, s = prepare(OP, first, second, LO, HI, MAXIMUM, DOUBLES)
    else:
        p, q, r, s = 0, 0, 0, 0
    _transfer(
        x, g, out, p, q, r, s, places, places < n, OP, LO, HI, MAXIMUM, MIN_EXPONENT, MANTISSA_BITS, GRADIENT, COMPUTE
    )


@triton.jit
def _rows(
    x,
    g,
    out,
    a,
    b,
    rows,
    inner,
    count,
    row,
    parts,
    tiles,
    OP: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    MAXIMUM: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    GRADIENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOUBLES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # ``rows`` runs of ``inner`` elements; where ``parts`` of them make up a row of ``row``, the last may be shorter.
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    run = (program // tiles) * ROWS + tl.arange(0, ROWS)
    column = (program % tiles) * WIDTH + tl.arange(0, WIDTH)
    start = (run // parts) * row + (run % parts) * inner
    length = tl.minimum(inner, row - (run % parts) * inner)
    exists = run < rows
    first = widen(tl.load(a + run % count, mask=exists), COMPUTE)
    second = widen(tl.load(b + run % count, mask=exists), COMPUTE)
    p, q, r, s = prepare(OP, first[:, None], second[:, None], LO, HI, MAXIMUM, DOUBLES)
    inside = exists[:, None] & (column[None, :] < inner)
    if parts > 1:
        inside = inside & (column[None, :] < length[:, None])
    places = start[:, None] + column[None, :]
    _transfer(
        x, g, out, p, q, r, s, places, inside, OP, LO, HI, MAXIMUM, MIN_EXPONENT, MANTISSA_BITS, GRADIENT, COMPUTE
    )


@triton.jit
def _columns(
    x,
    g,
    out,
    a,
    b,
    n,
    period,
    inner,
    count,
    tiles,
    OP: tl.constexpr,
    LO: tl.constexpr,
    HI: tl.constexpr,
    MAXIMUM: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    GRADIENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOUBLES: tl.constexpr,
    WIDE: tl.constexpr,
    PERIODS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    column = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    exists = column < period
    index = (column // inner) % count
    first = widen(tl.load(a + index, mask=exists), COMPUTE)
    second = widen(tl.load(b + index, mask=exists), COMPUTE)
    p, q, r, s = prepare(OP, first, second, LO, HI, MAXIMUM, DOUBLES)
    for i in tl.static_range(PERIODS):
        places = ((program // tiles) * PERIODS + i) * period + column
        inside = exists & (places < n)
        _transfer(
            x, g, out, p, q, r, s, places, inside, OP, LO, HI, MAXIMUM, MIN_EXPONENT, MANTISSA_BITS, GRADIENT, COMPUTE
        )


def run_elementwise(
    op: str,
    x: Tensor,
    out: Tensor,
    layout: Layout,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    grad: Tensor | None = None,
    lo: int = 0,
    hi: int = 0,
    fmt: FloatFormat | None = None,
) -> None:
    """Compute ``op`` of :mod:`qdq.kernels.triton_operations` from ``x`` into ``out``, dense and in one order of memory.

    ``a`` and ``b`` are the parameters in the order of memory, as ``layout`` counts them. With ``grad``, ``op`` says
    where it passes.
    """
    if layout.n == 0:
        return
    first = x if a is None else a
    tensors = (x, x if grad is None else grad, out, first, first if b is None else b)
    constants: dict[str, Any] = {
        "OP": op,
        "LO": lo,
        "HI": hi,
        "MAXIMUM": 0.0 if fmt is None else fmt.max_value,
        "MIN_EXPONENT": 0 if fmt is None else fmt.min_exponent,
        "MANTISSA_BITS": 0 if fmt is None else fmt.mantissa_bits,
        "GRADIENT": grad is not None,
        "COMPUTE": COMPUTE_TYPES[x.dtype],
        "DOUBLES": has_fast_doubles(x.device),
        "WIDE": is_wide(layout.n),
    }
    n, row, inner, count = layout
    elements = elements_of(x)
    if a is None or count == 1:
        programs = ceil_div(n, elements)
        launch(_flat, programs, *tensors, n, PARAMETERS=a is not None, BLOCK=elements, **constants)
    elif inner >= SHORT_ROW or row % inner != 0:
        parts = 1 if row % inner == 0 else ceil_div(row, inner)
        rows = n // inner if parts == 1 else n // row * parts
        height, width = tile_of(inner, elements)
        tiles = ceil_div(inner, width)
        programs = ceil_div(rows, height) * tiles
        sizes = (rows, inner, count, inner if parts == 1 else row, parts, tiles)
        launch(_rows, programs, *tensors, *sizes, ROWS=height, WIDTH=width, **constants)
    else:
        # Of blocks, every row has parameters of its own, and inner * count is all there is.
        period = period_of(n, inner * count)
        block = min(elements, 1024)
        tiles = ceil_div(period, block)
        matrix_rows = ceil_div(n, period)
        periods = _PERIODS if matrix_rows >= _PERIODS else 1
        programs = ceil_div(matrix_rows, periods) * tiles
        sizes = (n, period, inner, count, tiles)
        launch(_columns, programs, *tensors, *sizes, PERIODS=periods, BLOCK=block, **constants)
