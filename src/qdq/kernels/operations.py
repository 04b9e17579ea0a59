"""The schemas: every operation of :mod:`qdq.kernels.reference` as an operator of PyTorch, ``torch.ops.qdq.<name>``.

`torch.export` keeps one node for each call, of which tools can ask the settings. Each computes on the engine of its
tensors (:mod:`qdq.kernels.engine`), works on meta and fake tensors, and has the straight-through gradient where there
is one. Eager calls of :mod:`qdq.functional` do not come here, as operators start more slowly, nor does `torch.compile`,
which can fuse the reference.

``block_size`` and the other arguments are those of the functions of the same name; formats are given by their bits.
They refuse the values that the functions refuse, wherever a program that holds them runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import E4M3, FloatFormat, IntFormat, float_format
from . import checks
from .engine import for_tensor
from .reference import compute_dtype


def _operator(function: Any) -> Any:
    return torch.library.custom_op(f"qdq::{function.__name__}", mutates_args=())(function)


def _laid_out(result: Tensor, inputs: Tensor) -> Tensor:
    """``result`` with the strides that the fake implementation promises."""
    expected = torch.empty_like(inputs, device="meta").stride()
    if result.stride() == expected:
        return result
    return torch.empty_like(inputs, dtype=result.dtype).copy_(result)


def _checked(inputs: Tensor, amax: Tensor, unsigned: bool) -> Any:
    """The engine for these tensors, and what it does not refuse itself refused."""
    run = for_tensor(inputs)
    if not run.REFUSES_BAD_VALUES:
        checks.check_amax(amax)
        if unsigned:
            checks.check_unsigned(inputs)
    return run


def _checked_step(inputs: Tensor, step_size: Tensor) -> Any:
    run = for_tensor(inputs)
    if not run.REFUSES_BAD_VALUES:
        checks.check_step_size(step_size)
    return run


@_operator
def fake_tensor_quant(
    inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool, block_size: int | None = None
) -> Tensor:
    """:func:`qdq.functional.fake_tensor_quant`."""
    fmt = IntFormat(num_bits, unsigned, narrow_range)
    run = _checked(inputs, amax, unsigned)
    return _laid_out(run.symmetric_fake_quantize(inputs, amax, fmt, block_size), inputs)


@_operator
def tensor_quant(
    inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool, block_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`qdq.functional.tensor_quant`: codes and scale."""
    fmt = IntFormat(num_bits, unsigned, narrow_range)
    codes, scale = _checked(inputs, amax, unsigned).symmetric_quantize(inputs, amax, fmt, block_size)
    return _laid_out(codes, inputs), _laid_out(scale, amax)


@_operator
def fake_quantize_affine(
    inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int, block_size: int | None = None
) -> Tensor:
    """:func:`qdq.functional.fake_quantize_affine`."""
    run = _checked_step(inputs, step_size)
    return _laid_out(run.affine_fake_quantize(inputs, step_size, zero_point, lo, hi, block_size), inputs)


@_operator
def quantize_affine(
    inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int, block_size: int | None = None
) -> Tensor:
    """:func:`qdq.kernels.reference.affine_quantize`: codes in the compute dtype."""
    run = _checked_step(inputs, step_size)
    return _laid_out(run.affine_quantize(inputs, step_size, zero_point, lo, hi, block_size), inputs)


@_operator
def fake_affine_tensor_quant(inputs: Tensor, min_range: Tensor, max_range: Tensor, num_bits: int) -> Tensor:
    """:func:`qdq.functional.fake_affine_tensor_quant`."""
    checks.check_range(min_range, max_range)
    return _laid_out(for_tensor(inputs).range_fake_quantize(inputs, min_range, max_range, num_bits), inputs)


@_operator
def scaled_e4m3(inputs: Tensor, amax: Tensor | None, block_size: int | None = None) -> Tensor:
    """:func:`qdq.functional.scaled_e4m3`."""
    if amax is not None:
        checks.check_amax(amax)
    return _laid_out(for_tensor(inputs).scaled_float_fake_quantize(inputs, amax, E4M3, block_size), inputs)


@_operator
def round_to_float_format(x: Tensor, exponent_bits: int, mantissa_bits: int) -> Tensor:
    """:func:`qdq.kernels.reference.round_to_float_format`."""
    return _laid_out(for_tensor(x).round_to_float_format(x, float_format(exponent_bits, mantissa_bits)), x)


@_operator
def round_to_e8m0(x: Tensor) -> Tensor:
    """:func:`qdq.kernels.reference.round_to_e8m0`."""
    return _laid_out(for_tensor(x).round_to_e8m0(x), x)


@_operator
def symmetric_gradient(grad: Tensor, inputs: Tensor, amax: Tensor, block_size: int | None = None) -> Tensor:
    """:func:`qdq.kernels.reference.symmetric_gradient`."""
    return _laid_out(for_tensor(inputs).symmetric_gradient(grad, inputs, amax, block_size), inputs)


@_operator
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
    run = for_tensor(inputs)
    return _laid_out(run.affine_gradient(grad, inputs, step_size, zero_point, lo, hi, block_size), inputs)


