"""The definition of every quantization operation, in plain PyTorch.

No branch depends on tensor values, so all of it can be traced: ``torch.compile(fullgraph=True)``, ``torch.export``,
meta tensors. Inputs of 16 bits are computed in float32 and cast once at the end; float64 stays float64. NaN inputs
stay NaN. Nothing here reads or checks values: :mod:`qdq.functional` does.
"""

from __future__ import annotations

from .affine import (
    affine_dequantize,
    affine_fake_quantize,
    affine_mask,
    affine_parameters,
    affine_quantize,
    range_fake_quantize,
    range_mask,
)
from .broadcasting import check_broadcast, compute_dtype, expand_blocks
from .float_formats import round_to_e8m0, round_to_float_format, scaled_float_fake_quantize
from .gradients import affine_gradient, clip_gradient, range_gradient, symmetric_gradient
from .histogram import abs_histogram, bin_index, comparable, histogram
from .integer_arithmetic import add_codes, add_constants, fma, requantize
from .statistics import absmax, minmax
from .symmetric import TINY_AMAX, symmetric_fake_quantize, symmetric_mask, symmetric_quantize, symmetric_scale

# Nothing here reads values or writes to memory that is given: see :mod:`qdq.kernels.cpu`.
REFUSES_BAD_VALUES = False
IN_PLACE = False

__all__ = [
    "IN_PLACE",
    "REFUSES_BAD_VALUES",
    "TINY_AMAX",
    "abs_histogram",
    "absmax",
    "add_codes",
    "add_constants",
    "affine_dequantize",
    "affine_fake_quantize",
    "affine_gradient",
    "affine_mask",
    "affine_parameters",
    "affine_quantize",
    "bin_index",
    "check_broadcast",
    "clip_gradient",
    "comparable",
    "compute_dtype",
    "expand_blocks",
    "fma",
    "histogram",
    "minmax",
    "range_fake_quantize",
    "range_gradient",
    "range_mask",
    "requantize",
    "round_to_e8m0",
    "round_to_float_format",
    "scaled_float_fake_quantize",
    "symmetric_fake_quantize",
    "symmetric_gradient",
    "symmetric_mask",
    "symmetric_quantize",
    "symmetric_scale",
]
