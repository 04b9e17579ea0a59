"""The CUDA engine: the functions of :mod:`qdq.kernels.reference`, computed by Triton's kernels.

Each function reads its tensors once and writes its result once, in the order of memory. Results are those of the
reference on a CPU, bit for bit in float32 and float64; 16-bit inputs are computed in float32 and cast once. Sums of
gradients are computed in float64 in a fixed order. No function waits for the device, and none reads a value: bad ones
are for :mod:`qdq.kernels.checks`. Triton is imported, and a kernel compiled, at the first call.

The kernels are bound to Triton's interpreter where ``TRITON_INTERPRET=1`` was set before Triton was imported: then
they run on tensors of the CPU, very slowly, for tests.
"""

from __future__ import annotations

import importlib.util
import math
import os

import torch
from torch import Tensor

from ..formats import FloatFormat, IntFormat
from . import reference
from .layout import Layout, block_layout, broadcast_layout, is_dense, per_tensor
from .reference import compute_dtype, expand_blocks

# Simulated on the CPU as a rule: plain PyTorch is fast enough on a GPU.
add_codes, requantize = reference.add_codes, reference.requantize

# Reading a value would wait for the device: `checks` refuses bad ones asynchronously.
REFUSES_BAD_VALUES = False
IN_PLACE = False

# What Triton compiles for: older devices have no compiler for them in it.
_LEAST_CAPABILITY = (7, 5)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The last bin of a histogram of absolute values holds its upper end, with this slack for rounding.
_SLACK = 1 + 1e-12


def available() -> tuple[bool, str]:
    """Whether this engine can run here, and one sentence that says why."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed: it comes with PyTorch's builds for CUDA on Linux."
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        return True, "Triton's interpreter runs the kernels on the CPU, as TRITON_INTERPRET asks for."
    if not torch.cuda.is_available():
        return False, "PyTorch sees no CUDA device."
    capability = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        have, least = (".".join(map(str, version)) for version in (capability, _LEAST_CAPABILITY))
        return False, f"{name} has compute capability {have}, and Triton needs {least}."
    try:
        import triton  # pyright: ignore[reportMissingImports]  # optional
    except Exception as error:  # a broken installation raises anything
        return False, f"Triton cannot be imported: {error}."
    return True, f"Triton {triton.__version__} compiles the kernels for {name}."


def _dense(x: Tensor) -> Tensor:
    """``x``, or a copy of it where its elements do not fill memory without gaps or repetition."""
    x = x.detach()
    # Of a negative view (the imaginary part of a conjugate), memory holds the negated values.
    if not x.is_neg() and is_dense(x):
        return x
    return torch.empty_like(x).copy_(x)


def _as_rows(x: Tensor, block_size: int | None) -> Tensor:
    """Dense ``x``; contiguous where it is divided into blocks along the last axis."""
    x = _dense(x)
    return x if block_size is None else x.contiguous()


def _parameter(parameter: Tensor, like: Tensor) -> Tensor:
    """``parameter`` on the device of ``like``, with its values in memory."""
    return parameter.detach().to(like.device, non_blocking=True).resolve_neg()


def _placed(x: Tensor, names: str, block_size: int | None, *parameters: Tensor) -> tuple[Layout, list[Tensor]]:
    """The layout that dense ``x`` has with its parameters, and these in the order of memory."""
    moved = [_parameter(parameter, x) for parameter in parameters]
    if all(parameter.numel() == 1 for parameter in moved):
        return per_tensor(x.numel()), moved
    fitted = [expand_blocks(x, p, block_size, name) for p, name in zip(moved, names.split(), strict=True)]
    if block_size is None:
        shape = torch.broadcast_shapes(*(p.shape for p in fitted))
        placed = [broadcast_layout(x, p.expand(shape)) for p in fitted]
    else:
        placed = [block_layout(x, p, block_size) for p in moved]
    layout = max((layout for layout, _ in placed), key=lambda found: found.count)
    return layout, [p.reshape(-1).expand(layout.count).contiguous() if p.numel() == 1 else p for _, p in placed]


def _elementwise(
    op: str,
    inputs: Tensor,
    names: str,
    block_size: int | None,
    *parameters: Tensor,
    grad: Tensor | None = None,
    dtype: torch.dtype | None = None,
    lo: int = 0,
    hi: int = 0,
    fmt: FloatFormat | None = None,
) -> Tensor:
    """``op`` of all elements of ``inputs``, or with ``grad`` its gradient, in the strides of ``empty_like(inputs)``."""
    from .triton_elementwise import run_elementwise

    compute_dtype(inputs.dtype)
    x = _as_rows(inputs, block_size)
    out = torch.empty_like(x, dtype=dtype)
    if grad is not None:
        grad = grad.detach()
        out = torch.empty_like(x, dtype=grad.dtype)
        if grad.stride() != out.stride() or grad.is_neg():
            grad = torch.empty_like(out).copy_(grad)
    layout, (a, b) = per_tensor(x.numel()), (None, None)
    if parameters:
        layout, values = _placed(x, names, block_size, *parameters)
        a, b = values[0], values[-1]
    run_elementwise(op, x, out, layout, a, b, grad=grad, lo=lo, hi=hi, fmt=fmt)
    if x.stride() == inputs.stride() or block_size is None:
        return out
    return torch.empty_like(inputs, dtype=out.dtype).copy_(out)


def symmetric_quantize(
    inputs: Tensor, amax: Tensor, fmt: IntFormat, block_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`qdq.kernels.reference.symmetric_quantize`."""
    if fmt.degenerate:
        return reference.symmetric_quantize(inputs, _parameter(amax, inputs), fmt, block_size)
    codes = _elementwise("symmetric_codes", inputs, "amax", block_size, amax, lo=fmt.lo, hi=fmt.hi)
    wide = _parameter(amax, inputs).to(compute_dtype(inputs.dtype))
    return codes, _elementwise("scale", wide, "", None, dtype=inputs.dtype, hi=fmt.bound)


