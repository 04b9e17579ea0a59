"""The step sizes of weights of few bits, chosen channel by channel by what they do to the layer's output."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..constant_quantizers import CLIPPED_BITS
from .walk import LayerVisit, TensorVisit


@dataclass
class WeightRanges:
    """Chooses, per output channel, between the range of least squared error and the whole range of the weight.

    Rounding few bits is coarse, so that the range of least squared error cuts off a good part of the largest weights.
    That serves most channels; but the weights that it cuts may be those that meet the largest inputs. The whole range
    is taken where the channel's squared error in the layer's output is less than `margin` times as large. Weights of
    more bits keep theirs. Where a weight has one step size the sum over all channels decides; the blocks of a channel
    are chosen together.

    Attributes:
        batches: so many batches are compared.
        margin: see above.
        chosen: path of the weight -> how many step sizes took the whole range.
    """

    batches: int = 1
    margin: float = 0.9
    chosen: dict[str, int] = field(default_factory=dict)

    def visit_tensor(self, visit: TensorVisit) -> None:
        """Nothing."""

    def visit_layer(self, visit: LayerVisit) -> None:
        """Sets the step sizes of the layer's weight."""
        quantizer = visit.layer.quantizer
        if quantizer.num_bits > CLIPPED_BITS:
            return
        errors, steps, input_step = [], [], visit.input_step
        for method in ("mse", "max"):
            quantizer.fit(visit.weight, method)
            if input_step is not None and visit.bias is not None:
                quantizer.fit_bias(visit.bias, input_step)
            visit.forget_outputs()
            errors.append(self._errors(visit))
            steps.append(quantizer.step_size.clone())
        whole = errors[1] < self.margin * errors[0]
        self.chosen[visit.layer.name] = int(whole.sum())
        whole = whole.reshape([*whole.shape, *[1] * (steps[0].dim() - whole.dim())])
        quantizer.step_size.copy_(torch.where(whole, steps[1], steps[0]))
        visit.forget_outputs()

    def _errors(self, visit: LayerVisit) -> Tensor:
        """Squared error for every channel that has step sizes of its own, float64; 0-d where the weight has one."""
        quantizer, axis = visit.layer.quantizer, visit.layer.output_axis
        weight = quantizer(visit.weight)
        total: Tensor | float = 0.0
        pairs = zip(visit.inputs[: self.batches], visit.float_outputs[: self.batches], strict=True)
        for x, wanted in pairs:
            difference = (visit.layer.run(x, weight, visit.bias) - wanted).movedim(axis, 0)
            total = total + difference.reshape(len(difference), -1).double().square().sum(1)
        assert isinstance(total, Tensor)
        # The groups of a transposed convolution share the step sizes of their output channels.
        return total.sum() if quantizer.axis is None else total.reshape(-1, quantizer.step_size.shape[0]).sum(0)
