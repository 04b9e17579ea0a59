"""The ``autograd.Function`` classes of :mod:`qdq.functional`: value checks at the door, one kernel, one gradient.

The straight-through estimator (Bengio et al. 2013, https://arxiv.org/abs/1308.3432) with clipping: the gradient
passes unchanged where the input lies in the representable range, its ends included, and is 0 elsewhere. amax, ranges,
step sizes and zero points get no gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import onnx_torchscript
from .formats import E4M3, IntFormat
from .kernels import checks, engine, reference

_SIGNIFICAND_BITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}


def require_tensors(**tensors: Any) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def as_parameter(value: Tensor | float, inputs: Tensor) -> Tensor:
    """``value`` as a tensor on the device of ``inputs``; numbers take the compute dtype."""
    if isinstance(value, Tensor):
        return value
    require_tensors(inputs=inputs)
    if checks.is_tracing():  # `as_tensor` would warn; a tensor apart from the trace is a constant of it
        return torch.full((), value, dtype=reference.compute_dtype(inputs.dtype), device=inputs.device).data
    return torch.as_tensor(value, dtype=reference.compute_dtype(inputs.dtype), device=inputs.device)


_cached_format = lru_cache(maxsize=256, typed=True)(IntFormat)


def int_format(num_bits: int, unsigned: bool, narrow_range: bool) -> IntFormat:
    """The format; building one anew would take longer than quantizing a small tensor."""
    if not torch.compiler.is_compiling():  # a compiler warns of the cache
        try:  # `suppress` would take longer than the look-up
            return _cached_format(num_bits, unsigned, narrow_range)
        except TypeError:
            pass  # no number at all: IntFormat says so
    return IntFormat(num_bits, unsigned, narrow_range)


def eager_format(run: Any, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> IntFormat | None:
    """The format where the engine will refuse what is left to refuse; None where :func:`check_symmetric` must."""
    try:
        fmt = _cached_format(num_bits, unsigned, narrow_range)
    except TypeError:
        return None
    return fmt if run.REFUSES_BAD_VALUES and amax.is_floating_point() and not fmt.degenerate else None


def check_symmetric(
    run: Any, inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool, block_size: int | None
) -> IntFormat:
    """The format, once everything that the symmetric functions refuse has been refused, or will be by the engine."""
    if not isinstance(amax, Tensor):
        require_tensors(amax=amax)
    fmt = int_format(num_bits, unsigned, narrow_range)
    if not amax.is_floating_point():
        raise TypeError(f"amax must be a floating-point tensor, got {amax.dtype}")
    if run.REFUSES_BAD_VALUES and not fmt.degenerate:
        return fmt
    reference.compute_dtype(inputs.dtype)
    reference.expand_blocks(inputs, amax, block_size, "amax")
    checks.check_amax(amax)
    if unsigned:
        checks.check_unsigned(inputs)
    return fmt


def check_e4m3(inputs: Tensor, amax: Tensor | None, E: int, M: int) -> None:
    require_tensors(inputs=inputs)
    bits = (E, M)
    if bits != (E4M3.exponent_bits, E4M3.mantissa_bits):
        raise NotImplementedError(f"only E=4 and M=3 are supported, got E={E} and M={M}")
    if amax is not None:
        require_tensors(amax=amax)
        checks.check_amax(amax)


def _gradients(grad: Tensor) -> Any:
    """The engine for a backward pass; where its own gradient is asked for, the one that records it."""
    return reference if torch.compiler.is_compiling() or torch.is_grad_enabled() else engine.for_tensor(grad)


def engine_of(inputs: Tensor, *parameters: Tensor) -> Any:
    """The engine that computes an operation of these tensors; the reference where any of them has no memory to read."""
    if torch.compiler.is_compiling() or checks.is_tracing():
        return reference
    run = engine.for_tensor(inputs)
    if run is not reference:
        for parameter in parameters:
            if not engine.is_plain(parameter):
                return reference
    return run


class _SymmetricFunction(Function):
    """What the symmetric functions share: the saved tensors and the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.block_size = inputs[5]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad = grad_outputs[0]
        return _gradients(grad).symmetric_gradient(grad, *ctx.saved_tensors, ctx.block_size), *[None] * 5


class TensorQuantFunction(_SymmetricFunction):
    """The ``autograd.Function`` behind :func:`tensor_quant`, which documents it."""

    @staticmethod
    def forward(
        inputs: Tensor,
        amax: Tensor,
        num_bits: int = 8,
        unsigned: bool = False,
        narrow_range: bool = True,
        block_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        require_tensors(inputs=inputs)
        run = engine_of(inputs, amax)
        fmt = check_symmetric(run, inputs, amax, num_bits, unsigned, narrow_range, block_size)
        if fmt.magnitude_bits > _SIGNIFICAND_BITS.get(inputs.dtype, 64):
            raise ValueError(
                f"num_bits={num_bits} gives the bound {fmt.bound}, which is not exact in {inputs.dtype}: "
                "use fewer bits or a wider input dtype"
            )
        if inputs.dtype == torch.float16:
            checks.check_amax(amax)
            checks.check_float16_scale(amax, fmt)
        return run.symmetric_quantize(inputs, amax, fmt, block_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        _SymmetricFunction.setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def symbolic(
        g: Any, inputs: Any, amax: Any, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True, *_: Any
    ) -> Any:
        """QuantizeLinear, and the scale, in the graph ``g`` of ``torch.onnx.export(..., dynamo=False)``."""
        return onnx_torchscript.quantize(g, inputs, amax, num_bits, unsigned, narrow_range)


class FakeTensorQuantFunction(_SymmetricFunction):
    """The ``autograd.Function`` behind :func:`fake_tensor_quant`, which documents it."""

    @staticmethod
    def forward(
        inputs: Tensor,
        amax: Tensor,
        num_bits: int = 8,
        unsigned: bool = False,
        narrow_range: bool = True,
        block_size: int | None = None,
    ) -> Tensor:
        require_tensors(inputs=inputs)
        run = engine_of(inputs, amax)
        fmt = check_symmetric(run, inputs, amax, num_bits, unsigned, narrow_range, block_size)
        return run.symmetric_fake_quantize(inputs, amax, fmt, block_size)

    @staticmethod
    def symbolic(
        g: Any, inputs: Any, amax: Any, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True, *_: Any
    ) -> Any:
        """Q/DQ nodes in the graph ``g`` of ``torch.onnx.export(..., dynamo=False)``."""
        return onnx_torchscript.fake_quantize(g, inputs, amax, num_bits, unsigned, narrow_range)


# Functions in the old form start in a fraction of the time. `torch.func` and compilers refuse this form; only eager
# calls may come here, so what `Function.apply` does for `torch.func` is left out, too.


class _EagerFakeTensorQuant(Function):
    """:class:`FakeTensorQuantFunction` for eager calls."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, amax: Tensor, run: Any, fmt: IntFormat, block_size: int | None) -> Tensor:
        ctx.save_for_backward(inputs, amax)
        if block_size is not None:
            ctx.block_size = block_size
        return run.symmetric_fake_quantize(inputs, amax, fmt, block_size)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        inputs, amax = ctx.saved_tensors
        block_size = getattr(ctx, "block_size", None)
        return _gradients(grad).symmetric_gradient(grad, inputs, amax, block_size), None, None, None, None


_recorded_fake_tensor_quant: Any = super(Function, _EagerFakeTensorQuant).apply  # pyright: ignore[reportAttributeAccessIssue]
# Up to here a second pass over the values costs less than Python's part in a Function of its own.
_FEW_ELEMENTS = 8192


def eager_fake_tensor_quant(inputs: Tensor, amax: Tensor, run: Any, fmt: IntFormat, block_size: int | None) -> Tensor:
    """Fake quantization with its gradient recorded, of plain tensors on a fast engine."""
    small = block_size is None and run.IN_PLACE and inputs.numel() <= _FEW_ELEMENTS
    if small and not amax.requires_grad and not fmt.degenerate and run.is_simple(inputs, amax):
        # Clamping at amax has the very same gradient, in PyTorch's own code, and keeps its input for it, not its
        # result: that is memory which the quantized values may fill.
        largest = amax.item()
        return run.fill_fake_quantized(torch.clamp(inputs, -largest, largest), inputs, amax, fmt)
    return _recorded_fake_tensor_quant(inputs, amax, run, fmt, block_size)


class LegacyFakeTensorQuantFunction(FakeTensorQuantFunction):
    """The old name of :class:`FakeTensorQuantFunction`; the two are equal bit for bit."""


class FakeAffineTensorQuantFunction(Function):
    """The ``autograd.Function`` behind :func:`fake_affine_tensor_quant`, which documents it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor, min_range: Tensor, max_range: Tensor, num_bits: int = 8) -> Tensor:
        require_tensors(inputs=inputs, min_range=min_range, max_range=max_range)
        if IntFormat(num_bits).num_bits < 1:
            raise ValueError(f"num_bits must be at least 1 for affine quantization, got {num_bits}")
        checks.check_range(min_range, max_range)
        return engine_of(inputs, min_range, max_range).range_fake_quantize(inputs, min_range, max_range, num_bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        return _gradients(grad).range_gradient(grad, *ctx.saved_tensors)[0], None, None, None


class ScaledE4M3Function(Function):
    """The ``autograd.Function`` behind :func:`scaled_e4m3`, which documents it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        inputs: Tensor, amax: Tensor | None = None, E: int = 4, M: int = 3, block_size: int | None = None
    ) -> Tensor:
        check_e4m3(inputs, amax, E, M)
        run = engine_of(inputs) if amax is None else engine_of(inputs, amax)
        return run.scaled_float_fake_quantize(inputs, amax, E4M3, block_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        tensor, amax = inputs[0], inputs[1]
        ctx.save_for_backward(tensor, tensor.new_full((), E4M3.max_value) if amax is None else amax)
        ctx.block_size = None if amax is None else inputs[4]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        return _gradients(grad).symmetric_gradient(grad, *ctx.saved_tensors, ctx.block_size), *[None] * 4

    @staticmethod
    def symbolic(g: Any, inputs: Any, amax: Any = None, E: int = 4, M: int = 3, *_: Any) -> Any:
        """TensorRT's nodes in the graph ``g`` of ``torch.onnx.export(..., dynamo=False)``."""
        return onnx_torchscript.fake_quantize(g, inputs, amax, (E, M), False, False)


class FakeQuantizeAffineFunction(Function):
    """The ``autograd.Function`` behind :func:`fake_quantize_affine`, which documents it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int, block_size: int | None = None
    ) -> Tensor:
        run = engine_of(inputs, step_size, zero_point)
        if not run.REFUSES_BAD_VALUES:
            checks.check_step_size(step_size)
        return run.affine_fake_quantize(inputs, step_size, zero_point, lo, hi, block_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        ctx.save_for_backward(*inputs[:3])
        ctx.settings = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        return _gradients(grad).affine_gradient(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 5


class _EagerFakeQuantizeAffine(Function):
    """:class:`FakeQuantizeAffineFunction` for eager calls, as :class:`_EagerFakeTensorQuant`."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        step_size: Tensor,
        zero_point: Tensor,
        run: Any,
        lo: int,
        hi: int,
        block_size: int | None,
    ) -> Tensor:
        ctx.save_for_backward(inputs, step_size, zero_point)
        ctx.settings = lo, hi, block_size
        return run.affine_fake_quantize(inputs, step_size, zero_point, lo, hi, block_size)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        return _gradients(grad).affine_gradient(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 6


eager_fake_quantize_affine: Any = super(Function, _EagerFakeQuantizeAffine).apply  # pyright: ignore[reportAttributeAccessIssue]
