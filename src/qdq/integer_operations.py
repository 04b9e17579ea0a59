"""Operations simulated in the integer arithmetic of ONNX Runtime, so that a deployed file gives the very same codes.

Simulated in float32, a sum that lies within rounding of the middle between two codes may fall to the other side than in
the runtime. One such code in a million is harmless in itself, but deep networks spread it. So, in inference, the
operations below compute what the runtime's kernels do: exact integer sums, and the same few float32 operations after
them. The result lies on the grid of the quantizer that follows, which finds nothing left to round.

Where gradients are recorded, while a graph is captured or compiled, and while a quantizer around the operation is
disabled or collecting, the plain PyTorch operation runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .affine_quantizer import AffineQuantizer
from .constant_quantizers import BiasQuantizer, WeightQuantizer

Quantizer = AffineQuantizer | WeightQuantizer | BiasQuantizer
# float32 holds every integer up to here: sums that stay below are exact in whatever order they are added.
EXACT_FLOAT32 = 2**24


class IntegerOperation(nn.Module):
    """An operation between quantizers: exact in inference, the plain operation otherwise.

    Args:
        operation: the `torch.ops.aten` overload.
        inputs: quantizers of the tensor operands.
        output: quantizer of the result.
        constants: quantizers of weight and bias.
    """

    def __init__(
        self,
        operation: Callable[..., Tensor],
        inputs: tuple[AffineQuantizer, ...],
        output: AffineQuantizer,
        constants: tuple[WeightQuantizer | BiasQuantizer, ...] = (),
    ) -> None:
        super().__init__()
        self.operation = operation
        # Tuples: the quantizers belong to the tensors, not to this module, and are not registered here.
        self.inputs, self.output, self.constants = inputs, (output,), constants

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


class IntegerConvolution(IntegerOperation):
    """QLinearConv: exact sums of codes and int32 bias; times step_x * step_w / step_y in float32; half to even."""

    def exact(self, *args: Any) -> Tensor:
        x, weight = args[:2]
        bias, rest = args[2] if len(args) > 2 else None, list(args[3:])
        input_step, output_step = self.inputs[0].step_size, self.output[0].step_size
        quantizer = self.constants[0]
        assert isinstance(quantizer, WeightQuantizer)
        step = quantizer.step_size
        shape = [-1 if i == 0 else 1 for i in range(weight.dim())] if step.dim() else []
        codes = torch.round(weight / step.reshape(shape))
        sums = self._sums(torch.round(x / input_step), codes, rest)
        channels = [1, -1, *[1] * (sums.dim() - 2)] if step.dim() else []
        if bias is not None:
            integers = torch.round(bias.double() / (input_step.double() * step.double()))
            sums = sums.double() + integers.reshape([1, -1, *[1] * (sums.dim() - 2)])
        return self._on_grid(torch.round(sums.float() * ((input_step * step) / output_step).reshape(channels)))

    def _sums(self, x: Tensor, weight: Tensor, rest: list[Any]) -> Tensor:
        largest = float(weight.abs().flatten(1).sum(1).max()) * float(x.abs().max()) if x.numel() else 0.0
        if largest < EXACT_FLOAT32:
            return self.operation(x, weight, None, *rest)
        # Two digits of 4 bits: each sum fits float32, and a float64 convolution would be many times slower.
        high = torch.round(weight / 16)
        low = weight - 16 * high
        if 8 * weight[0].numel() * 255 >= EXACT_FLOAT32:
            return self.operation(x.double(), weight.double(), None, *rest)
        upper = self.operation(x, high, None, *rest).double()
        return upper.mul_(16).add_(self.operation(x, low, None, *rest))


class IntegerAdd(IntegerOperation):
    """QLinearAdd: fma(a, s_a / s_y, fma(b, s_b / s_y, fixed)) in float32, the zero points in `fixed`; half to even."""

    def exact(self, *args: Any) -> Tensor:
        (first, second), output = self.inputs, self.output[0]
        a, b = _codes(args[0], first), _codes(args[1], second)
        ratio_a, ratio_b = first.step_size / output.step_size, second.step_size / output.step_size
        zero_a, zero_b, zero = (float(q.zero_point) for q in (first, second, output))
        fixed = (zero - _fma(ratio_a, zero_a, (ratio_b * zero_b).double()).double()).float()
        value = _fma(a, ratio_a, _fma(b, ratio_b, fixed.double()).double())
        return self._on_grid(torch.round(value) - zero)


class IntegerMul(IntegerOperation):
    """QLinearMul: fma((a - z_a) * (b - z_b), s_a * s_b / s_y, z_y) in float32; half to even."""

    def exact(self, *args: Any) -> Tensor:
        (first, second), output = self.inputs, self.output[0]
        product = torch.round(args[0] / first.step_size) * torch.round(args[1] / second.step_size)
        zero = output.zero_point.double()
        ratio = first.step_size * second.step_size / output.step_size
        return self._on_grid(torch.round(_fma(product, ratio, zero)) - zero.float())


class IntegerGlobalAverage(IntegerOperation):
    """QLinearGlobalAveragePool: the exact sum of codes, times s_x / (s_y * size) in float32; half to even."""

    def exact(self, *args: Any) -> Tensor:
        x, dims = args[0], args[1]
        source, output = self.inputs[0], self.output[0]
        size = float(torch.Size([x.shape[d] for d in dims]).numel())
        sums = torch.round(x / source.step_size).double().sum(dims, keepdim=True).float()
        return self._on_grid(torch.round(sums * (source.step_size / (output.step_size * size))))


def _active(quantizer: Quantizer) -> bool:
    if isinstance(quantizer, AffineQuantizer):
        return quantizer.enabled and quantizer.calibrated and quantizer.collector is None
    return quantizer.enabled


def _codes(x: Tensor, quantizer: AffineQuantizer) -> Tensor:
    return torch.round(x / quantizer.step_size) + float(quantizer.zero_point)


def _fma(x: Tensor, y: Tensor | float, z: Tensor) -> Tensor:
    """x * y + z rounded once to float32; products of codes and ratios are exact in float64."""
    return (x.double() * y + z).float()
