"""The CPU engine: the functions of :mod:`qdq.kernels.reference`, computed by the compiled kernels.

Each function reads its tensors once and writes its result once, in the order of memory, on the threads of PyTorch.
Results are those of the reference, bit for bit in float32 and float64; 16-bit inputs are computed in float32 and cast
once. Unlike the reference, the functions refuse bad values (a negative amax, ...), as they read them anyway.

Inputs are plain tensors on the CPU, as :func:`qdq.kernels.engine.for_tensor` makes sure; no gradient is recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import FloatFormat, IntFormat
from . import reference
from .cpu_integer_arithmetic import add_codes, requantize
from .cpu_statistics import abs_histogram, absmax, histogram, minmax
from .layout import Layout, block_layout, broadcast_layout, is_dense, one_axis, per_tensor
from .native import DTYPES, FAKE_TENSOR, TENSOR_GRADIENT, library, refuse
from .reference import compute_dtype, expand_blocks

__all__ = [
    "IN_PLACE",
    "REFUSES_BAD_VALUES",
    "abs_histogram",
    "absmax",
    "add_codes",
    "affine_fake_quantize",
    "affine_gradient",
    "affine_quantize",
    "clip_gradient",
    "fill_fake_quantized",
    "histogram",
    "is_simple",
    "minmax",
    "range_fake_quantize",
    "range_gradient",
    "requantize",
    "round_to_e8m0",
    "round_to_float_format",
    "scaled_float_fake_quantize",
    "symmetric_fake_quantize",
    "symmetric_gradient",
    "symmetric_quantize",
]

# A negative amax, a step size that is not positive, a negative input of unsigned quantization.
REFUSES_BAD_VALUES = True
# `fill_fake_quantized` exists.
IN_PLACE = True

_kernels: Any = library().functions
_threads = torch.get_num_threads


_fake_tensor = _kernels.qdq_fake_tensor
_tensor_gradient = _kernels.qdq_tensor_gradient
_fake_tensor_call, _tensor_gradient_call = FAKE_TENSOR.pack, TENSOR_GRADIENT.pack
# Below this one thread is used, and asking how many there are would be wasted.
_LEAST_FOR_THREADS = 1 << 15
_float32 = torch.float32


def is_simple(x: Tensor, amax: Tensor) -> bool:
    """True for the most frequent call, contiguous float32 with one amax: it takes the shortest way."""
    return (
        x.dtype is _float32
        and amax.dtype is _float32
        and amax.numel() == 1
        and x.is_contiguous()
        and x.is_cpu
        and amax.is_cpu
        and not x.is_neg()
        and not amax.is_neg()
    )


def _dense_source(inputs: Tensor, out: Tensor) -> Tensor:
    """``inputs``, or a copy of it in ``out``, which is then computed in place, where it has gaps or repetitions."""
    # Of a negative view (the imaginary part of a conjugate), memory holds the negated values.
    if not inputs.is_neg() and is_dense(inputs):
        return inputs
    return out.copy_(inputs.detach())


def _values(parameter: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter's values, computed with on the CPU."""
    if parameter.dtype is not dtype or not parameter.is_cpu or parameter.is_neg():
        parameter = parameter.detach().to(like.device, dtype).resolve_neg()
    return parameter


def _placed(x: Tensor, names: str, block_size: int | None, *parameters: Tensor) -> tuple[Layout, list[Tensor]]:
    """The layout that dense ``x`` has with its parameters, and these in the order of memory."""
    if block_size is None and x.numel():
        layout = one_axis(x, parameters[0])
        if layout is not None and all(one_axis(x, parameter) == layout for parameter in parameters[1:]):
            return layout, [parameter.contiguous() for parameter in parameters]
    one_each = all(parameter.numel() == 1 for parameter in parameters)
    if one_each and block_size is None:
        return per_tensor(x.numel()), list(parameters)
    fitted = [expand_blocks(x, p, block_size, name) for p, name in zip(parameters, names.split(), strict=True)]
    if one_each:
        return per_tensor(x.numel()), list(parameters)
    if x.numel() == 0:
        return Layout(0, 0, 0, min(p.numel() for p in parameters)), [p.reshape(-1).contiguous() for p in parameters]
    if block_size is not None:
        placed = [block_layout(x, p, block_size) for p in parameters]
    else:
        shape = torch.broadcast_shapes(*(p.shape for p in fitted))
        placed = [broadcast_layout(x, p.expand(shape)) for p in fitted]
    layout = max((layout for layout, _ in placed), key=lambda found: found.count)
    return layout, [p.reshape(1).expand(layout.count).contiguous() if p.numel() == 1 else p for _, p in placed]