def symmetric_fake_quantize(inputs: Tensor, amax: Tensor, fmt: IntFormat, block_size: int | None = None) -> Tensor:
    """:func:`qdq.kernels.reference.symmetric_fake_quantize`."""
    if fmt.degenerate:
        return reference.symmetric_fake_quantize(inputs, _parameter(amax, inputs), fmt, block_size)
    return _elementwise("symmetric", inputs, "amax", block_size, amax, lo=fmt.lo, hi=fmt.hi)


def affine_quantize(
    inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int, block_size: int | None = None
) -> Tensor:
    """:func:`qdq.kernels.reference.affine_quantize`."""
    dtype = compute_dtype(inputs.dtype)
    names = "step_size zero_point"
    return _elementwise("affine_codes", inputs, names, block_size, step_size, zero_point, dtype=dtype, lo=lo, hi=hi)


def affine_fake_quantize(
    inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int, block_size: int | None = None
) -> Tensor:
    """:func:`qdq.kernels.reference.affine_fake_quantize`."""
    return _elementwise("affine", inputs, "step_size zero_point", block_size, step_size, zero_point, lo=lo, hi=hi)


def range_fake_quantize(inputs: Tensor, min_range: Tensor, max_range: Tensor, num_bits: int) -> Tensor:
    """:func:`qdq.kernels.reference.range_fake_quantize`."""
    if num_bits < 1:
        low, high = _parameter(min_range, inputs), _parameter(max_range, inputs)
        return reference.range_fake_quantize(inputs, low, high, num_bits)
    half = 2 ** (num_bits - 1)
    return _elementwise("range", inputs, "min_range max_range", None, min_range, max_range, lo=-half, hi=half - 1)


def round_to_float_format(x: Tensor, fmt: FloatFormat) -> Tensor:
    """:func:`qdq.kernels.reference.round_to_float_format`."""
    return _elementwise("float", x, "", None, fmt=fmt)


def round_to_e8m0(x: Tensor) -> Tensor:
    """:func:`qdq.kernels.reference.round_to_e8m0`."""
    return _elementwise("e8m0", x, "", None)


def scaled_float_fake_quantize(
    inputs: Tensor, amax: Tensor | None, fmt: FloatFormat, block_size: int | None = None
) -> Tensor:
    """:func:`qdq.kernels.reference.scaled_float_fake_quantize`."""
    if amax is None:
        return _elementwise("unscaled_float", inputs, "", None, fmt=fmt)
    return _elementwise("scaled_float", inputs, "amax", block_size, amax, fmt=fmt)


def symmetric_gradient(grad: Tensor, inputs: Tensor, amax: Tensor, block_size: int | None = None) -> Tensor:
    """:func:`qdq.kernels.reference.symmetric_gradient`."""
    if _unpaired(grad, inputs):
        return reference.symmetric_gradient(grad, inputs, _parameter(amax, inputs), block_size)
    return _elementwise("symmetric_gradient", inputs, "amax", block_size, amax, grad=grad)


def affine_gradient(
    grad: Tensor,
    inputs: Tensor,
    step_size: Tensor,
    zero_point: Tensor,
    lo: int,
    hi: int,
    block_size: int | None = None,
) -> Tensor:
    """:func:`qdq.kernels.reference.affine_gradient`."""
    if _unpaired(grad, inputs):
        step, zero = _parameter(step_size, inputs), _parameter(zero_point, inputs)
        return reference.affine_gradient(grad, inputs, step, zero, lo, hi, block_size)
    names = "step_size zero_point"
    return _elementwise("affine_gradient", inputs, names, block_size, step_size, zero_point, grad=grad, lo=lo, hi=hi)


