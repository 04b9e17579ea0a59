"""What a quantizer becomes in ONNX: QuantizeLinear and DequantizeLinear, written while ``torch.onnx.export`` runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import E4M3
from .onnx_nodes import quantize_dequantize


def fake_quantize_as_onnx(
    inputs: Tensor, amax: Tensor, num_bits: int | tuple[int, int], unsigned: bool, narrow_range: bool
) -> Tensor:
    """One QuantizeLinear and one DequantizeLinear for ``inputs``; 16-bit inputs are cast to float32 and back.

    ONNX's scale is ``amax / 127`` (255 unsigned), 1 where amax is 0; the zero point is 0. E4M3 becomes TensorRT's
    ``TRT_FP8QuantizeLinear`` and ``TRT_FP8DequantizeLinear``, with one scale ``amax / 448``.

    Raises:
        AssertionError: no such form exists: a width other than 8 bits or E4M3, a signed narrow range, amax over
            several axes, E4M3 with more than one amax.
    """
    wide, amax = inputs.to(torch.float32), amax.to(torch.float32)
    axis = _channel_axis(inputs, amax)
    if isinstance(num_bits, tuple):
        require(num_bits == (4, 3), f"only E4M3 can be exported to ONNX, got num_bits={num_bits}")
        require(axis is None, "E4M3 can only be exported to ONNX with one amax per tensor")
        return _tensorrt_e4m3(wide, _step(amax.reshape(()), E4M3.max_value)).to(inputs.dtype)
    require(num_bits == 8, f"only 8 bits can be exported to ONNX, got num_bits={num_bits}")
    message = "a signed narrow range cannot be exported to ONNX: its codes start at -128"
    require(unsigned or not narrow_range, message)
    step = _step(amax.reshape(()) if axis is None else amax.reshape(-1), 255 if unsigned else 127)
    zero_point = torch.zeros_like(step, dtype=torch.uint8 if unsigned else torch.int8)
    return quantize_dequantize(wide, step, zero_point, axis=axis, version=None).to(inputs.dtype)


def _tensorrt_e4m3(x: Tensor, step_size: Tensor) -> Tensor:
    for name, dtype in (("TRT_FP8QuantizeLinear", torch.uint8), ("TRT_FP8DequantizeLinear", torch.float32)):
        x = torch.onnx.ops.symbolic(f"trt::{name}", (x, step_size), {}, dtype=dtype, shape=x.shape, version=None)
    return x


def _step(amax: Tensor, bound: float) -> Tensor:
    return torch.where(amax == 0, 1.0, amax / bound)


def _channel_axis(inputs: Tensor, amax: Tensor) -> int | None:
    if amax.numel() == 1:
        return None
    axes = [inputs.dim() - amax.dim() + i for i, size in enumerate(amax.shape) if size != 1]
    require(len(axes) == 1, f"amax of shape {tuple(amax.shape)} spans several axes: ONNX takes one")
    return axes[0]


def require(condition: bool, message: str) -> None:
    """Raises ``AssertionError(message)`` unless ``condition``; unlike ``assert``, also under ``python -O``."""
    if not condition:
        raise AssertionError(message)
