"""Quantized LSTM: the layer and the cell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from ..calib.quantized_weights import QuantizedWeight
from ..descriptor import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
from ..quantizer import TensorQuantizer
from .quantized_module import QuantMixin, pop_quant_desc_in_kwargs
from .recurrent import QuantRecurrent, States, Step, check_proj_size, reset_own_parameters


class QuantLSTM(QuantRecurrent):
    """`torch.nn.LSTM` with quantized inputs and weights.

    Each layer and direction has one input quantizer, called at every time step on `cat([x, h], 1)`, and one weight
    quantizer, called once per forward on `cat([w_ih, w_hh], 1)` (default: one amax per row, so per gate and hidden
    unit). They stand in the lists `_input_quantizers` and `_weight_quantizers` at the index
    layer * directions + direction; `input_quantizer` and `weight_quantizer` are these lists. Biases are not quantized.
    Parameters are named as torch's, so that state dicts pass both ways.

    The time steps are unrolled: an exported or compiled graph has a fixed sequence length. The class derives from
    `torch.nn.RNNBase`, not from `torch.nn.LSTM`, whose instances `torch.compile` does not take.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as `torch.nn.LSTM`.
        proj_size: 0.
        device, dtype: as `torch.nn.LSTM`.
        **kwargs: `quant_desc_input`, `quant_desc_weight`.

    Raises:
        TypeError: other keywords.
        ValueError: `proj_size` is not 0; a descriptor with `fake_quant=False`.
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
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_proj_size(proj_size)
        descriptors = pop_quant_desc_in_kwargs(type(self), **kwargs)
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype
        )
        self.init_quantizer(*descriptors, num_layers=self._num_cells())

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """As `torch.nn.LSTM`, for a batch of sequences.

        Args:
            input: (time, batch, input_size), (batch, time, input_size) if `batch_first`, or a `PackedSequence`, sorted
                or not.
            hx: h and c before the first step, each (layers * directions, batch, hidden_size); default: zeros.

        Returns:
            The hidden states of the last layer in the form of `input`, and (h, c) after the last step.

        Raises:
            RuntimeError: an input that is not 3-d, without a time step or with another number of features; an `hx` of
                another shape.
            TypeError: `hx` is not a pair.
            ValueError: an input or `hx` of another dtype than the weights.
        """
        _check_pair(self, hx)
        output, (h, c) = self._evaluate(input, hx, num_states=2)
        return output, (h, c)

    def _make_step(
        self, quantizer: TensorQuantizer, weight: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None
    ) -> Step:
        return _lstm_step(quantizer, weight, bias_ih, bias_hh)


class QuantLSTMCell(nn.LSTMCell, QuantMixin):
    """`torch.nn.LSTMCell` with a quantized input and weight.

    `_input_quantizer` is called on `cat([x, h], 1)`, `_weight_quantizer` on `cat([w_ih, w_hh], 1)` (default: one amax
    per row). Biases are not quantized.

    Args:
        input_size, hidden_size, bias, device, dtype: as `torch.nn.LSTMCell`.
        **kwargs: `quant_desc_input`, `quant_desc_weight`.

    Raises:
        TypeError: other keywords.
        ValueError: a descriptor with `fake_quant=False`.
    """

    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        descriptors = pop_quant_desc_in_kwargs(type(self), **kwargs)
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.init_quantizer(*descriptors)

    def quantized_weights(self) -> Iterator[QuantizedWeight]:
        """The two weights of the cell, which share a quantizer."""
        yield "weight_ih and weight_hh", [self.weight_ih, self.weight_hh], self._weight_quantizer

    def reset_parameters(self) -> None:
        """As `torch.nn` does, but leaves the learned ranges of the quantizers alone."""
        reset_own_parameters(self, self.hidden_size)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """h and c after one time step.

        Args:
            input: (batch, input_size) or (input_size).
            hx: h and c before it, each (batch, hidden_size) or (hidden_size); default: zeros.

        Raises:
            RuntimeError: an input of another rank or number of features; an `hx` of another shape.
            TypeError: `hx` is not a pair.
        """
        _check_pair(self, hx)
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"{type(self).__name__} needs an input of shape (batch, {self.input_size}) or ({self.input_size},), "
                f"got {tuple(input.shape)}"
            )
        shape = (*input.shape[:-1], self.hidden_size)
        if hx is None:
            hx = (input.new_zeros(shape), input.new_zeros(shape))
        for i, state in enumerate(hx):
            if state.shape != shape:
                raise RuntimeError(
                    f"{type(self).__name__}: hx[{i}] must have the shape {shape}, got {tuple(state.shape)}"
                )
        weight = self._weight_quantizer(torch.cat([self.weight_ih, self.weight_hh], 1))
        step = _lstm_step(self._input_quantizer, weight, self.bias_ih, self.bias_hh)
        if input.dim() == 2:
            h, c = step(input, hx)
            return h, c
        h, c = step(input.unsqueeze(0), (hx[0].unsqueeze(0), hx[1].unsqueeze(0)))
        return h.squeeze(0), c.squeeze(0)


def _check_pair(module: nn.Module, hx: Any) -> None:
    if hx is not None and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
        raise TypeError(f"{type(module).__name__}: hx must be a pair (h, c), got {type(hx).__name__}")


def _lstm_step(quantizer: TensorQuantizer, weight: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None) -> Step:
    """The equations of `torch.nn.LSTM`, with one product of the quantized `cat([x, h], 1)` by `weight`."""
    bias = None if bias_ih is None or bias_hh is None else bias_ih + bias_hh

    def step(x: Tensor, states: States) -> States:
        h, c = states
        i, f, g, o = F.linear(quantizer(torch.cat([x, h], 1)), weight, bias).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    return step