@_operator
def range_gradient(grad: Tensor, inputs: Tensor, min_range: Tensor, max_range: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qdq.kernels.reference.range_gradient`: the gradient of the inputs and the sums of those of the ends."""
    passed, low, high = for_tensor(inputs).range_gradient(grad, inputs, min_range, max_range)
    return _laid_out(passed, inputs), _laid_out(low, min_range), _laid_out(high, max_range)


@_operator
def clip_gradient(grad: Tensor, inputs: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qdq.kernels.reference.clip_gradient`, as :func:`range_gradient`."""
    passed, below, above = for_tensor(inputs).clip_gradient(grad, inputs, low, high)
    return _laid_out(passed, inputs), _laid_out(below, low), _laid_out(above, high)


@_operator
def absmax(x: Tensor, axis: int | None = None) -> Tensor:
    """:func:`qdq.kernels.reference.absmax`."""
    return for_tensor(x).absmax(x, axis).clone()


@_operator
def minmax(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """:func:`qdq.kernels.reference.minmax`."""
    low, high = for_tensor(x).minmax(x, axis)
    return low.clone(), high.clone()


@_operator
def histogram(x: Tensor, width: float, first: int, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qdq.kernels.reference.histogram`: counts, values in no bin, zeros."""
    counts, outside, zeros = for_tensor(x).histogram(x, width, first, num_bins)
    return counts.clone(), outside.clone(), zeros.clone()


@_operator
def abs_histogram(x: Tensor, width: float, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qdq.kernels.reference.abs_histogram`."""
    counts, outside, zeros = for_tensor(x).abs_histogram(x, width, num_bins)
    return counts.clone(), outside.clone(), zeros.clone()


def _same(inputs: Tensor, *_: Any) -> Tensor:
    compute_dtype(inputs.dtype)
    return torch.empty_like(inputs)


for _operation in (fake_tensor_quant, fake_quantize_affine, fake_affine_tensor_quant, scaled_e4m3):
    _operation.register_fake(_same)
for _operation in (round_to_float_format, round_to_e8m0):
    _operation.register_fake(_same)
for _operation in (symmetric_gradient, affine_gradient):
    _operation.register_fake(lambda grad, inputs, *_: torch.empty_like(inputs, dtype=grad.dtype))
for _operation in (range_gradient, clip_gradient):
    _operation.register_fake(
        lambda grad, inputs, low, high: (
            torch.empty_like(inputs, dtype=grad.dtype),
            torch.empty_like(low),
            torch.empty_like(high),
        )
    )


@tensor_quant.register_fake
def _(inputs: Tensor, amax: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _same(inputs), torch.empty_like(amax, dtype=inputs.dtype)


@quantize_affine.register_fake
def _(inputs: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(inputs, dtype=compute_dtype(inputs.dtype))


def _slices(x: Tensor, axis: int | None) -> Tensor:
    return x.new_empty(() if axis is None else (x.shape[axis],))


absmax.register_fake(lambda x, axis=None: _slices(x, axis))
minmax.register_fake(lambda x, axis=None: (_slices(x, axis), _slices(x, axis)))


def _counts(x: Tensor, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((num_bins,), (), ())
    counts, outside, zeros = (x.new_empty(shape, dtype=torch.int64) for shape in shapes)
    return counts, outside, zeros


histogram.register_fake(lambda x, width, first, num_bins: _counts(x, num_bins))
abs_histogram.register_fake(lambda x, width, num_bins: _counts(x, num_bins))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.settings = [value for value in inputs if not isinstance(value, Tensor)]


def _keep_codes(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _keep(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _keep_float(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensor, amax, block_size = inputs
    ctx.save_for_backward(tensor, tensor.new_full((), E4M3.max_value) if amax is None else amax)
    ctx.settings = [None if amax is None else block_size]


def _keep_rounding(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensor, *bits = inputs
    ctx.save_for_backward(tensor)
    fmt: FloatFormat = float_format(*bits)
    ctx.largest = fmt.max_value


def _symmetric(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return symmetric_gradient(grad, *ctx.saved_tensors, ctx.settings[-1]), *[None] * 5


def _affine(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return affine_gradient(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 5


fake_tensor_quant.register_autograd(_symmetric, setup_context=_keep)
tensor_quant.register_autograd(_symmetric, setup_context=_keep_codes)
fake_quantize_affine.register_autograd(_affine, setup_context=_keep)
fake_affine_tensor_quant.register_autograd(
    lambda ctx, grad: (range_gradient(grad, *ctx.saved_tensors)[0], None, None, None), setup_context=_keep
)
scaled_e4m3.register_autograd(
    lambda ctx, grad: (symmetric_gradient(grad, *ctx.saved_tensors, *ctx.settings), None, None),
    setup_context=_keep_float,
)
round_to_float_format.register_autograd(
    lambda ctx, grad: (
        symmetric_gradient(grad, ctx.saved_tensors[0], ctx.saved_tensors[0].new_full((), ctx.largest)),
        None,
        None,
    ),
    setup_context=_keep_rounding,
)
# The gradients are linear in `grad`: their own gradient is themselves.
symmetric_gradient.register_autograd(
    lambda ctx, grad: (symmetric_gradient(grad, *ctx.saved_tensors[1:], *ctx.settings), None, None, None),
    setup_context=_keep,
)
affine_gradient.register_autograd(
    lambda ctx, grad: (affine_gradient(grad, *ctx.saved_tensors[1:], *ctx.settings), *[None] * 6), setup_context=_keep
)

# What nodes of captured graphs call.
FAKE_TENSOR_QUANT = torch.ops.qdq.fake_tensor_quant.default
SCALED_E4M3 = torch.ops.qdq.scaled_e4m3.default

OPERATORS = (
    fake_tensor_quant,
    tensor_quant,
    fake_quantize_affine,
    quantize_affine,
    fake_affine_tensor_quant,
    scaled_e4m3,
    round_to_float_format,
    round_to_e8m0,
    symmetric_gradient,
    affine_gradient,
    range_gradient,
    clip_gradient,
    absmax,
    minmax,
    histogram,
    abs_histogram,
)
