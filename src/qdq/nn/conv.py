"""Quantized convolutions in one, two and three dimensions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import Conv1d, Conv2d, Conv3d, _ConvNd

from ..descriptor import (
    QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL,
    QuantDescriptor,
)
from .quantized_module import QuantMixin, pop_quant_desc_in_kwargs

_Size = int | tuple[int, ...]


class ConvConstructor(QuantMixin, nn.Module):
    """The constructor of both kinds of convolution, for bases that name it before `torch.nn`'s private one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: str | tuple[int, ...],
        dilation: tuple[int, ...],
        transposed: bool,
        output_padding: tuple[int, ...],
        groups: int,
        bias: bool,
        padding_mode: Any,
        quant_desc_input: QuantDescriptor,
        quant_desc_weight: QuantDescriptor,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        sizes = (kernel_size, stride, padding, dilation, transposed, output_padding)
        super().__init__(in_channels, out_channels, *sizes, groups, bias, padding_mode, device=device, dtype=dtype)
        self.init_quantizer(quant_desc_input, quant_desc_weight)


class QuantConvNd(ConvConstructor, _ConvNd):
    """What the quantized convolutions share; also a base for convolutions of one's own.

    The input is quantized first and padded after it. Zero is a code of every symmetric quantizer and the other
    padding modes repeat values of the input, so padding never leaves the codes, and it does not change amax.

    Args:
        in_channels ... padding_mode: as `torch.nn.modules.conv._ConvNd`, in its order; tuples, not numbers.
        quant_desc_input: how to quantize the input.
        quant_desc_weight: how to quantize the weight.
        device, dtype: of the parameters.

    Raises:
        ValueError: a descriptor with `fake_quant=False`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of the quantized, then padded, input with the quantized weight."""
        return self._conv_forward(self._input_quantizer(input), self._weight_quantizer(self.weight), self.bias)


class _QuantConv(QuantConvNd):
    """The constructor of the classes below. They name torch's class, because `torch.nn` may have been patched."""

    _float_class: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: str | _Size = 0,
        dilation: _Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        descriptors = pop_quant_desc_in_kwargs(type(self), **kwargs)
        sizes = (kernel_size, stride, padding, dilation)
        self._float_class.__init__(self, in_channels, out_channels, *sizes, groups, bias, padding_mode, device, dtype)
        self.init_quantizer(*descriptors)


class QuantConv1d(_QuantConv, Conv1d):
    """`torch.nn.Conv1d` with a quantized input and a quantized weight (default: one amax per output channel).

    The input is quantized first and padded after it, in every padding mode.

    Args:
        in_channels ... dtype: as `torch.nn.Conv1d`, in its order.
        **kwargs: `quant_desc_input`, `quant_desc_weight`.

    Raises:
        TypeError: other keywords.
        ValueError: a descriptor with `fake_quant=False`; what torch refuses.
    """

    _float_class = Conv1d
    default_quant_desc_weight = QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL


class QuantConv2d(_QuantConv, Conv2d):
    """`torch.nn.Conv2d` with a quantized input and a quantized weight: as :class:`QuantConv1d`."""

    _float_class = Conv2d
    default_quant_desc_weight = QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL


class QuantConv3d(_QuantConv, Conv3d):
    """`torch.nn.Conv3d` with a quantized input and a quantized weight: as :class:`QuantConv1d`."""

    _float_class = Conv3d
    default_quant_desc_weight = QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL
