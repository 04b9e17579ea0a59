"""Operations simulated in the integer arithmetic of ONNX Runtime, so that a deployed file gives the very same codes.

Simulated in float32, a sum that lies within rounding of the middle between two codes may fall to the other side than in
the runtime. One such code in a million is harmless in itself, but deep networks spread it. So, in inference, the
operations below compute what the runtime's kernels do: exact integer sums, and the same few float32 operations after
them. The result lies on the grid of the quantizer that follows, which finds nothing left to round.

Where gradients are recorded, while a graph is captured or compiled, and while a quantizer around the operation is
disabled, the plain PyTorch operation runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .affine_quantizer import AffineQuantizer
from .constant_quantizers import BiasQuantizer, WeightQuantizer
from .kernels.engine import for_tensor
from .kernels.reference import fma
from .remembered import Remembered, can_remember

Quantizer = AffineQuantizer | WeightQuantizer | BiasQuantizer
# float32 holds every integer up to here: sums that stay below are exact in whatever order they are added.
EXACT_FLOAT32 = 2**24


class IntegerOperation(nn.Module):
    """An operation between quantizers: exact in inference, the plain operation otherwise.

    Args:
        operation: the `torch.ops.aten` overload.
        inputs: quantizers of the tensor operands.
        output: quantizer of the result; None where it is float.
        constants: quantizers of weight and bias.
    """

    def __init__(
        self,
        operation: Callable[..., Tensor],
        inputs: tuple[AffineQuantizer, ...],
        output: AffineQuantizer | None,
        constants: tuple[WeightQuantizer | BiasQuantizer, ...] = (),
    ) -> None:
        super().__init__()
        self.operation = operation
        # Tuples: the quantizers belong to the tensors, not to this module, and are not registered here.
        self.inputs, self.constants = inputs, constants
        self.output: tuple[AffineQuantizer, ...] = () if output is None else (output,)

    def forward(self, *args: Any) -> Tensor:
        """The operation's result for its own arguments."""
        training = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if training or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
            return self.operation(*args)
        around: tuple[Quantizer, ...] = (*self.inputs, *self.output, *self.constants)
        if not all(_active(q) for q in around):
            return self.operation(*args)
        return self.exact(*args)

    def exact(self, *args: Any) -> Tensor:
        """The result on the output's grid, as the runtime computes it."""
        raise NotImplementedError  # pragma: no cover

    def _on_grid(self, codes: Tensor) -> Tensor:
        return codes * self.output[0].step_size

    def extra_repr(self) -> str:
        """The operation that is simulated."""
        return str(getattr(self.operation, "__name__", self.operation)).split(".")[0]


@dataclass(frozen=True)
class _ConvolutionConstants:
    """What an integer convolution needs of its weight and bias, in codes.

    Attributes:
        weight: the codes, float32.
        reach: the largest sum of their magnitudes over the output channels: how a sum grows with the input's codes.
        bias: int32 codes as float64, or None.
        ratio: step of the sums over step of the result, float32.
        half_reach: the same over one half of the input channels, the larger of the two; infinite without halves.
    """

    weight: Tensor
    reach: float
    bias: Tensor | None
    ratio: Tensor
    half_reach: float


class IntegerConvolution(IntegerOperation):
    """QLinearConv: exact sums of codes and int32 bias; times step_x * step_w / step_y in float32; half to even."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._remembered = Remembered()

    def exact(self, *args: Any) -> Tensor:
        x, weight = args[:2]
        bias, rest = args[2] if len(args) > 2 else None, list(args[3:])
        input_step, output_step = self.inputs[0].step_size, self.output[0].step_size
        quantizer = self.constants[0]
        assert isinstance(quantizer, WeightQuantizer)

        def in_codes() -> _ConvolutionConstants:
            step = quantizer.step_size
            shape = [-1 if i == 0 else 1 for i in range(weight.dim())] if step.dim() else []
            codes = torch.round(weight / step.reshape(shape))
            reach = float(codes.abs().flatten(1).sum(1).max()) if codes.numel() else 0.0
            integers = None
            if bias is not None:
                integers = torch.round(bias.double() / (input_step.double() * step.double()))
            return _ConvolutionConstants(codes, reach, integers, (input_step * step) / output_step, _half_reach(codes))

        # Weight and bias come from their quantizers, which keep what they gave.
        kept = (weight,) if bias is None else (weight, bias)
        settings = input_step, output_step, quantizer.step_size
        if can_remember(weight):
            constants = self._remembered.get(in_codes, *settings, kept=kept)
        else:
            constants = in_codes()
        run = for_tensor(x)
        sums = self._sums(_multiples(x, self.inputs[0]), constants, rest)
        return run.requantize(sums, constants.bias, constants.ratio, output_step)

    def _sums(self, x: Tensor, constants: _ConvolutionConstants, rest: list[Any]) -> list[Tensor]:
        """The sums of products of codes, exact, in parts that are still to be added."""
        weight = constants.weight
        largest = _largest_multiple(self.inputs[0])
        if constants.reach * largest >= EXACT_FLOAT32 and x.numel():
            largest = float(for_tensor(x).absmax(x))
        if constants.reach * largest < EXACT_FLOAT32:
            return [self.operation(x, weight, None, *rest)]
        groups, half = rest[3] if len(rest) > 3 else 1, weight.shape[1] // 2
        if groups == 1 and constants.half_reach * largest < EXACT_FLOAT32:
            # As much work as at once, but each sum is short enough for float32.
            return [
                self.operation(x[:, :half], weight[:, :half], None, *rest),
                self.operation(x[:, half:], weight[:, half:], None, *rest),
            ]
        # Two digits of 4 bits: each sum fits float32, and a float64 convolution would be many times slower.
        high = torch.round(weight / 16)
        low = weight - 16 * high
        if 8 * weight[0].numel() * 255 >= EXACT_FLOAT32:
            return [self.operation(x.double(), weight.double(), None, *rest)]
        upper = self.operation(x, high, None, *rest).double()
        return [upper.mul_(16).add_(self.operation(x, low, None, *rest))]


class IntegerAdd(IntegerOperation):
    """QLinearAdd: fma(a, s_a / s_y, fma(b, s_b / s_y, fixed)) in float32, the zero points in `fixed`; half to even."""

    def exact(self, *args: Any) -> Tensor:
        quantizers = (*self.inputs, self.output[0])
        steps = tuple(q.step_size for q in quantizers)
        zero_points = tuple(q.zero_point for q in quantizers)
        return for_tensor(args[0]).add_codes(args[0], args[1], steps, zero_points)


class IntegerMul(IntegerOperation):
    """QLinearMul: fma((a - z_a) * (b - z_b), s_a * s_b / s_y, z_y) in float32; half to even."""

    def exact(self, *args: Any) -> Tensor:
        (first, second), output = self.inputs, self.output[0]
        product = torch.round(args[0] / first.step_size) * torch.round(args[1] / second.step_size)
        zero = output.zero_point.double()
        ratio = first.step_size * second.step_size / output.step_size
        return self._on_grid(torch.round(fma(product, ratio, zero)) - zero.float())


class IntegerGlobalAverage(IntegerOperation):
    """QLinearGlobalAveragePool: the exact sum of codes, times s_x / (s_y * size) in float32; half to even."""

    def exact(self, *args: Any) -> Tensor:
        x, dims = args[0], args[1]
        source, output = self.inputs[0], self.output[0]
        size = float(torch.Size([x.shape[d] for d in dims]).numel())
        sums = torch.round(x / source.step_size).double().sum(dims, keepdim=True).float()
        return self._on_grid(torch.round(sums * (source.step_size / (output.step_size * size))))


class BlockRounding(IntegerOperation):
    """MatMulNBits of ONNX Runtime at accuracy level 4, its default: what it reads is rounded to int8, block by block.

    Every `block_size` neighbours along the last axis of the input share a step size, absmax / 127, found in each call.
    The products are then exact within a block, so that the plain operation on the rounded input is what is computed.

    Args:
        weights: quantizer of the weight.
        block_size: as the runtime's kernel has it: that of the weight.
    """

    def __init__(self, weights: WeightQuantizer, block_size: int) -> None:
        super().__init__(torch.ops.aten.alias.default, (), None, (weights,))
        self.block_size = block_size

    def exact(self, *args: Any) -> Tensor:
        """The rounded input, of its shape."""
        (x,) = args
        blocks = F.pad(x, (0, -x.shape[-1] % self.block_size)).unflatten(-1, (-1, self.block_size))
        amax = blocks.abs().amax(-1, keepdim=True)
        # Not 1 / step: values that lie between two codes fall to the same side as in the runtime. And tensor by tensor:
        # PyTorch divides a number by a tensor with an error of one unit in the last place.
        bound = torch.full_like(amax, 127)
        inverse = torch.where(amax > 0, bound / amax, 0.0)
        return (torch.round(blocks * inverse) * (amax / bound)).flatten(-2)[..., : x.shape[-1]]

    def extra_repr(self) -> str:
        """The block size."""
        return f"int8, blocks of {self.block_size}"


def _active(quantizer: Quantizer) -> bool:
    if isinstance(quantizer, AffineQuantizer):
        return quantizer.enabled and quantizer.calibrated
    return quantizer.enabled


def _multiples(x: Tensor, quantizer: AffineQuantizer) -> Tensor:
    """Values of a quantizer's grid in units of its step: integers, in float32."""
    zero = torch.zeros_like(quantizer.step_size)
    return for_tensor(x).affine_quantize(x, quantizer.step_size, zero, -EXACT_FLOAT32, EXACT_FLOAT32)


def _largest_multiple(quantizer: AffineQuantizer) -> float:
    zero = float(quantizer.zero_point)
    return max(quantizer.hi - zero, zero - quantizer.lo)


def _half_reach(weight: Tensor) -> float:
    """The largest sum of magnitudes over the first or the second half of the input channels; infinite without both."""
    half = weight.shape[1] // 2
    halves = [part.abs().flatten(1).sum(1).max() for part in (weight[:, :half], weight[:, half:]) if part.numel()]
    return float(max(halves)) if len(halves) == 2 else math.inf
