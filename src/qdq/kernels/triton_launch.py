"""How Triton's kernels are launched: the work of one program, and on which device."""
# pyright: reportMissingImports=false
# Triton has wheels for Linux only; nothing imports this file without it.

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

# Rows shorter than this are read as columns.
SHORT_ROW = 16
# From this many elements on, 32-bit places could overflow.
WIDE_FROM = 2**30
_WARPS = 4
# Compute capabilities with at least half as many operations in float64 as in float32.
_FAST_DOUBLES = ((7, 0), (8, 0), (9, 0), (10, 0))

COMPUTE_TYPES = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def launch(kernel: Any, programs: int, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run ``programs`` programs of ``kernel`` on the device of ``x``, its first argument, without waiting for them."""
    with torch.cuda.device_of(x):
        kernel[(programs,)](x, *arguments, num_warps=_WARPS, enable_fp_fusion=False, **constants)


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def is_wide(n: int) -> bool:
    """True where the places of ``n`` elements need 64 bits."""
    return n >= WIDE_FROM


@functools.lru_cache(maxsize=64)
def has_fast_doubles(device: torch.device) -> bool:
    """True where float64 is fast enough to divide float32 with: on NVIDIA's devices for data centers."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) in _FAST_DOUBLES


def elements_of(x: Tensor) -> int:
    """Elements that a program holds: 8 KiB of them, which are 4 loads of 128 bits for each thread."""
    return 8192 // x.element_size()


@functools.lru_cache(maxsize=1024)
def tile_of(inner: int, elements: int) -> tuple[int, int]:
    """Rows and width of a tile for rows of ``inner``: the widest that wastes little, else the least wasteful."""
    best, least = SHORT_ROW, math.inf
    width = elements
    while width >= SHORT_ROW:
        waste = ceil_div(inner, width) * width / inner
        if waste <= 1.1:
            return elements // width, width
        if waste < least:
            best, least = width, waste
        width //= 2
    return elements // best, best


@functools.lru_cache(maxsize=1024)
def period_of(n: int, row: int) -> int:
    """The elements after which parameters repeat: a multiple of ``row`` that keeps loads aligned and fills programs.

    ``n`` itself, which ``row`` divides, where that leaves less than two periods.
    """
    aligned = row * (16 // math.gcd(row, 16))
    period = aligned * ceil_div(1024, aligned)
    return period if 2 * period <= n else n
