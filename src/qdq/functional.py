"""Quantization as differentiable functions: value checks at the door, one kernel, the straight-through gradient.

The straight-through estimator (Bengio et al. 2013, https://arxiv.org/abs/1308.3432) with clipping: the gradient
passes unchanged where the input lies in the representable range, its ends included, and is 0 elsewhere. amax, ranges,
step sizes and zero points get no gradient.

*Scale* is ``bound / amax``: codes are inputs times scale. ONNX's scale is its inverse, here called *step size*.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual

from . import onnx_torchscript
from .formats import E4M3, IntFormat
from .kernels import checks, operations, reference
from .onnx_form import exports_to_onnx, fake_quantize_as_onnx, reading_sizes

_SIGNIFICAND_BITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}


def _require_tensors(**tensors: Any) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _as_parameter(value: Tensor | float, inputs: Tensor) -> Tensor:
    """``value`` as a tensor on the device of ``inputs``; numbers take the compute dtype."""
    if isinstance(value, Tensor):
        return value
    _require_tensors(inputs=inputs)
    if checks.is_tracing():  # `as_tensor` would warn; a tensor apart from the trace is a constant of it
        return torch.full((), value, dtype=reference.compute_dtype(inputs.dtype), device=inputs.device).data
    return torch.as_tensor(value, dtype=reference.compute_dtype(inputs.dtype), device=inputs.device)


def _at_the_door(inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> IntFormat:
    """The format, once everything that the symmetric functions refuse has been refused."""
    _require_tensors(inputs=inputs, amax=amax)
    fmt = IntFormat(num_bits, unsigned, narrow_range)
    reference.compute_dtype(inputs.dtype)
    if not amax.dtype.is_floating_point:
        raise TypeError(f"amax must be a floating-point tensor, got {amax.dtype}")
    reference.check_broadcast(inputs, amax, "amax")
    checks.check_amax(amax)
    if unsigned:
        checks.check_unsigned(inputs)
    return fmt


def _e4m3_at_the_door(inputs: Tensor, amax: Tensor | None, E: int, M: int) -> None:
    _require_tensors(inputs=inputs)
    bits = (E, M)
    if bits != (E4M3.exponent_bits, E4M3.mantissa_bits):
        raise NotImplementedError(f"only E=4 and M=3 are supported, got E={E} and M={M}")
    if amax is not None:
        _require_tensors(amax=amax)
        checks.check_amax(amax)


def _pass_where(mask: Tensor, grad: Tensor) -> Tensor:
    # A product with the mask would turn an infinite gradient outside the range into NaN.
    return torch.where(mask, grad, torch.zeros_like(grad))


class _SymmetricFunction(Function):
    """What the symmetric functions share: the saved tensors and the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        inputs, amax = ctx.saved_tensors
        return _pass_where(reference.symmetric_mask(inputs, amax), grad_outputs[0]), None, None, None, None


class TensorQuantFunction(_SymmetricFunction):
    """The ``autograd.Function`` behind :func:`tensor_quant`, which documents it."""

    @staticmethod
    def forward(
        inputs: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
    ) -> tuple[Tensor, Tensor]:
        fmt = _at_the_door(inputs, amax, num_bits, unsigned, narrow_range)
        if fmt.magnitude_bits > _SIGNIFICAND_BITS[inputs.dtype]:
            raise ValueError(
                f"num_bits={num_bits} gives the bound {fmt.bound}, which is not exact in {inputs.dtype}: "
                "use fewer bits or a wider input dtype"
            )
        if inputs.dtype == torch.float16:
            checks.check_float16_scale(amax, fmt)
        return reference.symmetric_quantize(inputs, amax, fmt)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def symbolic(
        g: Any, inputs: Any, amax: Any, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
    ) -> Any:
        """QuantizeLinear, and the scale, in the graph ``g`` of ``torch.onnx.export(..., dynamo=False)``."""
        return onnx_torchscript.quantize(g, inputs, amax, num_bits, unsigned, narrow_range)


class FakeTensorQuantFunction(_SymmetricFunction):
    """The ``autograd.Function`` behind :func:`fake_tensor_quant`, which documents it."""

    @staticmethod
    def forward(
        inputs: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
    ) -> Tensor:
        fmt = _at_the_door(inputs, amax, num_bits, unsigned, narrow_range)
        return reference.symmetric_fake_quantize(inputs, amax, fmt)

    @staticmethod
    def symbolic(
        g: Any, inputs: Any, amax: Any, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
    ) -> Any:
        """Q/DQ nodes in the graph ``g`` of ``torch.onnx.export(..., dynamo=False)``."""
        return onnx_torchscript.fake_quantize(g, inputs, amax, num_bits, unsigned, narrow_range)


class LegacyFakeTensorQuantFunction(FakeTensorQuantFunction):
    """The old name of :class:`FakeTensorQuantFunction`; the two are equal bit for bit."""


