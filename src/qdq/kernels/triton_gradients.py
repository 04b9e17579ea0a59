"""Triton: the gradient of a range with learned ends: what passes, and the sums of the rest, in one pass."""
# pyright: reportMissingImports=false
# Triton has wheels for Linux only; nothing imports this file without it.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import COMPUTE_TYPES, ceil_div, is_wide, launch
from .triton_values import widen

_BLOCK = 1024
# Blocks that one program sums. It depends on nothing, so that sums are the same on every device.
_STEPS = 4


@triton.jit
def _range_sums(
    x,
    g,
    out,
    low,
    high,
    sums,
    n,
    programs,
    CLOSED: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    program = tl.program_id(0)
    start = program
    if WIDE:
        start = program.to(tl.int64)
    lowest, highest = widen(tl.load(low), COMPUTE), widen(tl.load(high), COMPUTE)
    total_below = tl.zeros((BLOCK,), tl.float64)
    total_above = tl.zeros((BLOCK,), tl.float64)
    for i in tl.static_range(STEPS):
        places = (start * STEPS + i) * BLOCK + tl.arange(0, BLOCK)
        exists = places < n
        values = widen(tl.load(x + places, mask=exists), COMPUTE)
        grad = tl.load(g + places, mask=exists, other=0.0)
        if CLOSED:
            below, above = values < lowest, values > highest
            inside = (values >= lowest) & (values <= highest)
        else:
            below, above = values <= lowest, values >= highest
            inside = (values > lowest) & (values < highest)
        tl.store(out + places, tl.where(inside, grad, 0.0), mask=exists)
        wide = widen(grad, tl.float64)
        total_below += tl.where(below, wide, 0.0)
        total_above += tl.where(above, wide, 0.0)
    tl.store(sums + program, tl.sum(total_below, axis=0))
    tl.store(sums + programs + program, tl.sum(total_above, axis=0))


def run_range_gradient(grad: Tensor, x: Tensor, out: Tensor, low: Tensor, high: Tensor, closed: bool) -> Tensor:
    """Pass ``grad`` where ``x`` lies between the single values ``low`` and ``high`` into ``out``.

    The three are dense, in one order of memory. ``closed``: the ends belong to the inside.

    Returns:
        float64 of two elements: the sums of ``grad`` below and above the range. The order of summation is fixed.
    """
    n = x.numel()
    programs = ceil_div(n, _BLOCK * _STEPS)
    sums = torch.empty(2, programs, dtype=torch.float64, device=x.device)
    if programs:
        tensors = (x, grad, out, low, high, sums)
        constants = {"CLOSED": closed, "COMPUTE": COMPUTE_TYPES[x.dtype], "WIDE": is_wide(n)}
        launch(_range_sums, programs, *tensors, n, programs, BLOCK=_BLOCK, STEPS=_STEPS, **constants)
    return sums.sum(1)
