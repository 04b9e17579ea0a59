"""Instance normalization with a quantized input, in one to three dimensions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .quantized_module import QuantInputMixin, pop_quant_desc_in_kwargs


class _QuantInstanceNorm(QuantInputMixin, nn.Module):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        # A keyword of newer versions of PyTorch; older ones refuse it themselves.
        newer = {"bias": kwargs.pop("bias")} if "bias" in kwargs else {}
        descriptor = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **newer)
        self.init_quantizer(descriptor)

    def forward(self, input: Tensor) -> Any:
        """The instance norm of the quantized input."""
        return super().forward(self._input_quantizer(input))


class QuantInstanceNorm1d(_QuantInstanceNorm, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` of the quantized input; its arguments and `quant_desc_input`."""


class QuantInstanceNorm2d(_QuantInstanceNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` of the quantized input; its arguments and `quant_desc_input`."""


class QuantInstanceNorm3d(_QuantInstanceNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` of the quantized input; its arguments and `quant_desc_input`."""
