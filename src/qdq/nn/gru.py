"""Quantized GRU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from ..quantizer import TensorQuantizer
from .quantized_module import pop_quant_desc_in_kwargs
from .recurrent import QuantRecurrent, States, Step


class QuantGRU(QuantRecurrent):
    """`torch.nn.GRU` with quantized inputs and weights.

    Each layer and direction has one input quantizer, called at every time step on `cat([x, h], 1)`, and one weight
    quantizer, called once per forward on `cat([w_ih, w_hh], 1)` (default: one amax per row), as
    :class:`qdq.nn.QuantLSTM` has. After quantization both are split again, because the reset gate scales the product
    with h alone: `n = tanh(W_in x + b_in + r * (W_hn h + b_hn))`. The quantizers stand in the lists
    `_input_quantizers` and `_weight_quantizers` at the index layer * directions + direction; `input_quantizer` and
    `weight_quantizer` are these lists. The h in `(1 - z) * n + z * h` and the biases are not quantized. Parameters are
    named as torch's, so that state dicts pass both ways.

    The time steps are unrolled: an exported or compiled graph has a fixed sequence length. The class derives from
    `torch.nn.RNNBase`, not from `torch.nn.GRU`, whose instances `torch.compile` does not take.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as `torch.nn.GRU`.
        device, dtype: as `torch.nn.GRU`.
        **kwargs: `quant_desc_input`, `quant_desc_weight`.

    Raises:
        TypeError: other keywords.
        ValueError: a descriptor with `fake_quant=False`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        descriptors = pop_quant_desc_in_kwargs(type(self), **kwargs)
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype
        )
        self.init_quantizer(*descriptors, num_layers=self._num_cells())

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """As `torch.nn.GRU`, for a batch of sequences.

        Args:
            input: (time, batch, input_size), (batch, time, input_size) if `batch_first`, or a `PackedSequence`, sorted
                or not.
            hx: h before the first step, (layers * directions, batch, hidden_size); default: zeros.

        Returns:
            The hidden states of the last layer in the form of `input`, and h after the last step.

        Raises:
            TypeError: `hx` is not a tensor.
            RuntimeError: an input that is not 3-d, without a time step or with another number of features; an `hx` of
                another shape.
            ValueError: an input or `hx` of another dtype than the weights.
        """
        if hx is not None and not isinstance(hx, Tensor):
            raise TypeError(f"{type(self).__name__}: hx must be a tensor, got {type(hx).__name__}")
        output, (h,) = self._evaluate(input, None if hx is None else (hx,), num_states=1)
        return output, h

    def _make_step(
        self, quantizer: TensorQuantizer, weight: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None
    ) -> Step:
        of_x, of_h = (
            part.contiguous() for part in weight.split([weight.shape[1] - self.hidden_size, self.hidden_size], 1)
        )

        def step(x: Tensor, states: States) -> States:
            (h,) = states
            quantized = quantizer(torch.cat([x, h], 1))
            x_part = F.linear(quantized[:, : x.shape[1]], of_x, bias_ih)
            h_part = F.linear(quantized[:, x.shape[1] :], of_h, bias_hh)
            (r_x, z_x, n_x), (r_h, z_h, n_h) = x_part.chunk(3, 1), h_part.chunk(3, 1)
            n = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
            return (n + torch.sigmoid(z_x + z_h) * (h - n),)

        return step
