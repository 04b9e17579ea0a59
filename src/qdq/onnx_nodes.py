"""QuantizeLinear and DequantizeLinear as nodes of an ONNX graph in the making (`torch.onnx.ops.symbolic`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OPSET = 21
QUANTIZER_KEY = "qdq.quantizer"
# Marks, until the file is written, DequantizeLinear nodes whose codes are stored as INT4.
INT4_KEY = "qdq.int4"


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


def dequantize(
    codes: Tensor,
    step_size: Tensor,
    zero_point: Tensor | None,
    axis: int | None,
    name: str,
    *,
    block_size: int | None = None,
    stored_bits: int = 8,
) -> Tensor:
    """Constant codes through DequantizeLinear.

    Args:
        zero_point: None is 0.
        axis: where the step size is per channel; with `block_size`, the axis that is cut into blocks.
        name: of the quantizer, kept with the node.
        block_size: so many codes along `axis` share a step size.
        stored_bits: 4 marks the node: whoever writes the file stores its codes as INT4.
    """
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    if block_size is not None:
        attributes["block_size"] = block_size
    marks = {QUANTIZER_KEY: name}
    if stored_bits == 4:
        marks[INT4_KEY] = "yes"
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, step_size) if zero_point is None else (codes, step_size, zero_point),
        attributes,
        dtype=torch.float32,
        shape=codes.shape,
        version=OPSET,
        metadata_props=marks,
    )


def matmul_nbits(x: Tensor, packed: Tensor, step_size: Tensor, name: str, **attributes: Any) -> Tensor:
    """x times a packed weight, through MatMulNBits of com.microsoft.

    Args:
        x: float32, [..., K].
        packed: uint8 codes with zero point 2**(bits - 1), [N, blocks, bytes of a block].
        step_size: [N * blocks].
        name: of the weight's quantizer.
        attributes: of the operator: K, N, bits, block_size, accuracy_level.
    """
    return torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits",
        (x, packed, step_size),
        attributes,
        dtype=torch.float32,
        shape=(*x.shape[:-1], attributes["N"]),
        version=1,
        metadata_props={QUANTIZER_KEY: name},
    )
