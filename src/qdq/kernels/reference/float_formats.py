"""Rounding to small floating-point formats and to the scales of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import E8M0, FloatFormat
from .broadcasting import compute_dtype, expand_blocks
from .symmetric import TINY_AMAX


def round_to_float_format(x: Tensor, fmt: FloatFormat) -> Tensor:
    """``x`` rounded half to even to the values of ``fmt``, saturating at its largest; infinity saturates too.

    Computed in one rounding from the value of ``x``; NaN stays NaN, and a zero or what rounds to it keeps its sign.

    Returns:
        Values in the dtype of ``x``: float32 or float64, or a 16-bit one, which is computed in float32 and cast once.

    Raises:
        TypeError: ``x`` has another dtype.
    """
    wide = x.to(compute_dtype(x.dtype))
    magnitude = torch.clamp(wide, -fmt.max_value, fmt.max_value)
    exponent = torch.frexp(magnitude.detach()).exponent - 1  # floor(log2|x|); below the smallest normal, one spacing
    spacing = torch.clamp(exponent, min=fmt.min_exponent) - fmt.mantissa_bits
    quantum = torch.ldexp(torch.ones_like(wide), spacing)
    return (torch.round(magnitude / quantum) * quantum).to(x.dtype)


def round_to_e8m0(x: Tensor) -> Tensor:
    """``x`` rounded to the nearest scale of E8M0, a power of two from ``2**-127`` to ``2**127``.

    Halfway between two powers, at 1.5 times the lower one, it rounds up; between ``2**-127`` and ``2**-126``
    everything does. What lies below ``2**-127`` gives ``2**-127``, zero too: the scale of a block of zeros. Negative
    values, NaN, and what rounds beyond ``2**127`` give NaN, the code 255.

    For float32 this is what the casts to `torch.float8_e8m0fnu` and to `ml_dtypes.float8_e8m0fnu` give, but that the
    first ignores a sign, and that the second gives NaN for zero. Source of the format: OCP Microscaling Formats (MX)
    1.0, which leaves the rounding open.

    Returns:
        Scales in the dtype of ``x``. 16 bits are computed in float32 and cast once: float16 holds only ``2**-24`` to
        ``2**15``, so smaller scales become 0 in it, larger ones infinity.

    Raises:
        TypeError: ``x`` is none of float16, bfloat16, float32, float64.
    """
    wide = x.to(compute_dtype(x.dtype))
    mantissa, exponent = torch.frexp(wide.detach())
    # The mantissa lies in [0.5, 1): the power of two below x is 2**(exponent - 1).
    exponent = torch.where(mantissa >= 0.75, exponent, exponent - 1)
    # What float32 holds as a subnormal number above the smallest scale goes up, as in the casts named above.
    exponent = torch.where((wide > E8M0.min_value) & (wide < 2 * E8M0.min_value), E8M0.min_exponent + 1, exponent)
    exponent = torch.where(wide == 0, E8M0.min_exponent, exponent)
    valid = (wide >= 0) & (wide < torch.inf) & (exponent <= E8M0.max_exponent)
    # In two steps, as 2**-127 is subnormal in float32.
    normal = torch.clamp(exponent, min=E8M0.min_exponent + 1, max=E8M0.max_exponent)
    scale = torch.ldexp(torch.ones_like(wide), normal) * torch.where(exponent < normal, 0.5, 1.0).to(wide.dtype)
    return torch.where(valid, scale, torch.nan).to(x.dtype)


def scaled_float_fake_quantize(
    inputs: Tensor, amax: Tensor | None, fmt: FloatFormat, block_size: int | None = None
) -> Tensor:
    """Round to a small floating-point format, in the dtype of ``inputs``.

    With ``amax``, values are scaled by ``fmt.max_value / amax`` before and divided by it after; without, not at all.
    It broadcasts to ``inputs``; with ``block_size`` it holds one value per block along the last axis.
    ``|inputs| < 2**-24`` gives 0, and so does an amax of at most ``2**-24``.

    Raises:
        ValueError: ``amax`` does not broadcast.
        TypeError: inputs of another dtype than float16, bfloat16, float32, float64.
    """
    dtype = compute_dtype(inputs.dtype)
    x = inputs.to(dtype)
    if amax is None:
        outputs = round_to_float_format(x, fmt)
    else:
        wide = expand_blocks(x, amax.to(dtype), block_size, "amax")
        tiny = wide <= TINY_AMAX
        scale = torch.full_like(wide, fmt.max_value) / torch.where(tiny, 1.0, wide)
        scale = torch.where(torch.isinf(wide), torch.nan, scale)
        outputs = round_to_float_format(x * scale, fmt) / torch.where(tiny, torch.inf, scale)
    return torch.where(x.abs() < TINY_AMAX, torch.zeros_like(outputs), outputs).to(inputs.dtype)
