"""The ``symbolic`` of the published functions: their ONNX nodes for ``torch.onnx.export(..., dynamo=False)``.

`g` is the exporter's graph, and tensors are its values (`torch.onnx` documents both; they have no public type). Where
amax is a constant, so are scale and zero point; an amax that the model computes gives nodes that divide it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .onnx_form import channel_axis, largest_code, require, step_size

# TensorProto.DataType of ONNX.
_FLOAT = 1
_ONNX_TYPES = {"Half": 10, "BFloat16": 16, "Double": 11}


def fake_quantize(
    g: Any, inputs: Any, amax: Any, num_bits: int | tuple[int, int], unsigned: bool, narrow_range: bool
) -> Any:
    """What :func:`qdq.onnx_form.fake_quantize_as_onnx` gives, in the older exporter's graph.

    Raises:
        AssertionError: as there; an operator set without the operator or without its `axis`.
    """
    step, zero_point, attributes = _parameters(g, inputs, amax, num_bits, unsigned, narrow_range)
    x, e4m3 = _cast(g, inputs, _FLOAT), isinstance(num_bits, tuple)
    for name in ("QuantizeLinear", "DequantizeLinear"):
        if e4m3:
            x = g.op(f"trt::TRT_FP8{name}", x, step)
        else:
            x = g.op(name, x, step, zero_point, **attributes)
    x.setType(inputs.type().with_dtype(torch.float32))
    return _cast_back(g, x, inputs)


def quantize(g: Any, inputs: Any, amax: Any, num_bits: int, unsigned: bool, narrow_range: bool) -> tuple[Any, Any]:
    """Codes as floats, and ``bound / amax``: what `tensor_quant` returns.

    Raises:
        AssertionError: as :func:`fake_quantize`.
    """
    step, zero_point, attributes = _parameters(g, inputs, amax, num_bits, unsigned, narrow_range)
    codes = g.op("QuantizeLinear", _cast(g, inputs, _FLOAT), step, zero_point, **attributes)
    codes = g.op("Cast", codes, to_i=_FLOAT)
    codes.setType(inputs.type().with_dtype(torch.float32))
    value = _constant_of(amax)
    if value is None:
        scale = g.op("Div", _constant(g, torch.tensor(1.0)), step)
    else:
        bound = largest_code(num_bits, unsigned)
        wide = value.to(torch.float32)
        scale = _constant(g, torch.where(wide == 0, 1.0, torch.full_like(wide, bound) / wide))
    scale.setType(amax.type().with_dtype(torch.float32))
    return _cast_back(g, codes, inputs), _cast_back(g, scale, inputs)


def _parameters(
    g: Any, inputs: Any, amax: Any, num_bits: int | tuple[int, int], unsigned: bool, narrow_range: bool
) -> tuple[Any, Any, dict[str, int]]:
    """Scale, zero point and attributes of the two nodes."""
    sizes = [] if amax is None else amax.type().sizes()
    require(sizes is not None, "amax must have a known shape to be exported to ONNX")
    rank = inputs.type().dim()
    rank = len(sizes) if rank is None else rank
    axis = channel_axis(rank, sizes, num_bits, unsigned, narrow_range)
    require(g.opset >= 10, f"ONNX has QuantizeLinear from opset 10 on, asked for {g.opset}")
    require(axis is None or g.opset >= 13, f"ONNX has one amax per channel from opset 13 on, asked for {g.opset}")
    bound, shape = largest_code(num_bits, unsigned), [] if axis is None else [-1]
    value = torch.tensor(bound) if amax is None else _constant_of(amax)
    if value is not None:
        step = _constant(g, step_size(value.reshape(shape), bound))
    else:
        flat = g.op("Reshape", _cast(g, amax, _FLOAT), _constant(g, torch.tensor(shape, dtype=torch.int64)))
        divided = g.op("Div", flat, _constant(g, torch.tensor(float(bound))))
        is_zero = g.op("Equal", flat, _constant(g, torch.tensor(0.0)))
        step = g.op("Where", is_zero, _constant(g, torch.tensor(1.0)), divided)
    channels = [] if axis is None else [max(sizes)]
    zero_point = _constant(g, torch.zeros(channels, dtype=torch.uint8 if unsigned else torch.int8))
    return step, zero_point, {} if axis is None else {"axis_i": axis}


def _constant(g: Any, value: Tensor) -> Any:
    return g.op("Constant", value_t=value)


def _constant_of(value: Any) -> Tensor | None:
    node = value.node()
    return node.t("value") if node.kind() == "onnx::Constant" and node.hasAttribute("value") else None


def _cast(g: Any, value: Any, to: int) -> Any:
    return value if value.type().scalarType() == "Float" else g.op("Cast", value, to_i=to)


def _cast_back(g: Any, value: Any, like: Any) -> Any:
    to = _ONNX_TYPES.get(like.type().scalarType())
    if to is None:
        return value
    value = g.op("Cast", value, to_i=to)
    value.setType(like.type())
    return value
