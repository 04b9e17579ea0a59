"""Symmetric quantization: codes are inputs times ``bound / amax``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import IntFormat
from .broadcasting import compute_dtype, expand_blocks

# An amax at or below this counts as zero: it is the smallest subnormal number of float16.
TINY_AMAX = 2.0**-24


def symmetric_scale(amax: Tensor, bound: int) -> Tensor:
    """``bound / amax``, in the dtype of ``amax``; 1 where amax counts as zero, NaN where it is NaN or infinite."""
    if bound <= 0:
        return torch.ones_like(amax)
    tiny = amax <= TINY_AMAX
    # A number divided by a tensor is computed as a reciprocal and a product, one ulp off.
    scale = torch.full_like(amax, bound) / torch.where(tiny, 1.0, amax)
    scale = torch.where(torch.isinf(amax), torch.nan, scale)
    return torch.where(tiny, 1.0, scale)


def symmetric_quantize(
    inputs: Tensor, amax: Tensor, fmt: IntFormat, block_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """``codes = clamp(round_half_to_even(inputs * scale), lo, hi)`` with ``scale = bound / amax``.

    ``amax`` broadcasts to ``inputs``; with ``block_size`` it holds one value per block along the last axis.

    Returns:
        The codes and the scale, both in the dtype of ``inputs``; the scale has the shape of ``amax``.

    Raises:
        ValueError: ``amax`` does not broadcast.
        TypeError: inputs of another dtype than float16, bfloat16, float32, float64.
    """
    dtype = compute_dtype(inputs.dtype)
    x, wide = inputs.to(dtype), amax.to(dtype)
    scale = symmetric_scale(wide, fmt.bound)
    if fmt.degenerate:
        codes = torch.clamp(x, 0.0, 0.0)
    else:
        fitted = expand_blocks(x, wide, block_size, "amax")
        per_value = expand_blocks(x, scale, block_size, "amax")
        codes = torch.clamp(torch.round_(x * per_value), fmt.lo, fmt.hi)
        # After clamping the codes are finite or NaN, so that the product with 0 is 0 and NaN stays.
        codes.mul_(torch.where(fitted <= TINY_AMAX, 0.0, torch.where(torch.isinf(fitted), torch.nan, 1.0)).to(dtype))
    return codes.to(inputs.dtype), scale.to(inputs.dtype)


def symmetric_fake_quantize(inputs: Tensor, amax: Tensor, fmt: IntFormat, block_size: int | None = None) -> Tensor:
    """Quantize and dequantize: the codes of :func:`symmetric_quantize` divided by the scale, in the input's dtype.

    The scale stays in the compute dtype. Arguments and errors are those of :func:`symmetric_quantize`.
    """
    dtype = compute_dtype(inputs.dtype)
    x, wide = inputs.to(dtype), amax.to(dtype)
    if fmt.degenerate:
        return torch.clamp(x, 0.0, 0.0).to(inputs.dtype)
    wide = expand_blocks(x, wide, block_size, "amax")
    scale = symmetric_scale(wide, fmt.bound)
    # A code over infinity is 0, and NaN stays NaN: what a zero amax asks for, without a further pass.
    divisor = torch.where(wide <= TINY_AMAX, torch.inf, scale)
    return torch.clamp(torch.round_(x * scale), fmt.lo, fmt.hi).div_(divisor).to(inputs.dtype)


def symmetric_mask(inputs: Tensor, amax: Tensor, block_size: int | None = None) -> Tensor:
    """True where ``|inputs| <= amax``: where the straight-through gradient passes."""
    dtype = compute_dtype(inputs.dtype)
    return inputs.to(dtype).abs() <= expand_blocks(inputs, amax.to(dtype), block_size, "amax")
