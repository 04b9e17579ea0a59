"""Triton: conversions, rounding and comparisons of single values, the same on a device and in the interpreter.

Every kernel must be launched with ``enable_fp_fusion=False``: a product fused with the sum that rounds it would be
rounded once instead of twice.
"""
# pyright: reportMissingImports=false
# Triton has wheels for Linux only; nothing imports this file without it.

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton decides when it decorates a function, so this must be read at the same time.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"))


@triton.jit
def widen(values, dtype: tl.constexpr):
    """``values`` of any dtype as ``dtype``, float32 or float64."""
    if values.dtype == tl.bfloat16:
        # The upper half of a float32; the interpreter's own conversion loses subnormal numbers.
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = values
    return wide.to(dtype)


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """float32 or float64 ``values`` rounded once, half to even, to ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion cuts off instead of rounding.
        bits = values.to(tl.uint32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        short = tl.where(values != values, 0x7FC0, upper.to(tl.int32)).to(tl.uint16)
        result = short.to(tl.bfloat16, bitcast=True)
    else:
        result = values.to(dtype)
    return result


@triton.jit
def divide(numerator, denominator):
    """The correctly rounded quotient: ``/`` is an approximation in float32."""
    if denominator.dtype == tl.float64:
        quotient = numerator / denominator
    else:
        quotient = tl.math.div_rn(numerator, denominator)
    return quotient


@triton.jit
def divisor_of(denominator, DOUBLES: tl.constexpr):
    """What :func:`quotient` divides float32 by: with DOUBLES, the inverse in float64."""
    if DOUBLES and denominator.dtype == tl.float32:
        result = 1.0 / denominator.to(tl.float64)
    else:
        result = denominator
    return result


@triton.jit
def quotient(numerator, divisor):
    """The correctly rounded quotient by what :func:`divisor_of` returned.

    A quotient of two float32 lies at least ``2**-49`` of its size away from where float32 rounds the other way, and
    the product with the inverse at most ``2**-52`` away from the quotient. (Subnormal quotients can differ: here they
    are only ever rounded to 0.) The division itself branches, and takes long for some numerators.
    """
    if divisor.dtype == tl.float64 and numerator.dtype == tl.float32:
        result = (numerator.to(tl.float64) * divisor).to(tl.float32)
    else:
        result = divide(numerator, divisor)
    return result


@triton.jit
def round_half_even(values):
    """Round to the nearest integer, half to even; NaN, infinity and the sign of zero stay.

    A sum with ``2**23`` (``2**52``) has no bits left for a fraction. Larger values are integers already.
    """
    size = tl.abs(values)
    if values.dtype == tl.float64:
        whole = (size + 4503599627370496.0) - 4503599627370496.0
        whole = tl.where(size < 4503599627370496.0, whole, size)
        sign = (values.to(tl.int64, bitcast=True) >> 63) << 63
        result = (whole.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)
    else:
        whole = (size + 8388608.0) - 8388608.0
        whole = tl.where(size < 8388608.0, whole, size)
        sign = (values.to(tl.int32, bitcast=True) >> 31) << 31
        result = (whole.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return result


@triton.jit
def clip(values, low, high):
    """``values`` within ``[low, high]``; NaN stays, and so does a zero's sign. Numbers are rounded to the dtype."""
    lowest, highest = tl.cast(low, values.dtype), tl.cast(high, values.dtype)
    values = tl.where(values < lowest, lowest, values)
    return tl.where(values > highest, highest, values)


@triton.jit
def is_infinite(values):
    """True for both infinities."""
    return tl.abs(values) == float("inf")
