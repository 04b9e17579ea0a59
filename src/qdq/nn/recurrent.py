"""What the quantized recurrent layers share: the walk over layers, directions and time steps, packed or padded."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from ..calib.quantized_weights import QuantizedWeight
from ..descriptor import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW, QuantDescriptor
from ..kernels.checks import is_tracing
from ..quantizer import TensorQuantizer
from .quantized_module import QuantMixin

# (h,) of a GRU, (h, c) of an LSTM: each of shape (batch, hidden), or stacked (layers * directions, batch, hidden).
States = tuple[Tensor, ...]
# From the input of one time step and the states before it to the states after it.
Step = Callable[[Tensor, States], States]


class QuantRecurrent(QuantMixin, nn.RNNBase):
    """Base of the quantized `torch.nn` recurrent layers.

    Each layer and direction has one input quantizer, called at every time step on `cat([x, h], 1)`, and one weight
    quantizer, called once per forward on `cat([w_ih, w_hh], 1)`. They stand in the lists `_input_quantizers` and
    `_weight_quantizers` at the index layer * directions + direction. Biases are not quantized. The time steps are
    plain PyTorch operations: no fused kernel walks around the quantizers.
    """

    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def add_quantizers(self, quant_desc_input: QuantDescriptor, quant_desc_weight: QuantDescriptor) -> None:
        """Add the lists of quantizers to a module that exists already.

        Raises:
            ValueError: the module has projections; a descriptor with `fake_quant=False`.
        """
        check_proj_size(self.proj_size)
        self._add(quant_desc_input, quant_desc_weight, self._num_cells())

    def reset_parameters(self) -> None:
        """As `torch.nn` does, but leaves the learned ranges of the quantizers alone."""
        reset_own_parameters(self, self.hidden_size)

    def quantized_weights(self) -> Iterator[QuantizedWeight]:
        """The two weights of every layer and direction, with their quantizer."""
        for index, (weights, quantizer) in enumerate(zip(self.all_weights, self._weight_quantizers, strict=True)):
            yield f"weights of cell {index}", list(weights[:2]), quantizer  # pyright: ignore[reportReturnType]

    def _num_cells(self) -> int:
        return self.num_layers * (2 if self.bidirectional else 1)

    @abstractmethod
    def _make_step(
        self, quantizer: TensorQuantizer, weight: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None
    ) -> Step:
        """One time step of a layer and direction; `weight` is `cat([w_ih, w_hh], 1)`, quantized."""

    def _evaluate(
        self, input: Tensor | PackedSequence, states: States | None, num_states: int
    ) -> tuple[Tensor | PackedSequence, States]:
        """The output and the last states, in the form and order of `input` and `states`."""
        if isinstance(input, PackedSequence):
            sizes = input.batch_sizes.tolist()
            order = input.sorted_indices
            if states is not None and order is not None:
                states = tuple(state.index_select(1, order) for state in states)
            data, finals = self._evaluate_sorted(input.data, sizes, states, num_states)
            restore = input.unsorted_indices
            if restore is not None:
                finals = tuple(state.index_select(1, restore) for state in finals)
            return PackedSequence(data, input.batch_sizes, order, restore), finals
        if input.dim() != 3:
            raise RuntimeError(
                f"{type(self).__name__} needs an input of 3 dimensions, got {input.dim()}: give a single sequence a "
                "batch dimension with unsqueeze"
            )
        data, finals = self._evaluate_sorted(
            input.transpose(0, 1) if self.batch_first else input, None, states, num_states
        )
        return (data.transpose(0, 1) if self.batch_first else data), finals

    def _evaluate_sorted(
        self, data: Tensor, sizes: list[int] | None, states: States | None, num_states: int
    ) -> tuple[Tensor, States]:
        """`data` is (time, batch, features), or with `sizes`, the batch size of each step, (sum of sizes, features)."""
        batch = data.shape[1] if sizes is None else sizes[0]
        shape = (self._num_cells(), batch, self.hidden_size)
        if states is None:
            states = tuple(data.new_zeros(shape) for _ in range(num_states))
        if not is_tracing():
            self._check(data, states, shape)
        directions = 2 if self.bidirectional else 1
        finals: list[States] = []
        for layer in range(self.num_layers):
            inputs = data.unbind(0) if sizes is None else data.split(sizes)
            outputs: list[Tensor] = []
            for direction in range(directions):
                index = layer * directions + direction
                start = tuple(state[index] for state in states)
                hidden, final = _scan(self._quantized_step(index), inputs, sizes, start, reverse=direction == 1)
                outputs.append(torch.stack(hidden) if sizes is None else torch.cat(hidden))
                finals.append(final)
            data = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.dropout > 0 and layer + 1 < self.num_layers:
                data = F.dropout(data, self.dropout, self.training)
        return data, tuple(torch.stack(state) for state in zip(*finals, strict=True))

    def _quantized_step(self, index: int) -> Step:
        layer, direction = divmod(index, 2 if self.bidirectional else 1)
        suffix = f"_l{layer}" + ("_reverse" if direction == 1 else "")
        joined = torch.cat([getattr(self, f"weight_ih{suffix}"), getattr(self, f"weight_hh{suffix}")], 1)
        biases = [getattr(self, name + suffix) if self.bias else None for name in ("bias_ih", "bias_hh")]
        quantizer: TensorQuantizer = self._input_quantizers[index]  # pyright: ignore[reportAssignmentType]
        return self._make_step(quantizer, self._weight_quantizers[index](joined), *biases)

    def _check(self, data: Tensor, states: States, shape: tuple[int, int, int]) -> None:
        name = type(self).__name__
        if data.shape[0] == 0:
            raise RuntimeError(f"{name} needs at least one time step, got an empty sequence")
        if data.shape[-1] != self.input_size:
            raise RuntimeError(f"{name} has input_size={self.input_size}, got an input with {data.shape[-1]} features")
        weight: Tensor = self.weight_ih_l0  # pyright: ignore[reportAssignmentType]
        for what, tensor in [("the input", data), *((f"hx[{i}]", state) for i, state in enumerate(states))]:
            if tensor.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
                raise ValueError(f"{name}: {what} is {tensor.dtype}, but the weights are {weight.dtype}: convert one")
        for i, state in enumerate(states):
            if state.shape != shape:
                raise RuntimeError(f"{name}: hx[{i}] must have the shape {shape}, got {tuple(state.shape)}")


def check_proj_size(proj_size: int) -> None:
    """Raises `ValueError` where an LSTM has projections."""
    if proj_size != 0:
        raise ValueError(f"a quantized LSTM has no projections: proj_size must be 0, got {proj_size}")


def reset_own_parameters(module: nn.Module, hidden_size: int) -> None:
    """Draw the parameters of `module`, but not those of its quantizers, from U(-1/sqrt(hidden), 1/sqrt(hidden))."""
    bound = 1 / math.sqrt(hidden_size)
    for parameter in module.parameters(recurse=False):
        nn.init.uniform_(parameter, -bound, bound)


def _scan(
    step: Step, inputs: Sequence[Tensor], sizes: list[int] | None, states: States, reverse: bool
) -> tuple[list[Tensor], States]:
    """The hidden states of all time steps, in the order of `inputs`, and the states at the end of each sequence.

    With `sizes`, step t runs the first `sizes[t]` sequences only, and the states of the others stay as they are: these
    have ended, or, in reverse, not begun.
    """
    hidden: list[Tensor] = []
    times = range(len(inputs))
    for t in reversed(times) if reverse else times:
        if sizes is None or sizes[t] == sizes[0]:
            states = step(inputs[t], states)
            hidden.append(states[0])
        else:
            running = step(inputs[t], tuple(state[: sizes[t]] for state in states))
            hidden.append(running[0])
            states = tuple(torch.cat([new, old[sizes[t] :]]) for new, old in zip(running, states, strict=True))
    return hidden[::-1] if reverse else hidden, states
