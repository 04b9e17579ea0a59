"""Quantized transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, _ConvTransposeNd

from ..descriptor import QuantDescriptor
from .conv import ConvConstructor
from .quantized_module import pop_quant_desc_in_kwargs

# A transposed convolution's weight is (in, out / groups, ...): its output channels are on axis 1. The predefined
# descriptors QUANT_DESC_8BIT_CONVTRANSPOSE*_WEIGHT_PER_CHANNEL keep the published axis 0, which is less accurate.
_PER_OUTPUT_CHANNEL = QuantDescriptor(num_bits=8, axis=1)
_Size = int | tuple[int, ...]
_FUNCTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class QuantConvTransposeNd(ConvConstructor, _ConvTransposeNd):
    """What the quantized transposed convolutions share; also a base for ones of one's own.

    Args:
        in_channels ... padding_mode: as `torch.nn.modules.conv._ConvTransposeNd`, in its order; tuples, not numbers.
        quant_desc_input: how to quantize the input.
        quant_desc_weight: how to quantize the weight.
        device, dtype: of the parameters.

    Raises:
        ValueError: a descriptor with `fake_quant=False`; a padding mode other than "zeros".
    """

    default_quant_desc_weight = _PER_OUTPUT_CHANNEL

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The transposed convolution of the quantized input with the quantized weight.

        Args:
            input: with or without a batch axis.
            output_size: the wanted size, spatial or whole: chooses among those that the strides leave open.

        Raises:
            ValueError: a size that cannot be had.
        """
        spatial = len(self.kernel_size)
        # torch types these as lists, and takes tuples.
        size: Any = None if output_size is None else list(output_size)
        stride: Any = self.stride
        padding: Any = self.padding
        kernel_size: Any = self.kernel_size
        dilation: Any = self.dilation
        output_padding = self._output_padding(input, size, stride, padding, kernel_size, spatial, dilation)
        quantized, weight = self._input_quantizer(input), self._weight_quantizer(self.weight)
        function: Any = _FUNCTIONS[spatial]
        return function(quantized, weight, self.bias, stride, padding, output_padding, self.groups, dilation)


class _QuantConvTranspose(QuantConvTransposeNd):
    """The constructor of the classes below. They name torch's class, because `torch.nn` may have been patched."""

    _float_class: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: _Size = 0,
        output_padding: _Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _Size = 1,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        descriptors = pop_quant_desc_in_kwargs(type(self), **kwargs)
        sizes = (kernel_size, stride, padding, output_padding)
        others = (groups, bias, dilation, padding_mode, device, dtype)
        self._float_class.__init__(self, in_channels, out_channels, *sizes, *others)
        self.init_quantizer(*descriptors)


class QuantConvTranspose1d(_QuantConvTranspose, ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with quantized input and weight (default: one amax per output channel, axis 1).

    Args:
        in_channels ... dtype: as `torch.nn.ConvTranspose1d`, in its order.
        **kwargs: `quant_desc_input`, `quant_desc_weight`.

    Raises:
        TypeError: other keywords.
        ValueError: a descriptor with `fake_quant=False`; a padding mode other than "zeros".
    """

    _float_class = ConvTranspose1d
    # Every class has a default of its own: setting one does not change the others.
    default_quant_desc_weight = _PER_OUTPUT_CHANNEL


class QuantConvTranspose2d(_QuantConvTranspose, ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with quantized input and weight: as :class:`QuantConvTranspose1d`."""

    _float_class = ConvTranspose2d
    default_quant_desc_weight = _PER_OUTPUT_CHANNEL


class QuantConvTranspose3d(_QuantConvTranspose, ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with quantized input and weight: as :class:`QuantConvTranspose1d`."""

    _float_class = ConvTranspose3d
    default_quant_desc_weight = _PER_OUTPUT_CHANNEL