class FakeAffineTensorQuantFunction(Function):
    """The ``autograd.Function`` behind :func:`fake_affine_tensor_quant`, which documents it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor, min_range: Tensor, max_range: Tensor, num_bits: int = 8) -> Tensor:
        _require_tensors(inputs=inputs, min_range=min_range, max_range=max_range)
        if IntFormat(num_bits).num_bits < 1:
            raise ValueError(f"num_bits must be at least 1 for affine quantization, got {num_bits}")
        checks.check_range(min_range, max_range)
        return reference.range_fake_quantize(inputs, min_range, max_range, num_bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return _pass_where(reference.range_mask(*ctx.saved_tensors), grad_outputs[0]), None, None, None


class ScaledE4M3Function(Function):
    """The ``autograd.Function`` behind :func:`scaled_e4m3`, which documents it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor, amax: Tensor | None = None, E: int = 4, M: int = 3) -> Tensor:
        _e4m3_at_the_door(inputs, amax, E, M)
        return reference.scaled_float_fake_quantize(inputs, amax, E4M3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        tensor, amax = inputs[0], inputs[1]
        ctx.save_for_backward(tensor, torch.full_like(tensor, E4M3.max_value) if amax is None else amax)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return _pass_where(reference.symmetric_mask(*ctx.saved_tensors), grad_outputs[0]), None, None, None

    @staticmethod
    def symbolic(g: Any, inputs: Any, amax: Any = None, E: int = 4, M: int = 3) -> Any:
        """TensorRT's nodes in the graph ``g`` of ``torch.onnx.export(..., dynamo=False)``."""
        return onnx_torchscript.fake_quantize(g, inputs, amax, (E, M), False, False)


class FakeQuantizeAffineFunction(Function):
    """The ``autograd.Function`` behind :func:`fake_quantize_affine`, which documents it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor, step_size: Tensor, zero_point: Tensor, lo: int, hi: int) -> Tensor:
        checks.check_step_size(step_size)
        return reference.affine_fake_quantize(inputs, step_size, zero_point, lo, hi)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        ctx.save_for_backward(*inputs[:3])
        ctx.codes = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        mask = reference.affine_mask(*ctx.saved_tensors, *ctx.codes)
        return _pass_where(mask, grad_outputs[0]), None, None, None, None


def _call(function: Any, inputs: Tensor, *arguments: Any) -> Any:
    """``function.apply``; where no gradient can be asked for, its forward alone, which starts several times faster."""
    _require_tensors(inputs=inputs)
    if checks.is_tracing():
        # The exporter of TorchScript looks for `symbolic`, and `torch.jit.trace` compares traces with and without
        # gradients: both see one node.
        with reading_sizes() if exports_to_onnx() else contextlib.nullcontext():
            return function.apply(inputs, *arguments)
    tensors = [inputs, *(a for a in arguments if isinstance(a, Tensor))]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return function.apply(inputs, *arguments)
    # A dual tensor of forward-mode differentiation: let the Function refuse it rather than give a zero tangent.
    if not torch.compiler.is_compiling() and unpack_dual(inputs).tangent is not None:
        return function.apply(inputs, *arguments)
    return function.forward(inputs, *arguments)


def _exported_fake_quant(inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
    """One node of an exported program, or Q/DQ nodes of an ONNX file."""
    _at_the_door(inputs, amax, num_bits, unsigned, narrow_range)
    if exports_to_onnx():
        return fake_quantize_as_onnx(inputs, amax, num_bits, unsigned, narrow_range)
    return operations.fake_tensor_quant(inputs, amax, num_bits, unsigned, narrow_range)


def _exported_e4m3(inputs: Tensor, amax: Tensor | None, E: int, M: int) -> Tensor:
    """One node of an exported program, or TensorRT's nodes of an ONNX file."""
    _e4m3_at_the_door(inputs, amax, E, M)
    if exports_to_onnx():
        largest = torch.tensor(E4M3.max_value) if amax is None else amax
        return fake_quantize_as_onnx(inputs, largest, (E, M), False, False)
    return operations.scaled_e4m3(inputs, amax)


def tensor_quant(
    inputs: Tensor, amax: Tensor | float, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> tuple[Tensor, Tensor]:
    """Quantize symmetrically: ``clamp(round_half_to_even(inputs * scale), lo, bound)``.

    ``bound = 2**(num_bits - 1 + unsigned) - 1`` and ``scale = bound / amax``; ``lo`` is 0 if unsigned, ``-bound`` in
    the narrow range, else ``-bound - 1``. An amax of at most ``2**-24`` counts as zero: codes 0, scale 1; so does a
    bound of 0. Where amax is NaN or infinite, codes are NaN. NaN inputs stay NaN.

    Args:
        inputs: float16, bfloat16, float32 or float64, any shape; 16 bits are computed in float32.
        amax: the absolute maximum that values are clipped to, in units of the inputs. It broadcasts to ``inputs``:
            its shape is the granularity.
        num_bits: width of the codes.
        unsigned: codes from 0.
        narrow_range: leave out the code ``-bound - 1``.

    Returns:
        Codes and scale, both in the dtype of ``inputs``; the scale has the shape of ``amax``.

    Raises:
        ValueError: negative amax; amax that does not broadcast; a scale above 65504 for float16 inputs; a bound that
            is not exact in the dtype of ``inputs``; ``num_bits`` out of range.
        TypeError: a negative input with ``unsigned``; inputs of another dtype.
    """
    return _call(TensorQuantFunction, inputs, _as_parameter(amax, inputs), num_bits, unsigned, narrow_range)


def fake_tensor_quant(
    inputs: Tensor, amax: Tensor | float, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> Tensor:
    """Quantize as :func:`tensor_quant` does and divide by the scale, in the dtype of ``inputs``.

    The scale stays in the compute dtype, so that a small amax does not overflow float16. Arguments and errors are
    those of :func:`tensor_quant`, without its two about what the dtype of ``inputs`` can hold.
    """
    amax = _as_parameter(amax, inputs)
    if torch.compiler.is_exporting():
        return _exported_fake_quant(inputs, amax, num_bits, unsigned, narrow_range)
    return _call(FakeTensorQuantFunction, inputs, amax, num_bits, unsigned, narrow_range)


def legacy_fake_tensor_quant(
    inputs: Tensor, amax: Tensor | float, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> Tensor:
    """The old name of :func:`fake_tensor_quant`; the two are equal bit for bit."""
    return fake_tensor_quant(inputs, amax, num_bits, unsigned, narrow_range)


def fake_affine_tensor_quant(
    inputs: Tensor, min_range: Tensor | float, max_range: Tensor | float, num_bits: int = 8
) -> Tensor:
    """Fake quantization over ``[min_range, max_range]``, as the toolkit published it.

    ``step = (max_range - min_range) / (2**num_bits - 1)``; the range need not contain 0. A zero-width range has one
    value, ``min_range``. For deployment use :func:`fake_quantize_affine`, which computes as ONNX does.

    Raises:
        ValueError: ``min_range`` above ``max_range``; ranges that do not broadcast; ``num_bits`` below 1.
    """
    low, high = _as_parameter(min_range, inputs), _as_parameter(max_range, inputs)
    return _call(FakeAffineTensorQuantFunction, inputs, low, high, num_bits)


def scaled_e4m3(inputs: Tensor, amax: Tensor | float | None = None, E: int = 4, M: int = 3) -> Tensor:
    """Round to the values of the 8-bit floating-point format E4M3, saturating at its largest, 448.

    With ``amax``, values are multiplied by ``448 / amax`` before rounding and divided by it after.
    ``|inputs| < 2**-24`` gives 0. Source: OCP 8-bit Floating Point Specification (OFP8), revision 1.0.

    Raises:
        NotImplementedError: ``E`` and ``M`` other than 4 and 3.
        ValueError: negative amax; amax that does not broadcast.
    """
    amax = None if amax is None else _as_parameter(amax, inputs)
    if torch.compiler.is_exporting():
        return _exported_e4m3(inputs, amax, E, M)
    return _call(ScaledE4M3Function, inputs, amax, E, M)


def fake_quantize_affine(
    inputs: Tensor, step_size: Tensor | float, zero_point: Tensor | int, lo: int, hi: int
) -> Tensor:
    """QuantizeLinear followed by DequantizeLinear, as ONNX defines them, with the straight-through gradient.

    ``(clamp(round_half_to_even(inputs / step_size) + zero_point, lo, hi) - zero_point) * step_size``. The gradient is
    1 in the representable range ``[(lo - zero_point) * step_size, (hi - zero_point) * step_size]``, ends included.

    Args:
        inputs: float16, bfloat16, float32 or float64, any shape; 16 bits are computed in float32.
        step_size: positive, ONNX's ``scale``; broadcasts to ``inputs``.
        zero_point: the code of 0; integer values, any dtype; broadcasts to ``inputs``.
        lo: the smallest code.
        hi: the largest code.

    Raises:
        ValueError: a step size that is 0 or negative; a parameter that does not broadcast; ``lo`` not below ``hi``.
        TypeError: inputs of another dtype.
    """
    if lo >= hi:
        raise ValueError(f"lo must be below hi, got lo={lo} and hi={hi}")
    step, zero = _as_parameter(step_size, inputs), _as_parameter(zero_point, inputs)
    return _call(FakeQuantizeAffineFunction, inputs, step, zero, lo, hi)


__all__ = [
    "FakeAffineTensorQuantFunction",
    "FakeQuantizeAffineFunction",
    "FakeTensorQuantFunction",
    "LegacyFakeTensorQuantFunction",
    "ScaledE4M3Function",
    "TensorQuantFunction",
    "fake_affine_tensor_quant",
    "fake_quantize_affine",
    "fake_tensor_quant",
    "legacy_fake_tensor_quant",
    "scaled_e4m3",
    "tensor_quant",
]
