"""Checks of tensor values at the door.

On a CPU a bad value raises at once. While PyTorch traces, compiles or exports there is no value to read, so nothing is
checked. On CUDA the check is an asynchronous assert, so that no call waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats import IntFormat
from .reference import TINY_AMAX, compute_dtype, symmetric_scale

# What the compiled kernels say too, as they read every value anyway.
NEGATIVE_AMAX = "Negative values in amax: it is the largest absolute value, so it must be 0 or positive"
NEGATIVE_INPUT = "Negative values encountered in unsigned quantization: use a signed format or clip the inputs at 0"
STEP_SIZE_NOT_POSITIVE = "step_size must be positive; qdq.kernels.reference.affine_parameters computes one from a range"
UNORDERED_RANGE = "min_range must not exceed max_range"


def is_tracing() -> bool:
    """True while TorchScript traces."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]  # documented as torch.jit's


def unreadable(tensor: Tensor) -> bool:
    """True where reading a value of ``tensor`` would stop a trace or fail."""
    return torch.compiler.is_compiling() or is_tracing() or tensor.device.type == "meta"


def _refuse_if(bad: Callable[[], Tensor], device: torch.device, message: str, error: Callable[[], Exception]) -> None:
    """Raise ``error()`` where any element of ``bad()`` is true; asynchronously outside the CPU."""
    found = bad().any()
    if device.type != "cpu":
        # PyTorch has no public asynchronous assert, and not every device has this one: without it, nothing is checked.
        assert_async = getattr(torch.ops.aten, "_assert_async", None)
        if assert_async is not None and device.type == "cuda":
            assert_async.msg(torch.logical_not(found), message)
        return
    try:
        failed = bool(found)
    except RuntimeError:  # a fake tensor or one wrapped by torch.func: it has no value
        return
    if failed:
        raise error()


def check_amax(amax: Tensor) -> None:
    """Raises ``ValueError`` where any amax is negative. NaN passes: it marks its values."""
    if not unreadable(amax):
        _refuse_if(lambda: amax < 0, amax.device, NEGATIVE_AMAX, lambda: ValueError(NEGATIVE_AMAX))


def check_unsigned(inputs: Tensor) -> None:
    """Raises ``TypeError`` where an input of unsigned quantization is negative."""
    if not unreadable(inputs):
        _refuse_if(lambda: inputs < 0, inputs.device, NEGATIVE_INPUT, lambda: TypeError(NEGATIVE_INPUT))


def check_float16_scale(amax: Tensor, fmt: IntFormat) -> None:
    """Raises ``ValueError`` where ``bound / amax`` overflows float16."""
    if unreadable(amax):
        return
    wide = amax.to(compute_dtype(amax.dtype))

    def error() -> Exception:
        smallest = wide[wide > TINY_AMAX].min().item()
        return ValueError(
            f"scale is too large for FP16 with amax={smallest:.6g}: use float32 inputs or fake quantization"
        )

    limit = torch.finfo(torch.float16).max
    _refuse_if(lambda: symmetric_scale(wide, fmt.bound) > limit, amax.device, "scale is too large for FP16", error)


def check_step_size(step_size: Tensor) -> None:
    """Raises ``ValueError`` where a step size is 0 or negative. NaN passes: it marks its values."""
    if not unreadable(step_size):
        _refuse_if(
            lambda: step_size <= 0, step_size.device, STEP_SIZE_NOT_POSITIVE, lambda: ValueError(STEP_SIZE_NOT_POSITIVE)
        )


def check_range(min_range: Tensor, max_range: Tensor) -> None:
    """Raises ``ValueError`` where ``min_range`` exceeds ``max_range``."""
    if not unreadable(min_range) and not unreadable(max_range):
        _refuse_if(
            lambda: min_range > max_range, min_range.device, UNORDERED_RANGE, lambda: ValueError(UNORDERED_RANGE)
        )
