"""Triton: one pass over a tensor in the order of memory, for each way that parameters lie over it.

``flat``: one parameter for all. ``rows``: neighbours share a parameter; a program holds some of these rows, so that
parameters are read and prepared once a row. ``columns``: neighbours have different parameters, which repeat with a
period; a program holds some columns of the matrix whose rows are periods, and prepares parameters once a column.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FloatFormat
from .layout import Layout
from .triton_operations import apply, passes, prepare
from .triton_values import narrow, widen

# Elements of float32 in a program: 16 for each thread, in loads of 128 bits.
_ELEMENTS = 2048
WARPS = 4
_PERIODS = 8
# From here on, 32-bit places could overflow.
WIDE_FROM = 2**30
# Compute capabilities with at least half as many operations in float64 as in float32.
_FAST_DOUBLES = ((7, 0), (8, 0), (9, 0), (10, 0))
# Rows shorter than this are read as columns.
_SHORT = 16

COMPUTE_TYPES = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


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
    _transfer(x, g, out, p, q, r, s, places, inside, OP, LO, HI, MAXIMUM, MIN_EXPONENT, MANTISSA_BITS, GRADIENT, COMPUTE)


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


@functools.lru_cache(maxsize=1024)
def tile_of(inner: int, elements: int) -> tuple[int, int]:
    """Rows and width of a tile for rows of ``inner`` elements: the widest that wastes little, else what wastes least."""
    best, least = _SHORT, math.inf
    width = elements
    while width >= _SHORT:
        waste = -(-inner // width) * width / inner
        if waste <= 1.1:
            return elements // width, width
        if waste < least:
            best, least = width, waste
        width //= 2
    return elements // best, best


@functools.lru_cache(maxsize=1024)
def period_of(n: int, row: int) -> int:
    """The elements after which parameters repeat: a multiple of ``row`` that keeps loads aligned and fills programs."""
    aligned = row * (16 // math.gcd(row, 16))
    period = aligned * -(-1024 // aligned)
    return period if 2 * period <= n else n


def elements_of(x: Tensor) -> int:
    """Elements that a program holds: 8 KiB of them."""
    return _ELEMENTS * 4 // max(2, x.element_size())


@functools.lru_cache(maxsize=64)
def has_fast_doubles(device: torch.device) -> bool:
    """True where float64 is fast enough to divide float32 with: on NVIDIA's devices for data centers."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) in _FAST_DOUBLES


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
    """Compute ``op`` of :mod:`qdq.kernels.triton_operations` from ``x`` into ``out``: both dense, in one order of memory.

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
        "WIDE": layout.n >= WIDE_FROM,
        "num_warps": WARPS,
        "enable_fp_fusion": False,
    }
    n, row, inner, count = layout
    elements = elements_of(x)
    with torch.cuda.device_of(x):
        if a is None or count == 1:
            _flat[(triton.cdiv(n, elements),)](*tensors, n, PARAMETERS=a is not None, BLOCK=elements, **constants)
        elif inner >= _SHORT or row % inner != 0:
            parts = 1 if row % inner == 0 else triton.cdiv(row, inner)
            rows = n // inner if parts == 1 else n // row * parts
            height, width = tile_of(inner, elements)
            tiles = triton.cdiv(inner, width)
            grid = (triton.cdiv(rows, height) * tiles,)
            length = inner if parts == 1 else row
            _rows[grid](*tensors, rows, inner, count, length, parts, tiles, ROWS=height, WIDTH=width, **constants)
        else:
            period = period_of(n, row)
            block = min(elements, 1024)
            tiles = triton.cdiv(period, block)
            matrix_rows = triton.cdiv(n, period)
            periods = _PERIODS if matrix_rows >= _PERIODS else 1
            grid = (triton.cdiv(matrix_rows, periods) * tiles,)
            _columns[grid](*tensors, n, period, inner, count, tiles, PERIODS=periods, BLOCK=block, **constants)