def _blocks_apart(function: Any, inputs: Tensor, *arguments: Any) -> Tensor:
    """``function`` of a contiguous copy, for blocks of tensors whose last axis is not the fastest in memory."""
    result = function(inputs.contiguous(), *arguments)
    return torch.empty_like(inputs, dtype=result.dtype).copy_(result)


def _needs_rows(inputs: Tensor, block_size: int | None) -> bool:
    return block_size is not None and not inputs.is_contiguous()


def symmetric_quantize(
    inputs: Tensor, amax: Tensor, fmt: IntFormat, block_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`qdq.kernels.reference.symmetric_quantize`."""
    if fmt.degenerate:
        return reference.symmetric_quantize(inputs, amax, fmt, block_size)
    codes = _symmetric(1, inputs, amax, fmt, block_size)
    wide = amax.detach().to(compute_dtype(inputs.dtype))
    return codes, reference.symmetric_scale(wide, fmt.bound).to(inputs.dtype)


def symmetric_fake_quantize(inputs: Tensor, amax: Tensor, fmt: IntFormat, block_size: int | None = None) -> Tensor:
    """:func:`qdq.kernels.reference.symmetric_fake_quantize`."""
    if block_size is None and is_simple(inputs, amax) and not fmt.degenerate:
        return fill_fake_quantized(torch.empty_like(inputs), inputs, amax, fmt)
    if fmt.degenerate:
        return reference.symmetric_fake_quantize(inputs, amax, fmt, block_size)
    return _symmetric(0, inputs, amax, fmt, block_size)


def fill_fake_quantized(out: Tensor, inputs: Tensor, amax: Tensor, fmt: IntFormat) -> Tensor:
    """``out``, filled with fake-quantized ``inputs``; for tensors that are simple, and a format with codes."""
    n = inputs.numel()
    threads = _threads() if n > _LEAST_FOR_THREADS else 1
    call = _fake_tensor_call(inputs.data_ptr(), out.data_ptr(), amax.data_ptr(), n, 0, threads, fmt.lo, fmt.hi)
    status = _fake_tensor(call)
    if status:
        refuse(status, "amax")
    return out


def _symmetric(codes: int, inputs: Tensor, amax: Tensor, fmt: IntFormat, block_size: int | None) -> Tensor:
    if _needs_rows(inputs, block_size):
        return _blocks_apart(lambda x: _symmetric(codes, x, amax, fmt, block_size), inputs)
    dtype = inputs.dtype
    out = torch.empty_like(inputs)
    source = inputs if inputs.is_contiguous() and not inputs.is_neg() else _dense_source(inputs, out)
    amax = _values(amax, inputs, compute_dtype(dtype))
    n = inputs.numel()
    if amax.numel() == 1 and block_size is None:
        layout = (n, n, n, 1)
    else:
        layout, (amax,) = _placed(out, "amax", block_size, amax)
    status = _kernels.qdq_symmetric(
        DTYPES[dtype],
        codes,
        source.data_ptr(),
        out.data_ptr(),
        *layout,
        amax.data_ptr(),
        fmt.lo,
        fmt.hi,
        _threads(),
    )
    if status:
        refuse(status, "amax")
    return out


def affine_quantize(
    inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int, block_size: int | None = None
) -> Tensor:
    """:func:`qdq.kernels.reference.affine_quantize`."""
    return _affine(1, inputs, step_size, zero_point, lo, hi, block_size)


def affine_fake_quantize(
    inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int, block_size: int | None = None
) -> Tensor:
    """:func:`qdq.kernels.reference.affine_fake_quantize`."""
    return _affine(0, inputs, step_size, zero_point, lo, hi, block_size)


def _affine(
    codes: int, inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int, block_size: int | None
) -> Tensor:
    if _needs_rows(inputs, block_size):
        return _blocks_apart(lambda x: _affine(codes, x, step_size, zero_point, lo, hi, block_size), inputs)
    dtype = inputs.dtype
    compute = compute_dtype(dtype)
    out = torch.empty_like(inputs)
    source = inputs if inputs.is_contiguous() and not inputs.is_neg() else _dense_source(inputs, out)
    if codes and dtype is not compute:
        out = torch.empty_like(inputs, dtype=compute)
    step, zero = _values(step_size, inputs, compute), _values(zero_point, inputs, compute)
    n = inputs.numel()
    if step.numel() == 1 and zero.numel() == 1 and block_size is None:
        layout = (n, n, n, 1)
    else:
        layout, (step, zero) = _placed(out, "step_size zero_point", block_size, step, zero)
    status = _kernels.qdq_affine(
        DTYPES[dtype],
        codes,
        source.data_ptr(),
        out.data_ptr(),
        *layout,
        step.data_ptr(),
        zero.data_ptr(),
        lo,
        hi,
        _threads(),
    )
    if status:
        refuse(status, "step_size")
    return out


def range_fake_quantize(inputs: Tensor, min_range: Tensor, max_range: Tensor, num_bits: int) -> Tensor:
    """:func:`qdq.kernels.reference.range_fake_quantize`."""
    compute = compute_dtype(inputs.dtype)
    out = torch.empty_like(inputs)
    source = _dense_source(inputs, out)
    low, high = _values(min_range, inputs, compute), _values(max_range, inputs, compute)
    layout, (low, high) = _placed(out, "min_range max_range", None, low, high)
    status = _kernels.qdq_range(
        DTYPES[inputs.dtype],
        source.data_ptr(),
        out.data_ptr(),
        *layout,
        low.data_ptr(),
        high.data_ptr(),
        num_bits,
        _threads(),
    )
    if status:
        refuse(status, "range")
    return out


def round_to_float_format(x: Tensor, fmt: FloatFormat) -> Tensor:
    """:func:`qdq.kernels.reference.round_to_float_format`."""
    return scaled_float_fake_quantize(x, None, fmt, unscaled=True)


def round_to_e8m0(x: Tensor) -> Tensor:
    """:func:`qdq.kernels.reference.round_to_e8m0`."""
    compute_dtype(x.dtype)
    out = torch.empty_like(x)
    source = _dense_source(x, out)
    status = _kernels.qdq_e8m0(DTYPES[x.dtype], source.data_ptr(), out.data_ptr(), x.numel(), _threads())
    refuse(status)
    return out


def scaled_float_fake_quantize(
    inputs: Tensor, amax: Tensor | None, fmt: FloatFormat, block_size: int | None = None, *, unscaled: bool = False
) -> Tensor:
    """:func:`qdq.kernels.reference.scaled_float_fake_quantize`."""
    if _needs_rows(inputs, block_size):
        return _blocks_apart(lambda x: scaled_float_fake_quantize(x, amax, fmt, block_size), inputs)
    compute = compute_dtype(inputs.dtype)
    out = torch.empty_like(inputs)
    source = _dense_source(inputs, out)
    pointer = None
    layout = per_tensor(inputs.numel())
    if amax is not None:
        amax = _values(amax, inputs, compute)
        layout, (amax,) = _placed(out, "amax", block_size, amax)
        pointer = amax.data_ptr()
    status = _kernels.qdq_float_format(
        DTYPES[inputs.dtype],
        source.data_ptr(),
        out.data_ptr(),
        *layout,
        pointer,
        int(unscaled),
        fmt.mantissa_bits,
        fmt.min_exponent,
        fmt.max_value,
        _threads(),
    )
    if status:
        refuse(status, "amax")
    return out


def symmetric_gradient(grad: Tensor, inputs: Tensor, amax: Tensor, block_size: int | None = None) -> Tensor:
    """:func:`qdq.kernels.reference.symmetric_gradient`."""
    if block_size is None and is_simple(inputs, amax) and is_simple(grad, amax) and grad.shape == inputs.shape:
        out = torch.empty_like(inputs)
        n = inputs.numel()
        threads = _threads() if n > _LEAST_FOR_THREADS else 1
        pointers = grad.data_ptr(), inputs.data_ptr(), out.data_ptr(), amax.data_ptr()
        refuse(_tensor_gradient(_tensor_gradient_call(*pointers, n, 0, threads)))
        return out
    if _differ(grad, inputs) or _needs_rows(inputs, block_size):
        return reference.symmetric_gradient(grad, inputs, amax, block_size)
    grad, source, out = _aligned(grad, inputs)
    amax = _values(amax, inputs, compute_dtype(inputs.dtype))
    n = inputs.numel()
    if amax.numel() == 1 and block_size is None:
        layout = (n, n, n, 1)
    else:
        layout, (amax,) = _placed(out, "amax", block_size, amax)
    status = _kernels.qdq_symmetric_gradient(
        DTYPES[inputs.dtype],
        grad.data_ptr(),
        source.data_ptr(),
        out.data_ptr(),
        *layout,
        amax.data_ptr(),
        _threads(),
    )
    refuse(status)
    return out


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
    if _differ(grad, inputs) or _needs_rows(inputs, block_size):
        return reference.affine_gradient(grad, inputs, step_size, zero_point, lo, hi, block_size)
    compute = compute_dtype(inputs.dtype)
    grad, source, out = _aligned(grad, inputs)
    step, zero = _values(step_size, inputs, compute), _values(zero_point, inputs, compute)
    layout, (step, zero) = _placed(out, "step_size zero_point", block_size, step, zero)
    status = _kernels.qdq_affine_gradient(
        DTYPES[inputs.dtype],
        grad.data_ptr(),
        source.data_ptr(),
        out.data_ptr(),
        *layout,
        step.data_ptr(),
        zero.data_ptr(),
        lo,
        hi,
        _threads(),
    )
    refuse(status)
    return out


def range_gradient(grad: Tensor, inputs: Tensor, min_range: Tensor, max_range: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qdq.kernels.reference.range_gradient`."""
    if _differ(grad, inputs) or min_range.numel() != 1 or max_range.numel() != 1:
        return reference.range_gradient(grad, inputs, min_range, max_range)
    return _range_gradient(1, grad, inputs, min_range, max_range)


def clip_gradient(grad: Tensor, inputs: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qdq.kernels.reference.clip_gradient`."""
    if _differ(grad, inputs) or low.numel() != 1 or high.numel() != 1:
        return reference.clip_gradient(grad, inputs, low, high)
    return _range_gradient(0, grad, inputs, low, high)


def _range_gradient(
    inclusive: int, grad: Tensor, inputs: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    compute = compute_dtype(inputs.dtype)
    grad, source, out = _aligned(grad, inputs)
    first, last = _values(low, inputs, compute), _values(high, inputs, compute)
    sums = torch.empty(2, dtype=torch.float64, device="cpu")
    status = _kernels.qdq_range_gradient(
        DTYPES[inputs.dtype],
        inclusive,
        grad.data_ptr(),
        source.data_ptr(),
        out.data_ptr(),
        inputs.numel(),
        first.data_ptr(),
        last.data_ptr(),
        sums.data_ptr(),
        _threads(),
    )
    if status:
        refuse(status, "range")
    # Copies: results of an operator may not share memory.
    ends = [total.to(end.dtype, copy=True).reshape(end.shape) for total, end in zip(sums, (low, high), strict=True)]
    return out, ends[0], ends[1]


def _differ(grad: Tensor, inputs: Tensor) -> bool:
    """True for what the kernels do not pair: another dtype or shape, or a gradient on another device."""
    return grad.dtype is not inputs.dtype or grad.shape != inputs.shape or not grad.is_cpu


def _aligned(grad: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient and inputs dense and in one order of memory, and memory for the result in that order."""
    out = torch.empty_like(inputs)
    source = _dense_source(inputs, out)
    if grad.is_neg() or grad.stride() != out.stride():
        # The order of the inputs: the result takes part in what comes before them.
        grad = torch.empty_like(out).copy_(grad.detach())
    return grad, source, out
