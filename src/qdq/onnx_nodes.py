"""QuantizeLinear and DequantizeLinear as nodes of an ONNX graph in the making (`torch.onnx.ops.symbolic`)."""

from __future__ import annotations

import torch
from torch import Tensor

OPSET = 21
QUANTIZER_KEY = "qdq.quantizer"


def quantize_dequantize(x: Tensor, step_size: Tensor, zero_point: Tensor, name: str) -> Tensor:
    """x through QuantizeLinear and DequantizeLinear; the dtype of `zero_point` is that of the codes."""
    codes = torch.onnx.ops.symbolic(
        "QuantizeLinear",
        (x, step_size, zero_point),
        {},
        dtype=zero_point.dtype,
        shape=x.shape,
        version=OPSET,
        metadata_props={QUANTIZER_KEY: name},
    )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, step_size, zero_point),
        {},
        dtype=torch.float32,
        shape=x.shape,
        version=OPSET,
        metadata_props={QUANTIZER_KEY: name},
    )


def dequantize(codes: Tensor, step_size: Tensor, zero_point: Tensor, axis: int | None, name: str) -> Tensor:
    """Constant codes through DequantizeLinear; `axis` where the step size is per channel."""
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, step_size, zero_point),
        {} if axis is None else {"axis": axis},
        dtype=torch.float32,
        shape=codes.shape,
        version=OPSET,
        metadata_props={QUANTIZER_KEY: name},
    )
