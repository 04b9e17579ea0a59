"""Triton: what each operation does to one value, in two steps.

``prepare`` turns the parameters ``a`` and ``b`` of a value (amax; step size and zero point; both ends of a range) into
the four numbers that ``apply`` and ``passes`` compute with: once for all the values that share the parameters.
"""
# pyright: reportMissingImports=false
# Triton has wheels for Linux only; nothing imports this file without it.

from __future__ import annotations

import triton
import triton.language as tl

from .reference import TINY_AMAX as _TINY_AMAX
from .triton_float_formats import nearest_e8m0, nearest_float
from .triton_values import clip, divide, divisor_of, is_infinite, quotient, round_half_even

TINY_AMAX = tl.constexpr(_TINY_AMAX)


@triton.jit
def scale_of(amax, bound):
    """``bound / amax``; 1 where amax counts as zero, NaN where it is NaN or infinite."""
    tiny = amax <= TINY_AMAX
    scale = divide(tl.cast(bound, amax.dtype), tl.where(tiny, 1.0, amax))
    scale = tl.where(is_infinite(amax), float("nan"), scale)
    return tl.where(tiny, 1.0, scale)


@triton.jit
def prepare(
    OP: tl.constexpr,
    a,
    b,
    LO: tl.constexpr,
    HI: tl.constexpr,
    MAXIMUM: tl.constexpr,
    DOUBLES: tl.constexpr,
):
    """Four numbers that depend on the parameters only."""
    p, q, r, s = a, b, a, a
    if OP == "symmetric":
        p = scale_of(a, HI)
        # A code over infinity is 0.
        q = divisor_of(tl.where(a <= TINY_AMAX, float("inf"), p), DOUBLES)
    elif OP == "symmetric_codes":
        p = scale_of(a, HI)
        q = tl.where(a <= TINY_AMAX, 0.0, tl.where(is_infinite(a), float("nan"), tl.cast(1.0, a.dtype)))
    elif OP == "affine" or OP == "affine_codes":
        r = divisor_of(a, DOUBLES)
    elif OP == "affine_gradient":
        p = (tl.cast(LO, a.dtype) - b) * a
        q = (tl.cast(HI, a.dtype) - b) * a
    elif OP == "range":
        width = b - a
        p = tl.where(width == 0.0, 1.0, divide(width, tl.cast(HI - LO, a.dtype)))
        q = round_half_even(divide(a, p)) + tl.cast(-LO, a.dtype)
        r = divisor_of(p, DOUBLES)
        # The only value of a range without a width; NaN has none.
        s = tl.where(width == 0.0, a, float("nan"))
    elif OP == "scaled_float":
        p = scale_of(a, MAXIMUM)
        q = divisor_of(tl.where(a <= TINY_AMAX, float("inf"), p), DOUBLES)
    return p, q, r, s


@triton.jit
def apply(
    OP: tl.constexpr,
    x,
    p,
    q,
    r,
    s,
    LO: tl.constexpr,
    HI: tl.constexpr,
    MAXIMUM: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
):
    """The result for ``x``, in its dtype."""
    if OP == "symmetric":
        y = quotient(clip(round_half_even(x * p), LO, HI), q)
    elif OP == "symmetric_codes":
        y = clip(round_half_even(x * p), LO, HI) * q
    elif OP == "scale":
        y = scale_of(x, HI)
    elif OP == "affine_codes":
        y = clip(round_half_even(quotient(x, r)) + q, LO, HI)
    elif OP == "affine":
        y = (clip(round_half_even(quotient(x, r)) + q, LO, HI) - q) * p
    elif OP == "range":
        y = (clip(round_half_even(quotient(x, r)) - q, LO, HI) + q) * p
        y = tl.where(s == s, s + clip(x, 0, 0), y)
    elif OP == "float":
        y = nearest_float(x, MAXIMUM, MIN_EXPONENT, MANTISSA_BITS)
    elif OP == "unscaled_float":
        y = nearest_float(x, MAXIMUM, MIN_EXPONENT, MANTISSA_BITS)
        y = tl.where(tl.abs(x) < TINY_AMAX, 0.0, y)
    elif OP == "scaled_float":
        y = quotient(nearest_float(x * p, MAXIMUM, MIN_EXPONENT, MANTISSA_BITS), q)
        y = tl.where(tl.abs(x) < TINY_AMAX, 0.0, y)
    else:
        tl.static_assert(OP == "e8m0")
        y = nearest_e8m0(x)
    return y


@triton.jit
def passes(OP: tl.constexpr, x, p, q):
    """True where the straight-through gradient passes ``x``."""
    if OP == "symmetric_gradient":
        inside = tl.abs(x) <= p
    else:
        inside = (x >= p) & (x <= q)
    return inside
