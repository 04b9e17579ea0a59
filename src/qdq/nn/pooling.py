"""Pooling layers with a quantized input: max, average and adaptive average, in one to three dimensions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .quantized_module import QuantInputMixin, pop_quant_desc_in_kwargs

# Every family has a forward of its own: torch.compile stops at eight compilations of one function.
_Size = int | tuple[int, ...]


class _QuantMaxPool(QuantInputMixin, nn.Module):
    def __init__(
        self,
        kernel_size: _Size,
        stride: _Size | None = None,
        padding: _Size = 0,
        dilation: _Size = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        descriptor = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
        self.init_quantizer(descriptor)

    def forward(self, input: Tensor) -> Any:
        """The pool of the quantized input."""
        return super().forward(self._input_quantizer(input))


class QuantMaxPool1d(_QuantMaxPool, nn.MaxPool1d):
    """`torch.nn.MaxPool1d` of the quantized input; its arguments and `quant_desc_input`."""


class QuantMaxPool2d(_QuantMaxPool, nn.MaxPool2d):
    """`torch.nn.MaxPool2d` of the quantized input; its arguments and `quant_desc_input`."""


class QuantMaxPool3d(_QuantMaxPool, nn.MaxPool3d):
    """`torch.nn.MaxPool3d` of the quantized input; its arguments and `quant_desc_input`."""


class QuantAvgPool1d(QuantInputMixin, nn.AvgPool1d):
    """`torch.nn.AvgPool1d` of the quantized input; its arguments and `quant_desc_input`."""

    def __init__(
        self,
        kernel_size: int | tuple[int],
        stride: Any = None,
        padding: int | tuple[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        **kwargs: Any,
    ) -> None:
        descriptor = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(kernel_size, stride, padding, ceil_mode, count_include_pad)
        self.init_quantizer(descriptor)

    def forward(self, input: Tensor) -> Any:
        """The pool of the quantized input."""
        return super().forward(self._input_quantizer(input))


class _QuantAvgPool(QuantInputMixin, nn.Module):
    def __init__(
        self,
        kernel_size: _Size,
        stride: _Size | None = None,
        padding: _Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        **kwargs: Any,
    ) -> None:
        descriptor = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        self.init_quantizer(descriptor)

    def forward(self, input: Tensor) -> Any:
        """The pool of the quantized input."""
        return super().forward(self._input_quantizer(input))


class QuantAvgPool2d(_QuantAvgPool, nn.AvgPool2d):
    """`torch.nn.AvgPool2d` of the quantized input; its arguments and `quant_desc_input`."""


class QuantAvgPool3d(_QuantAvgPool, nn.AvgPool3d):
    """`torch.nn.AvgPool3d` of the quantized input; its arguments and `quant_desc_input`."""


class _QuantAdaptiveAvgPool(QuantInputMixin, nn.Module):
    def __init__(self, output_size: int | tuple[int | None, ...] | None, **kwargs: Any) -> None:
        descriptor = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(output_size)
        self.init_quantizer(descriptor)

    def forward(self, input: Tensor) -> Any:
        """The pool of the quantized input."""
        return super().forward(self._input_quantizer(input))


class QuantAdaptiveAvgPool1d(_QuantAdaptiveAvgPool, nn.AdaptiveAvgPool1d):
    """`torch.nn.AdaptiveAvgPool1d` of the quantized input; its arguments and `quant_desc_input`."""


class QuantAdaptiveAvgPool2d(_QuantAdaptiveAvgPool, nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d` of the quantized input; its arguments and `quant_desc_input`."""


class QuantAdaptiveAvgPool3d(_QuantAdaptiveAvgPool, nn.AdaptiveAvgPool3d):
    """`torch.nn.AdaptiveAvgPool3d` of the quantized input; its arguments and `quant_desc_input`."""
