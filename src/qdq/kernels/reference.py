"""The definition of every quantization operation, in plain PyTorch.

No branch depends on tensor values, so all of it can be traced: ``torch.compile(fullgraph=True)``, ``torch.export``,
meta tensors. Inputs of 16 bits are computed in float32 and cast once at the end; float64 stays float64. NaN inputs
stay NaN. Nothing here reads or checks values: :mod:`qdq.functional` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import FloatFormat, IntFormat

# An amax at or below this counts as zero: it is the smallest subnormal number of float16.
TINY_AMAX = 2.0**-24

_COMPUTE_DTYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that inputs of ``dtype`` are computed in.

    Raises:
        TypeError: ``dtype`` is none of float16, bfloat16, float32, float64.
    """
    try:
        return _COMPUTE_DTYPES[dtype]
    except KeyError:
        raise TypeError(
            f"inputs must be float16, bfloat16, float32 or float64 to be quantized, got {dtype}; convert them first"
        ) from None


def check_broadcast(inputs: Tensor, parameter: Tensor, name: str) -> Tensor:
    """``parameter``, ready to broadcast to ``inputs`` (a single value of any rank becomes 0-d).

    Raises:
        ValueError: it does not broadcast to the shape of ``inputs``.
    """
    if parameter.dim() > inputs.dim() and parameter.numel() == 1:
        return parameter.reshape(())
    fits = parameter.dim() <= inputs.dim()
    if fits and parameter.dim() > 0:
        sizes = inputs.shape[inputs.dim() - parameter.dim() :]
        fits = all(have == 1 or have == want for have, want in zip(parameter.shape, sizes, strict=True))
    if not fits:
        raise ValueError(
            f"{name} of shape {tuple(parameter.shape)} does not broadcast to inputs of shape {tuple(inputs.shape)}"
        )
    return parameter


def symmetric_scale(amax: Tensor, bound: int) -> Tensor:
    """``bound / amax``, in the dtype of ``amax``; 1 where amax counts as zero, NaN where it is NaN or infinite."""
    if bound <= 0:
        return torch.ones_like(amax)
    tiny = amax <= TINY_AMAX
    # A number divided by a tensor is computed as a reciprocal and a product, one ulp off.
    scale = torch.full_like(amax, bound) / torch.where(tiny, 1.0, amax)
    scale = torch.where(torch.isinf(amax), torch.nan, scale)
    return torch.where(tiny, 1.0, scale)


def symmetric_quantize(inputs: Tensor, amax: Tensor, fmt: IntFormat) -> tuple[Tensor, Tensor]:
    """``codes = clamp(round_half_to_even(inputs * scale), lo, hi)`` with ``scale = bound / amax``.

    Returns:
        The codes and the scale, both in the dtype of ``inputs``; the scale has the shape of ``amax``.
    """
    dtype = compute_dtype(inputs.dtype)
    x, wide = inputs.to(dtype), amax.to(dtype)
    scale = symmetric_scale(wide, fmt.bound)
    if fmt.degenerate:
        codes = torch.clamp(x, 0.0, 0.0)
    else:
        fitted, per_value = check_broadcast(x, wide, "amax"), check_broadcast(x, scale, "amax")
        codes = torch.clamp(torch.round_(x * per_value), fmt.lo, fmt.hi)
        # After clamping the codes are finite or NaN, so that the product with 0 is 0 and NaN stays.
        codes.mul_(torch.where(fitted <= TINY_AMAX, 0.0, torch.where(torch.isinf(fitted), torch.nan, 1.0)).to(dtype))
    return codes.to(inputs.dtype), scale.to(inputs.dtype)


def symmetric_fake_quantize(inputs: Tensor, amax: Tensor, fmt: IntFormat) -> Tensor:
    """Quantize and dequantize: the codes of :func:`symmetric_quantize` divided by the scale, in the input's dtype."""
    dtype = compute_dtype(inputs.dtype)
    x, wide = inputs.to(dtype), amax.to(dtype)
    if fmt.degenerate:
        return torch.clamp(x, 0.0, 0.0).to(inputs.dtype)
    wide = check_broadcast(x, wide, "amax")
    scale = symmetric_scale(wide, fmt.bound)
    # A code over infinity is 0, and NaN stays NaN: what a zero amax asks for, without a further pass.
    divisor = torch.where(wide <= TINY_AMAX, torch.inf, scale)
    return torch.clamp(torch.round_(x * scale), fmt.lo, fmt.hi).div_(divisor).to(inputs.dtype)


