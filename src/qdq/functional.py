"""Quantization as differentiable functions: value checks at the door, one kernel, the straight-through gradient.

The gradient is that of :mod:`qdq.straight_through`; amax, ranges, step sizes and zero points get none.

*Scale* is ``bound / amax``: codes are inputs times scale. ONNX's scale is its inverse, here called *step size*.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .formats import E4M3
from .kernels import checks, engine, operations, reference
from .onnx_form import exports_to_onnx, fake_quantize_as_onnx, reading_sizes
from .straight_through import (
    FakeAffineTensorQuantFunction,
    FakeQuantizeAffineFunction,
    FakeTensorQuantFunction,
    LegacyFakeTensorQuantFunction,
    ScaledE4M3Function,
    TensorQuantFunction,
    as_parameter,
    check_e4m3,
    check_symmetric,
    eager_fake_quantize_affine,
    eager_fake_tensor_quant,
    eager_format,
    require_tensors,
)


def _call(function: Any, inputs: Tensor, *arguments: Any) -> Any:
    """``function.apply``; where no gradient can be asked for, its forward alone, which starts several times faster."""
    require_tensors(inputs=inputs)
    if checks.is_tracing():
        # The exporter of TorchScript looks for `symbolic`, and `torch.jit.trace` compares traces with and without
        # gradients: both see one node.
        with reading_sizes() if exports_to_onnx() else contextlib.nullcontext():
            return function.apply(inputs, *arguments)
    tensors = [inputs, *(a for a in arguments if isinstance(a, Tensor))]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return function.apply(inputs, *arguments)
    # A dual tensor of forward-mode differentiation: let the Function refuse it rather than give a zero tangent.
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(inputs).tangent is not None:
        return function.apply(inputs, *arguments)
    return function.forward(inputs, *arguments)


def _exported_fake_quant(
    inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool, block_size: int | None
) -> Tensor:
    """One node of an exported program, or Q/DQ nodes of an ONNX file."""
    require_tensors(inputs=inputs)
    check_symmetric(reference, inputs, amax, num_bits, unsigned, narrow_range, block_size)
    if exports_to_onnx():
        _refuse_blocks(block_size)
        return fake_quantize_as_onnx(inputs, amax, num_bits, unsigned, narrow_range)
    return operations.fake_tensor_quant(inputs, amax, num_bits, unsigned, narrow_range, block_size)


def _exported_e4m3(inputs: Tensor, amax: Tensor | None, E: int, M: int, block_size: int | None) -> Tensor:
    """One node of an exported program, or TensorRT's nodes of an ONNX file."""
    check_e4m3(inputs, amax, E, M)
    if exports_to_onnx():
        _refuse_blocks(block_size)
        largest = torch.tensor(E4M3.max_value) if amax is None else amax
        return fake_quantize_as_onnx(inputs, largest, (E, M), False, False)
    return operations.scaled_e4m3(inputs, amax, block_size)


def _refuse_blocks(block_size: int | None) -> None:
    if block_size is not None:
        raise NotImplementedError(
            f"block_size={block_size} cannot be exported to ONNX yet: quantize per tensor or per channel"
        )


def _refuse_blocks_in_onnx(block_size: int | None) -> None:
    if block_size is not None and exports_to_onnx():
        _refuse_blocks(block_size)


