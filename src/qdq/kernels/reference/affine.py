"""Affine quantization: a step size and a zero point, as ONNX defines them, or a range, as the toolkit published it."""

from __future__ import annotations

import torch
from torch import Tensor

from .broadcasting import check_broadcast, compute_dtype, expand_blocks


def affine_quantize(
    inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int, block_size: int | None = None
) -> Tensor:
    """``clamp(round_half_to_even(inputs / step_size) + zero_point, lo, hi)``: ONNX's QuantizeLinear.

    ``step_size`` (positive) and ``zero_point`` (integer values, any dtype) broadcast to ``inputs``; with
    ``block_size`` they hold one value per block along the last axis.

    Returns:
        The codes in the compute dtype (float32, or float64 for float64 inputs), so that up to 24 bits are exact.

    Raises:
        ValueError: a parameter that does not broadcast.
        TypeError: inputs of another dtype than float16, bfloat16, float32, float64.
    """
    dtype = compute_dtype(inputs.dtype)
    step = expand_blocks(inputs, step_size.to(dtype), block_size, "step_size")
    zero = expand_blocks(inputs, zero_point.to(dtype), block_size, "zero_point")
    return torch.clamp(torch.round_(inputs.to(dtype) / step).add_(zero), lo, hi)


def affine_dequantize(codes: Tensor, step_size: Tensor, zero_point: Tensor, block_size: int | None = None) -> Tensor:
    """``(codes - zero_point) * step_size``: ONNX's DequantizeLinear. ``codes`` may be of any integer or float dtype.

    Returns:
        Values in float32, or float64 where ``step_size`` or ``codes`` is.
    """
    dtype = torch.float64 if torch.float64 in (step_size.dtype, codes.dtype) else torch.float32
    step = expand_blocks(codes, step_size.to(dtype), block_size, "step_size")
    zero = expand_blocks(codes, zero_point.to(dtype), block_size, "zero_point")
    return (codes.to(dtype) - zero).mul_(step)


def affine_fake_quantize(
    inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int, block_size: int | None = None
) -> Tensor:
    """:func:`affine_quantize` followed by :func:`affine_dequantize`, in the dtype of ``inputs``."""
    dtype = compute_dtype(inputs.dtype)
    step = expand_blocks(inputs, step_size.to(dtype), block_size, "step_size")
    zero = expand_blocks(inputs, zero_point.to(dtype), block_size, "zero_point")
    codes = torch.clamp(torch.round_(inputs.to(dtype) / step).add_(zero), lo, hi)
    return codes.sub_(zero).mul_(step).to(inputs.dtype)


def affine_mask(
    inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int, block_size: int | None = None
) -> Tensor:
    """True where ``inputs`` lies in the representable range ``[(lo - zero_point) * step_size, (hi - ...) * ...]``."""
    dtype = compute_dtype(inputs.dtype)
    step = expand_blocks(inputs, step_size.to(dtype), block_size, "step_size")
    zero = expand_blocks(inputs, zero_point.to(dtype), block_size, "zero_point")
    x = inputs.to(dtype)
    return (x >= (lo - zero) * step) & (x <= (hi - zero) * step)


def affine_parameters(amin: Tensor, amax: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """Step size (float32) and zero point (int32) that map ``[amin, amax]``, extended to contain 0, to ``[lo, hi]``.

    ``step_size = (amax - amin) / (hi - lo)``, computed in float64 and rounded to float32;
    ``zero_point = clamp(round(lo - amin / step_size), lo, hi)``, so that 0 is represented exactly.
    A range too narrow for a normal float32 step (a zero-width one among them) gets step size 1.
    A range that holds NaN or infinity gives a step size that is not finite.
    """
    low = torch.clamp(amin.to(torch.float64), max=0.0)
    high = torch.clamp(amax.to(torch.float64), min=0.0)
    step_size = ((high - low) / float(hi - lo)).to(torch.float32)
    step_size = torch.where(step_size < torch.finfo(torch.float32).tiny, 1.0, step_size)
    zero_point = torch.clamp(torch.round(lo - low / step_size.to(torch.float64)), lo, hi)
    return step_size, torch.nan_to_num(zero_point, nan=lo).to(torch.int32)


def range_fake_quantize(inputs: Tensor, min_range: Tensor, max_range: Tensor, num_bits: int) -> Tensor:
    """Fake quantization over ``[min_range, max_range]`` as the published ``fake_affine_tensor_quant`` defines it.

    With b bits: ``step = (max_range - min_range) / (2**b - 1)``, ``zero = round(min_range / step) + 2**(b - 1)``,
    ``codes = clamp(round(x / step) - zero, -2**(b - 1), 2**(b - 1) - 1)``, result ``(codes + zero) * step``.
    A zero-width range has one value, ``min_range``.
    """
    dtype = compute_dtype(inputs.dtype)
    x = inputs.to(dtype)
    low = check_broadcast(inputs, min_range.to(dtype), "min_range")
    high = check_broadcast(inputs, max_range.to(dtype), "max_range")
    half = 2.0 ** (num_bits - 1)
    width = high - low
    step = width / torch.full_like(width, 2.0**num_bits - 1)
    step = torch.where(width == 0, 1.0, step)
    zero = torch.round(low / step) + half
    outputs = torch.clamp(torch.round_(x / step).sub_(zero), -half, half - 1).add_(zero).mul_(step)
    # NaN inputs stay NaN in both branches: low + 0 * NaN.
    outputs = torch.where(width == 0, low + torch.clamp(x, 0.0, 0.0), outputs)
    return outputs.to(inputs.dtype)


def range_mask(inputs: Tensor, min_range: Tensor, max_range: Tensor) -> Tensor:
    """True where ``min_range <= inputs <= max_range``."""
    dtype = compute_dtype(inputs.dtype)
    x = inputs.to(dtype)
    low = check_broadcast(inputs, min_range.to(dtype), "min_range")
    high = check_broadcast(inputs, max_range.to(dtype), "max_range")
    return (x >= low) & (x <= high)
