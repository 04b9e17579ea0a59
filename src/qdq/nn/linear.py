"""Quantized fully connected layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..descriptor import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
from .quantized_module import QuantMixin, pop_quant_desc_in_kwargs


class QuantLinear(nn.Linear, QuantMixin):
    """`torch.nn.Linear` with a quantized input and a quantized weight (default: one amax per output feature).

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`, in its order.
        **kwargs: `quant_desc_input`, `quant_desc_weight`.

    Raises:
        TypeError: other keywords.
        ValueError: a descriptor with `fake_quant=False`.
    """

    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        descriptors = pop_quant_desc_in_kwargs(type(self), **kwargs)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.init_quantizer(*descriptors)

    def forward(self, input: Tensor) -> Tensor:
        """The linear map of the quantized input by the quantized weight."""
        return F.linear(self._input_quantizer(input), self._weight_quantizer(self.weight), self.bias)
