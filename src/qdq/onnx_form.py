"""What a quantizer becomes in ONNX, and what has no such form; written while ``torch.onnx.export`` runs.

Here for the exporter of today (``dynamo=True``); :mod:`qdq.onnx_torchscript` writes the same for the older one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .formats import E4M3
from .kernels.checks import is_tracing
from .onnx_nodes import quantize_dequantize

E4M3_BITS = (E4M3.exponent_bits, E4M3.mantissa_bits)


def exports_to_onnx() -> bool:
    """True while ``torch.onnx.export`` runs the model, with either exporter."""
    # In this order: the last question costs as much as a small kernel.
    return (torch.compiler.is_exporting() or is_tracing()) and torch.onnx.is_in_onnx_export()


@contextlib.contextmanager
def reading_sizes() -> Iterator[None]:
    """The older exporter traces, and warns where a size decides something. That of an amax may: it is a constant."""
    with warnings.catch_warnings():
        # Documented as torch.jit's.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # pyright: ignore[reportPrivateImportUsage]
        yield


def sizes_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape as numbers, also while the older exporter traces."""
    if not is_tracing():
        return tuple(tensor.shape)
    with reading_sizes():
        return tuple(int(size) for size in tensor.shape)


def channel_axis(
    rank: int, amax_shape: Sequence[int], num_bits: int | tuple[int, int], unsigned: bool, narrow_range: bool
) -> int | None:
    """The axis of a tensor of ``rank`` dimensions that has one amax per channel; None where it has one amax.

    Raises:
        AssertionError: ONNX has no form for the quantizer: a width other than 8 bits or E4M3, a signed narrow range,
            amax over several axes, E4M3 with more than one amax.
    """
    axes = [rank - len(amax_shape) + i for i, size in enumerate(amax_shape) if size != 1]
    require(len(axes) <= 1, f"amax of shape {tuple(amax_shape)} spans several axes: ONNX takes one")
    if isinstance(num_bits, tuple):
        require(num_bits == E4M3_BITS, f"only E4M3 can be exported to ONNX, got num_bits={num_bits}")
        require(not axes, "E4M3 can only be exported to ONNX with one amax per tensor")
    else:
        require(num_bits == 8, f"only 8 bits can be exported to ONNX, got num_bits={num_bits}")
        message = "a signed narrow range cannot be exported to ONNX, whose codes start at -128: set narrow_range=False"
        require(unsigned or not narrow_range, message)
    return axes[0] if axes else None


def largest_code(num_bits: int | tuple[int, int], unsigned: bool) -> float:
    """What amax is divided by to give ONNX's scale."""
    return E4M3.max_value if isinstance(num_bits, tuple) else 255 if unsigned else 127


def step_size(amax: Tensor, bound: float) -> Tensor:
    """ONNX's scale: ``amax / bound``, 1 where amax is 0; float32."""
    amax = amax.to(torch.float32)
    return torch.where(amax == 0, 1.0, amax / torch.full_like(amax, bound))


def fake_quantize_as_onnx(
    inputs: Tensor, amax: Tensor, num_bits: int | tuple[int, int], unsigned: bool, narrow_range: bool
) -> Tensor:
    """One QuantizeLinear and one DequantizeLinear for ``inputs``; other dtypes are cast to float32 and back.

    ONNX's scale is ``amax / 127`` (255 unsigned), 1 where amax is 0; the zero point is 0. E4M3 becomes TensorRT's
    ``TRT_FP8QuantizeLinear`` and ``TRT_FP8DequantizeLinear``, with one scale ``amax / 448``.

    Raises:
        AssertionError: as :func:`channel_axis`.
    """
    axis = channel_axis(inputs.dim(), amax.shape, num_bits, unsigned, narrow_range)
    step = step_size(amax.reshape(() if axis is None else (-1,)), largest_code(num_bits, unsigned))
    wide = inputs.to(torch.float32)
    if isinstance(num_bits, tuple):
        return _tensorrt_e4m3(wide, step).to(inputs.dtype)
    zero_point = torch.zeros_like(step, dtype=torch.uint8 if unsigned else torch.int8)
    return quantize_dequantize(wide, step, zero_point, axis=axis, version=None).to(inputs.dtype)


def _tensorrt_e4m3(x: Tensor, step: Tensor) -> Tensor:
    for name, dtype in (("TRT_FP8QuantizeLinear", torch.uint8), ("TRT_FP8DequantizeLinear", torch.float32)):
        x = torch.onnx.ops.symbolic(f"trt::{name}", (x, step), {}, dtype=dtype, shape=x.shape, version=None)
    return x


def require(condition: bool, message: str) -> None:
    """Raises ``AssertionError(message)`` unless ``condition``; unlike ``assert``, also under ``python -O``."""
    if not condition:
        raise AssertionError(message)
