"""SmoothQuant: large activation channels are made smaller, and the weights that read them larger."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..graph.names import original_name
from .algorithm import Algorithm, Samples
from .channel_scaling import ChannelScaling
from .float_values import observe_float_values
from .input_scaling import ScalableInput, multiply, scalable_inputs
from .input_values import InputValues
from .producers import Connection, find_connections
from .smoothing_error import Reading, output_error

logger = logging.getLogger(__name__)

# What "auto" chooses from; below 0.5 little moves, and 1 leaves all of the difficulty to the weights.
_ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)
# The share of the error without factors that must go. Factors that a layer before takes in cost nothing; a
# multiplication costs time in every inference, and must gain 2 dB.
_FOLDED_MARGIN, _MULTIPLIED_MARGIN = 0.9, 0.63
# The largest values of fewer vectors tell "auto" too little about those to come.
_LEAST_VECTORS = 16


# The readings of a tensor, given its factors, and whether those are a trial.
Readings = Callable[[Tensor, bool], list[Reading]]


@dataclass(frozen=True)
class SmoothQuant(Algorithm):
    """Divides input channel j of linears by s_j = max|X_j|**alpha / max|W_j|**(1 - alpha), and multiplies W_j by it.

    Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models" (ICML 2023), equation 4. The maxima are those of the float model over the samples, and over all
    linears that read the tensor. The division is taken into what computes the tensor: weight and bias of a
    normalization (layer, RMS, batch, group), or of the layer before. Where nothing can take it, as something else
    than linears reads the channel too or a nonlinear function computes it, a multiplication is put before the
    quantizer. A channel without weights or without values keeps factor 1.

    Attributes:
        alpha: 0 to 1: how much of the difficulty moves from activations to weights; "auto" takes of 0.5, 0.6, ... 0.9,
            tensor by tensor, what leaves the least error in what the linears compute, and no factors at all where that
            is not more than 10 % less than without. The error is that of vectors which factors and ranges were not made
            from: maxima of few vectors say little. With fewer than 16 such vectors there are no factors.
        multiply: whether multiplications may be put in; only where linears alone read the quantized tensor and an
            operation in float computes it. "auto" puts one where it takes off more than 2 dB of the error.
    """

    name: ClassVar[str] = "smoothquant"
    citation: ClassVar[str] = "Xiao et al. 2022, arXiv:2211.10438"

    alpha: float | str = "auto"
    multiply: bool = True

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not (self.alpha == "auto" or (number and 0 <= float(self.alpha) <= 1)):
            raise ValueError(f"alpha must be a number from 0 to 1, or 'auto', not {self.alpha!r}")
        if not isinstance(self.multiply, bool):
            raise ValueError(f"multiply must be true or false, not {self.multiply!r}")

    @property
    def walk_samples(self) -> int:
        """None: its factors are found before the walk."""
        return 0

    def prepare(self, graph_module: fx.GraphModule, samples: Samples, progress: bool = True) -> set[str]:
        """Scales every tensor that linears alone read. Returns the names of those."""
        connections = [c for c in find_connections(graph_module, samples) if not c.clips and _is_read_by_linears(c)]
        taken = {reader.layer.name for c in connections for reader in c.readers}
        inputs = scalable_inputs(graph_module) if self.multiply else []
        inputs = [i for i in inputs if taken.isdisjoint(layer.name for layer in i.readers)]
        if not connections and not inputs:
            return set()
        sources = {reader.source for c in connections for reader in c.readers} | {i.quantizer_call for i in inputs}
        rows = 1024 if self.alpha == "auto" else 0
        seen = {node: InputValues(rows // max(len(samples), 1) + 1 if rows else 0) for node in sources}
        observers = [(node, values.observe) for node, values in seen.items()]
        observe_float_values(graph_module, samples, observers, "smoothing activations", progress)
        scaling = ChannelScaling(graph_module)
        for connection in connections:
            factors = self._for_connection(graph_module, scaling, connection, seen)
            if factors is not None:
                scaling.divide(connection, factors)
        for one in inputs:
            factors = self._for_input(scaling, one, seen[one.quantizer_call])
            if factors is not None:
                multiply(graph_module, one, (1 / factors).float())
                scaling.times_inputs(one.readers, factors, original_name(one.quantizer_call.all_input_nodes[0]))
                logger.info("%s: a multiplication per channel was put before it", one.quantizer_call.target)
        return scaling.store()

    def _for_connection(
        self,
        graph_module: fx.GraphModule,
        scaling: ChannelScaling,
        connection: Connection,
        seen: dict[fx.Node, InputValues],
    ) -> Tensor | None:
        count = connection.producer.channels
        weights = torch.zeros(count, dtype=torch.float64, device=connection.free.device)
        values, others = torch.zeros_like(weights), torch.zeros_like(weights)
        for reader in connection.readers:
            weights = torch.maximum(weights, scaling.reader_maxima(connection, reader))
            values = torch.maximum(values, reader.maxima(seen[reader.source].maxima, count))
            others = torch.maximum(others, reader.maxima(seen[reader.source].other_maxima, count))
        known = connection.free & (weights > 0) & (values > 0)
        matrices = [scaling.value(reader.layer.weight) for reader in connection.readers]

        def readings(factors: Tensor, trial: bool) -> list[Reading]:
            return [
                Reading(graph_module, r.source, r.layer, weight, seen[r.source], r.expand(factors), trial)
                for r, weight in zip(connection.readers, matrices, strict=True)
            ]

        if self.alpha == "auto":
            return _best((values, others), weights, known, readings, _FOLDED_MARGIN)
        return _factors(values, weights, known, float(self.alpha))

    def _for_input(self, scaling: ChannelScaling, one: ScalableInput, seen: InputValues) -> Tensor | None:
        weights = torch.stack([scaling.value(layer.weight).abs().amax(0) for layer in one.readers]).amax(0)
        known = (weights > 0) & (seen.maxima > 0)

        def readings(factors: Tensor, trial: bool) -> list[Reading]:
            module, call = scaling.graph_module, one.quantizer_call
            return [
                Reading(module, call, layer, scaling.value(layer.weight), seen, factors, trial) for layer in one.readers
            ]

        if self.alpha == "auto":
            return _best((seen.maxima, seen.other_maxima), weights, known, readings, _MULTIPLIED_MARGIN)
        return _factors(seen.maxima, weights, known, float(self.alpha)) if bool(known.any()) else None


def _factors(values: Tensor, weights: Tensor, known: Tensor, alpha: float) -> Tensor:
    return torch.where(known, values**alpha / weights ** (1 - alpha), 1.0)


def _best(
    values: tuple[Tensor, Tensor], weights: Tensor, known: Tensor, readings: Readings, margin: float
) -> Tensor | None:
    """The factors with the least error, None where no factors are within the margin of it.

    Args:
        values: maxima of all vectors, of which the factors are made; and of those that no error is taken on, of which
            those are made that are tried.
        weights: maxima of the weights that read each channel.
        known: the channels that may have a factor.
        readings: the linears that read the tensor, with given factors.
        margin: the share of the error without factors that must be left at most.
    """
    everything, others = values
    unscaled = readings(torch.ones_like(everything), False)
    if min(len(reading.values.rows) for reading in unscaled) < _LEAST_VECTORS:
        return None
    least, best = margin * output_error(unscaled), None
    for alpha in _ALPHAS:
        error = output_error(readings(_factors(others, weights, known & (others > 0), alpha), True))
        if error < least:
            least, best = error, _factors(everything, weights, known, alpha)
    return best


def _is_read_by_linears(connection: Connection) -> bool:
    return all(reader.layer.operation is torch.ops.aten.linear.default for reader in connection.readers)