def range_gradient(grad: Tensor, inputs: Tensor, min_range: Tensor, max_range: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qdq.kernels.reference.range_gradient`; with ranges of more than one value, the sums are PyTorch's."""
    if _unpaired(grad, inputs) or min_range.numel() != 1 or max_range.numel() != 1:
        return reference.range_gradient(grad, inputs, *(_parameter(p, inputs) for p in (min_range, max_range)))
    return _range_gradient(grad, inputs, min_range, max_range, closed=True)


def clip_gradient(grad: Tensor, inputs: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qdq.kernels.reference.clip_gradient`."""
    if _unpaired(grad, inputs) or low.numel() != 1 or high.numel() != 1:
        return reference.clip_gradient(grad, inputs, *(_parameter(p, inputs) for p in (low, high)))
    return _range_gradient(grad, inputs, low, high, closed=False)


def _unpaired(grad: Tensor, inputs: Tensor) -> bool:
    """True for a gradient that broadcasts to its inputs, or has a dtype that no kernel takes."""
    return grad.shape != inputs.shape or grad.dtype not in _FLOATS or grad.device != inputs.device


def _range_gradient(
    grad: Tensor, inputs: Tensor, low: Tensor, high: Tensor, closed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_gradients import run_range_gradient

    compute_dtype(inputs.dtype)
    x, grad = _dense(inputs), grad.detach()
    out = torch.empty_like(x, dtype=grad.dtype)
    if grad.stride() != out.stride() or grad.is_neg():
        grad = torch.empty_like(out).copy_(grad)
    sums = run_range_gradient(grad, x, out, _parameter(low, x), _parameter(high, x), closed)
    return out, sums[0].to(low).reshape(low.shape), sums[1].to(high).reshape(high.shape)


def absmax(x: Tensor, axis: int | None = None) -> Tensor:
    """:func:`qdq.kernels.reference.absmax`."""
    from .triton_reductions import run_extrema

    source, layout, shape = _sliced(x, axis)
    out = source.new_empty(shape)
    if out.numel():
        run_extrema(source, layout, None, out)
    return out


def minmax(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """:func:`qdq.kernels.reference.minmax`."""
    from .triton_reductions import run_extrema

    source, layout, shape = _sliced(x, axis)
    if layout.n == 0:
        return reference.minmax(x, axis)
    low, high = source.new_empty(shape), source.new_empty(shape)
    run_extrema(source, layout, low, high)
    return low, high


def _sliced(x: Tensor, axis: int | None) -> tuple[Tensor, Layout, tuple[int, ...]]:
    """Dense ``x``, the layout of its slices along ``axis``, and the shape of a result."""
    compute_dtype(x.dtype)
    if axis is not None and not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis {axis} is out of range for a tensor of {x.dim()} dimensions")
    x = _dense(x)
    n = x.numel()
    if axis is None:
        return x, per_tensor(n), ()
    size = x.shape[axis]
    if size <= 1 or n == 0:
        return x, Layout(n, n, n, size), (size,)
    inner = x.stride(axis)
    return x, Layout(n, inner * size, inner, size), (size,)


def histogram(x: Tensor, width: float, first: int, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qdq.kernels.reference.histogram`; compared in float64, as the reference does on a CPU."""
    if _uncounted(x, width, num_bins) or not -(2**31) <= first < 2**31:
        return reference.histogram(x, width, first, num_bins)
    return _histogram(x, width, first, num_bins, None)


def abs_histogram(x: Tensor, width: float, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qdq.kernels.reference.abs_histogram`; compared in float64, as the reference does on a CPU."""
    if _uncounted(x, width, num_bins):
        return reference.abs_histogram(x, width, num_bins)
    return _histogram(x, width, 0, num_bins, min(num_bins * width * _SLACK, torch.finfo(torch.float64).max))


def _uncounted(x: Tensor, width: float, num_bins: int) -> bool:
    """True for what the kernel does not count, or nobody does: integers, widths whose inverse is no normal number."""
    usable = math.isfinite(width) and 2.0**-1000 < width < 2.0**1000
    return x.dtype not in _FLOATS or not usable or not 1 <= num_bins < 2**31


def _histogram(x: Tensor, width: float, first: int, num_bins: int, end: float | None) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_histogram import run_histogram

    counts = run_histogram(_dense(x), width, first, num_bins, end)
    return counts[:num_bins], counts[num_bins], counts[num_bins + 1]
