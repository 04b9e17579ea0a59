"""Triton: rounding to small floating-point formats and to powers of two, by the bits of float32 and float64."""
# pyright: reportMissingImports=false
# Triton has wheels for Linux only; nothing imports this file without it.

from __future__ import annotations

import triton
import triton.language as tl

from .triton_values import clip, round_half_even


@triton.jit
def nearest_float(x, MAXIMUM: tl.constexpr, MIN_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """``x`` rounded half to even to a format with these numbers, saturating; zeros keep their sign, NaN stays.

    The spacing of the format's values around x is a power of two, so that only the rounding to a multiple rounds.
    """
    size = clip(x, -MAXIMUM, MAXIMUM)
    # Exponents are kept biased; below the smallest normal number of the format there is one spacing.
    if x.dtype == tl.float64:
        exponent = (size.to(tl.int64, bitcast=True) >> 52) & 0x7FF
        spacing = tl.maximum(exponent, MIN_EXPONENT + 1023) - MANTISSA_BITS
        quantum = (spacing << 52).to(tl.float64, bitcast=True)
        inverse = ((2046 - spacing) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = (size.to(tl.int32, bitcast=True) >> 23) & 0xFF
        spacing = tl.maximum(exponent, MIN_EXPONENT + 127) - MANTISSA_BITS
        quantum = (spacing << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - spacing) << 23).to(tl.float32, bitcast=True)
    return round_half_even(size * inverse) * quantum


@triton.jit
def nearest_e8m0(x):
    """The nearest power of two from 2**-127 to 2**127, halves up; NaN for negative values and above.

    The reference says more about the low end.
    """
    # Adding half of the last place of the exponent carries into it from 1.5 times a power of two on.
    if x.dtype == tl.float64:
        bits = (x.to(tl.int64, bitcast=True) + 0x8000000000000) & 0x7FF0000000000000
        power = bits.to(tl.float64, bitcast=True)
    else:
        bits = (x.to(tl.int32, bitcast=True) + 0x400000) & 0x7F800000
        power = bits.to(tl.float32, bitcast=True)
    # Above the smallest scale everything goes up to the next, as what float32 holds as a subnormal number does in
    # other casts.
    smallest = tl.cast(5.877471754111438e-39, x.dtype)  # 2**-127
    power = tl.where(x < 1.1754943508222875e-38, 1.1754943508222875e-38, power)  # 2**-126
    power = tl.where(x <= smallest, smallest, power)
    valid = (x >= 0.0) & (x < float("inf")) & (power <= 1.7014118346046923e38)  # 2**127
    return tl.where(valid, power, float("nan"))
