"""Quantizers of what a deployed file stores as integers: weights, and the biases of integer operations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .calib.ranges import channel_mse_amax
from .functional import fake_quantize_affine
from .kernels import reference
from .kernels.engine import for_tensor
from .remembered import Remembered, can_remember
from .saturation import pair_safe_factor, shrink_pairs

# Half of int32: the other half is left to the sum of products that the bias is added to.
BIAS_CODE_LIMIT = 2**30
# Of weights of more bits hardly anything is gained by a range that cuts off the largest.
CLIPPED_BITS = 6
# Of a symmetric range: squares of its step, which pairs that must not saturate are looked for by, are still normal
# float32.
LEAST_AMAX = 2.0**-48


class WeightQuantizer(nn.Module):
    """Symmetric fake quantization of a weight, with a step size per channel, per block of a channel, or for all of it.

    codes = clamp(round_half_to_even(w / step_size), -bound, bound), bound = 2**(num_bits - 1) - 1. Buffer: `step_size`,
    float32, of shape [channels], [channels, blocks] or 0-d; `step_for` gives it a shape that broadcasts to the weight.

    Args:
        name: path in the model.
        num_bits: 2 to 8.
        axis: of the weight, the channels that have their own step size; None for one step size.
        channels: size of that axis.
        pairs_axis: output-channel axis, where neighbouring codes must not saturate (`qdq.saturation`); else None.
        block_size: of a weight of two dimensions: so many neighbours along the other axis share a step size. The last
            block may be shorter. None for one step size per channel.
        inputs: size of the other axis; needed with `block_size`.
        stored_bits: 4 where an exported file packs two codes into a byte (`num_bits` of at most 4), else 8.
    """

    step_size: Tensor

    def __init__(
        self,
        name: str,
        num_bits: int,
        axis: int | None,
        channels: int,
        pairs_axis: int | None = None,
        *,
        block_size: int | None = None,
        inputs: int = 0,
        stored_bits: int = 8,
    ) -> None:
        super().__init__()
        self.name, self.num_bits, self.axis, self.pairs_axis = name, num_bits, axis, pairs_axis
        self.block_size, self.stored_bits = block_size, stored_bits
        self.enabled = True
        # Whether weight and step size are to stay as they are, whatever algorithms could gain.
        self.fixed = False
        shape = [] if axis is None else [channels] if block_size is None else [channels, -(-inputs // block_size)]
        self.register_buffer("step_size", torch.ones(shape, dtype=torch.float32))
        self._remembered = Remembered()

    @property
    def bound(self) -> int:
        """The largest code."""
        return int(2 ** (self.num_bits - 1) - 1)

    def fit(self, weight: Tensor, method: str) -> None:
        """Sets the step sizes from a weight: amax / bound, with the amax of "max" or of least squared error ("mse").

        "auto" is "mse" up to 6 bits, and "max" for more. An amax below 2**-48 counts as 2**-48: weights of less than
        half a step of that become 0.

        Where pairs must not saturate, larger step sizes are tried as well: fewer pairs are then shrunk.
        """
        weight = weight.detach()
        channels = weight.reshape(1, -1) if self.axis is None else weight.movedim(self.axis, 0)
        if self.block_size is not None:
            # Zeros fill the last block: they quantize to themselves and change no range.
            short = -channels.shape[1] % self.block_size
            channels = F.pad(channels, (0, short)).reshape(-1, self.block_size)
        if method == "mse" or (method == "auto" and self.num_bits <= CLIPPED_BITS):
            # In units of each channel, by powers of two, which are exact: the search takes tiny weights for zeros.
            exponents = channels.abs().flatten(1).amax(1).frexp().exponent.clamp(-100, 100)
            own = channels * torch.exp2(-exponents.float()).reshape(-1, *[1] * (channels.dim() - 1))
            amax = channel_mse_amax(own, 0, self.num_bits) * torch.exp2(exponents.float())
        else:
            amax = channels.abs().flatten(1).amax(1)
        amax = amax.reshape(-1).clamp(min=LEAST_AMAX)
        if self.pairs_axis is not None:
            rows = weight.movedim(self.pairs_axis, 0)
            amax = amax * pair_safe_factor(rows, amax, self.bound)
        self.step_size.copy_((amax / self.bound).reshape(self.step_size.shape))

    def fit_bias(self, bias: Tensor, input_step: Tensor) -> None:
        """Enlarges step sizes whose bias would not fit int32 (its step is input step x weight step).

        Not for blocks: operations with integer biases have none.
        """
        assert self.block_size is None
        least = bias.detach().abs().double() / (input_step.double() * BIAS_CODE_LIMIT)
        if self.axis is None:
            least = least.max()
        least = least.float().nan_to_num().to(self.step_size.device)
        self.step_size.copy_(torch.maximum(self.step_size, least.reshape(self.step_size.shape)))

    def step_for(self, weight: Tensor) -> Tensor:
        """The step sizes in a shape that broadcasts to a weight: with blocks, one for each of its elements."""
        if self.axis is None:
            return self.step_size
        if self.block_size is not None:
            inputs = weight.shape[1 - self.axis]
            return self.step_size.repeat_interleave(self.block_size, 1)[:, :inputs].movedim(0, self.axis)
        shape = [1] * weight.dim()
        shape[self.axis] = -1
        return self.step_size.reshape(shape)

    def forward(self, weight: Tensor) -> Tensor:
        """The fake-quantized weight, of the weight's shape."""
        if not self.enabled:
            return weight
        if not can_remember(weight):
            return self._fake(weight)
        return self._remembered.get(lambda: self._fake(weight), weight, self.step_size)

    def _fake(self, weight: Tensor) -> Tensor:
        step = self.step_for(weight)
        fake = fake_quantize_affine(weight, step, torch.zeros_like(step), -self.bound, self.bound)
        if self.pairs_axis is None:
            return fake
        return fake + (self._dequantized(weight) - fake).detach()

    def codes(self, weight: Tensor) -> Tensor:
        """The int8 codes of a weight."""
        return self._codes(weight).to(torch.int8)

    def _codes(self, weight: Tensor) -> Tensor:
        step = self.step_for(weight)
        run = reference if torch.compiler.is_compiling() else for_tensor(weight)
        codes = run.affine_quantize(weight.detach(), step, torch.zeros_like(step), -self.bound, self.bound)
        return codes if self.pairs_axis is None else shrink_pairs(codes, self.pairs_axis)

    def _dequantized(self, weight: Tensor) -> Tensor:
        return self._codes(weight) * self.step_for(weight)

    def extra_repr(self) -> str:
        """Bits and granularity in one line."""
        per = "per tensor" if self.axis is None else f"axis={self.axis}, channels={self.step_size.shape[0]}"
        if self.block_size is not None:
            per += f", blocks of {self.block_size}"
        pairs = "" if self.pairs_axis is None else ", saturation-safe pairs"
        return f"int{self.stored_bits}, {self.num_bits} bits, {per}{pairs}"


class BiasQuantizer(nn.Module):
    """The bias of an integer operation as int32 codes of step input step x weight step, as the runtime stores it.

    Args:
        name: path in the model.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.enabled = True
        self._remembered = Remembered()

    def codes(self, bias: Tensor, input_step: Tensor, weight_step: Tensor) -> Tensor:
        """int32 codes of a bias of shape [channels]."""
        step = input_step.detach().double() * weight_step.detach().double()
        return torch.round(bias.detach().double() / step).clamp(-BIAS_CODE_LIMIT, BIAS_CODE_LIMIT).to(torch.int32)

    def forward(self, bias: Tensor, input_step: Tensor, weight_step: Tensor) -> Tensor:
        """The bias that the runtime adds; the gradient passes unchanged."""
        if not self.enabled:
            return bias
        if not can_remember(bias):
            return self._stored(bias, input_step, weight_step)
        read = bias, input_step, weight_step
        return self._remembered.get(lambda: self._stored(*read), *read)

    def _stored(self, bias: Tensor, input_step: Tensor, weight_step: Tensor) -> Tensor:
        step = input_step.detach().double() * weight_step.detach().double()
        value = self.codes(bias, input_step, weight_step).double() * step
        return bias + (value.to(bias.dtype) - bias).detach()