def tensor_quant(
    inputs: Tensor,
    amax: Tensor | float,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
    *,
    block_size: int | None = None,
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
        block_size: one amax for every ``block_size`` elements of the last axis, of which the last block may be short:
            amax has the shape ``inputs.shape[:-1] + (ceil(n / block_size),)``, or broadcasts to it.

    Returns:
        Codes and scale, both in the dtype of ``inputs``; the scale has the shape of ``amax``.

    Raises:
        ValueError: negative amax; amax that does not broadcast; a scale above 65504 for float16 inputs; a bound that
            is not exact in the dtype of ``inputs``; ``num_bits`` out of range.
        TypeError: a negative input with ``unsigned``; inputs of another dtype.
    """
    _refuse_blocks_in_onnx(block_size)
    amax = as_parameter(amax, inputs)
    return _call(TensorQuantFunction, inputs, amax, num_bits, unsigned, narrow_range, block_size)


def fake_tensor_quant(
    inputs: Tensor,
    amax: Tensor | float,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
    *,
    block_size: int | None = None,
) -> Tensor:
    """Quantize as :func:`tensor_quant` does and divide by the scale, in the dtype of ``inputs``.

    The scale stays in the compute dtype, so that a small amax does not overflow float16. Arguments and errors are
    those of :func:`tensor_quant`, without its two about what the dtype of ``inputs`` can hold.
    """
    if not isinstance(amax, Tensor):
        amax = as_parameter(amax, inputs)
    run = engine.of_eager_call(inputs, amax)
    if run is not None:
        fmt = eager_format(run, amax, num_bits, unsigned, narrow_range)
        if fmt is None:
            fmt = check_symmetric(run, inputs, amax, num_bits, unsigned, narrow_range, block_size)
        if (inputs.requires_grad or amax.requires_grad) and torch.is_grad_enabled():
            return eager_fake_tensor_quant(inputs, amax, run, fmt, block_size)
        return run.symmetric_fake_quantize(inputs, amax, fmt, block_size)
    if torch.compiler.is_exporting():
        return _exported_fake_quant(inputs, amax, num_bits, unsigned, narrow_range, block_size)
    _refuse_blocks_in_onnx(block_size)
    return _call(FakeTensorQuantFunction, inputs, amax, num_bits, unsigned, narrow_range, block_size)


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
    low, high = as_parameter(min_range, inputs), as_parameter(max_range, inputs)
    return _call(FakeAffineTensorQuantFunction, inputs, low, high, num_bits)


def scaled_e4m3(
    inputs: Tensor, amax: Tensor | float | None = None, E: int = 4, M: int = 3, *, block_size: int | None = None
) -> Tensor:
    """Round to the values of the 8-bit floating-point format E4M3, saturating at its largest, 448.

    With ``amax``, values are multiplied by ``448 / amax`` before rounding and divided by it after.
    ``|inputs| < 2**-24`` gives 0. ``block_size`` is that of :func:`tensor_quant`. Source of the format:
    OCP 8-bit Floating Point Specification (OFP8), revision 1.0.

    Raises:
        NotImplementedError: ``E`` and ``M`` other than 4 and 3.
        ValueError: negative amax; amax that does not broadcast.
    """
    amax = None if amax is None else as_parameter(amax, inputs)
    if torch.compiler.is_exporting():
        return _exported_e4m3(inputs, amax, E, M, block_size)
    _refuse_blocks_in_onnx(block_size)
    return _call(ScaledE4M3Function, inputs, amax, E, M, block_size)


def fake_quantize_affine(
    inputs: Tensor,
    step_size: Tensor | float,
    zero_point: Tensor | int,
    lo: int,
    hi: int,
    *,
    block_size: int | None = None,
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
        block_size: one step size and zero point for every ``block_size`` elements of the last axis, as in
            :func:`tensor_quant`.

    Raises:
        ValueError: a step size that is 0 or negative; a parameter that does not broadcast; ``lo`` not below ``hi``.
        TypeError: inputs of another dtype.
    """
    if lo >= hi:
        raise ValueError(f"lo must be below hi, got lo={lo} and hi={hi}")
    step, zero = as_parameter(step_size, inputs), as_parameter(zero_point, inputs)
    run = engine.of_eager_call(inputs, step)
    if run is not None and engine.is_plain(zero):
        if not run.REFUSES_BAD_VALUES:
            checks.check_step_size(step)
        if (inputs.requires_grad or step.requires_grad or zero.requires_grad) and torch.is_grad_enabled():
            return eager_fake_quantize_affine(inputs, step, zero, run, lo, hi, block_size)
        return run.affine_fake_quantize(inputs, step, zero, lo, hi, block_size)
    if torch.compiler.is_exporting() and not exports_to_onnx():
        require_tensors(inputs=inputs)
        return operations.fake_quantize_affine(inputs, step, zero, lo, hi, block_size)
    return _call(FakeQuantizeAffineFunction, inputs, step, zero, lo, hi, block_size)


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
