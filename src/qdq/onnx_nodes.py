"""QuantizeLinear and DequantizeLinear as nodes of an ONNX graph in the making (`torch.onnx.ops.symbolic`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OPSET = 21
QUANTIZER_KEY = "qdq.quantizer"


def quantize_dequantize(
    x: Tensor,
    step_size: Tensor,
    zero_point: Tensor,
    *,
    axis: int | None = None,
    name: str | None = None,
    version: int | None = OPSET,
    limits: tuple[int, int] | None = None,
) -> Tensor:
    """x through QuantizeLinear and DequantizeLinear; the dtype of `zero_point` is that of the codes.

    Args:
        axis: where step size and zero point are per channel.
        name: of the quantizer, kept with the nodes.
        version: of the operator set; None leaves it to the exporter.
        limits: least and largest code, where the dtype holds more: a Clip of the codes, between the two.
    """
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    metadata = {} if name is None else {QUANTIZER_KEY: name}
    shape = x.shape
    nodes: list[tuple[str, tuple[Tensor, ...], dict[str, Any], torch.dtype]] = [
        ("QuantizeLinear", (step_size, zero_point), attributes, zero_point.dtype),
        ("DequantizeLinear", (step_size, zero_point), attributes, torch.float32),
    ]
    if limits is not None:
        bounds = tuple(torch.full((), bound, dtype=zero_point.dtype) for bound in limits)
        nodes.insert(1, ("Clip", bounds, {}, zero_point.dtype))
    for position, (operation, operands, given, dtype) in enumerate(nodes):
        x = torch.onnx.ops.symbolic(
            operation,
            (x, *operands),
            given,
            dtype=dtype,
            shape=shape,
            version=version,
            # With a Clip it is the Clip that gives the quantizer's codes.
            metadata_props=metadata if position or limits is None else {},
        )
    return x


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