def symmetric_mask(inputs: Tensor, amax: Tensor) -> Tensor:
    """True where ``|inputs| <= amax``: where the straight-through gradient passes."""
    dtype = compute_dtype(inputs.dtype)
    return inputs.to(dtype).abs() <= check_broadcast(inputs, amax.to(dtype), "amax")


def affine_quantize(inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int) -> Tensor:
    """``clamp(round_half_to_even(inputs / step_size) + zero_point, lo, hi)``: ONNX's QuantizeLinear.

    ``step_size`` (positive) and ``zero_point`` (integer values, any dtype) broadcast to ``inputs``.

    Returns:
        The codes in the compute dtype (float32, or float64 for float64 inputs), so that up to 24 bits are exact.
    """
    dtype = compute_dtype(inputs.dtype)
    step = check_broadcast(inputs, step_size.to(dtype), "step_size")
    zero = check_broadcast(inputs, zero_point.to(dtype), "zero_point")
    return torch.clamp(torch.round_(inputs.to(dtype) / step).add_(zero), lo, hi)


def affine_dequantize(codes: Tensor, step_size: Tensor, zero_point: Tensor) -> Tensor:
    """``(codes - zero_point) * step_size``: ONNX's DequantizeLinear. ``codes`` may be of any integer or float dtype.

    Returns:
        Values in float32, or float64 where ``step_size`` or ``codes`` is.
    """
    dtype = torch.float64 if torch.float64 in (step_size.dtype, codes.dtype) else torch.float32
    step = check_broadcast(codes, step_size.to(dtype), "step_size")
    zero = check_broadcast(codes, zero_point.to(dtype), "zero_point")
    return (codes.to(dtype) - zero).mul_(step)


def affine_fake_quantize(inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int) -> Tensor:
    """:func:`affine_quantize` followed by :func:`affine_dequantize`, in the dtype of ``inputs``."""
    dtype = compute_dtype(inputs.dtype)
    step = check_broadcast(inputs, step_size.to(dtype), "step_size")
    zero = check_broadcast(inputs, zero_point.to(dtype), "zero_point")
    codes = torch.clamp(torch.round_(inputs.to(dtype) / step).add_(zero), lo, hi)
    return codes.sub_(zero).mul_(step).to(inputs.dtype)


def affine_mask(inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int) -> Tensor:
    """True where ``inputs`` lies in the representable range ``[(lo - zero_point) * step_size, (hi - ...) * ...]``."""
    dtype = compute_dtype(inputs.dtype)
    step = check_broadcast(inputs, step_size.to(dtype), "step_size")
    zero = check_broadcast(inputs, zero_point.to(dtype), "zero_point")
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


def round_to_float_format(x: Tensor, fmt: FloatFormat) -> Tensor:
    """``x`` (float32 or float64) rounded half to even to the values of ``fmt``, saturating at its largest."""
    magnitude = torch.clamp(x, -fmt.max_value, fmt.max_value)
    exponent = torch.frexp(magnitude.detach()).exponent - 1  # floor(log2|x|); below the smallest normal, one spacing
    spacing = torch.clamp(exponent, min=fmt.min_exponent) - fmt.mantissa_bits
    quantum = torch.ldexp(torch.ones_like(x), spacing)
    return torch.round(magnitude / quantum) * quantum


def scaled_float_fake_quantize(inputs: Tensor, amax: Tensor | None, fmt: FloatFormat) -> Tensor:
    """Round to a small floating-point format, in the dtype of ``inputs``.

    With ``amax``, values are scaled by ``fmt.max_value / amax`` before and divided by it after; without, not at all.
    ``|inputs| < 2**-24`` gives 0, and so does an amax of at most ``2**-24``.
    """
    dtype = compute_dtype(inputs.dtype)
    x = inputs.to(dtype)
    if amax is None:
        outputs = round_to_float_format(x, fmt)
    else:
        wide = check_broadcast(x, amax.to(dtype), "amax")
        tiny = wide <= TINY_AMAX
        scale = torch.full_like(wide, fmt.max_value) / torch.where(tiny, 1.0, wide)
        scale = torch.where(torch.isinf(wide), torch.nan, scale)
        outputs = round_to_float_format(x * scale, fmt) / torch.where(tiny, torch.inf, scale)
    return torch.where(x.abs() < TINY_AMAX, torch.zeros_like(outputs), outputs).to(inputs.dtype)
