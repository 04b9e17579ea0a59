"""AWQ: the weights that meet large activations are made larger before they are rounded to few bits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..graph.parameters import tensor_at
from ..progress import track
from .algorithm import Algorithm, Samples
from .channel_scaling import ChannelScaling, weight_method
from .float_values import observe_float_values
from .layer import Layer
from .layer_channels import times_inputs
from .layer_matrix import LayerMatrix
from .option_checks import check_integer
from .producers import Connection, find_connections

# All samples together keep at most so many values of layers' inputs, 1 GiB of float32.
_KEPT = 2**28


@dataclass(frozen=True)
class AWQ(Algorithm):
    """Multiplies the weights of input channel c by s_c = mean|X_c|**alpha, and divides the channel by it.

    Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (MLSys 2024), section
    3.2, meant for weights of few bits. Alpha is searched for every tensor on an even grid from 0 (nothing changes) to
    1, by the squared error of the outputs of the layers that read it, with float inputs and with their weights
    quantized by their own quantizers. The factors are divided by their geometric mean. The division is taken into what
    computes the tensor, as `SmoothQuant` does it. The clipping of weights that the paper adds is not part of this.

    Attributes:
        steps: of the grid.
        positions: for the error, so many vectors of a layer's input (patches of a convolution's) are kept, spread
            evenly over the samples.
    """

    name: ClassVar[str] = "awq"
    citation: ClassVar[str] = "Lin et al. 2023, arXiv:2306.00978"

    steps: int = 20
    positions: int = 512

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1)
        check_integer("positions", self.positions, 1)

    @property
    def walk_samples(self) -> int:
        """None: its factors are found before the walk."""
        return 0

    @torch.no_grad()
    def prepare(self, graph_module: fx.GraphModule, samples: Samples, progress: bool = True) -> set[str]:
        """Scales every tensor that layers alone read, where it lessens the error. Returns their names."""
        connections = [c for c in find_connections(graph_module, samples) if not c.clips]
        if not connections:
            return set()
        inputs = self._inputs(graph_module, samples, connections, progress)
        scaling, method = ChannelScaling(graph_module), weight_method(graph_module)
        for connection in track(connections, "scaling weights", len(connections), progress):
            factors = self._best(scaling, connection, inputs, method)
            if factors is not None:
                scaling.divide(connection, factors)
        return scaling.store()

    def _inputs(
        self, graph_module: fx.GraphModule, samples: Samples, connections: Sequence[Connection], progress: bool
    ) -> dict[str, _Input]:
        layers = {r.layer.name: r for c in connections for r in c.readers}
        matrices = {n: LayerMatrix(r.layer, tensor_at(graph_module, r.layer.weight)) for n, r in layers.items()}
        width = sum(tensor_at(graph_module, r.layer.weight)[0].numel() for r in layers.values())
        count = min(self.positions, max(_KEPT // max(width, 1), 1))
        per_batch = -(-count // max(len(samples), 1))
        inputs = {name: _Input(reader.layer, matrices[name], reader.dim, per_batch) for name, reader in layers.items()}
        observe_float_values(
            graph_module,
            samples,
            [(reader.source, inputs[name].observe) for name, reader in layers.items()],
            "looking at inputs",
            progress,
        )
        return inputs

    def _best(
        self, scaling: ChannelScaling, connection: Connection, inputs: dict[str, _Input], method: str
    ) -> Tensor | None:
        """The factors of least error; None where that of the weights as they are is as small."""
        count = connection.producer.channels
        means = torch.zeros(count, dtype=torch.float64, device=connection.free.device)
        for reader in connection.readers:
            before = scaling.input_factors(reader.layer)
            means = torch.maximum(means, reader.maxima(inputs[reader.layer.name].means() / before, count))
        known = connection.free & (means > 0)
        if not known.any():
            return None
        logarithms = torch.where(known, means, 1.0).log()
        logarithms = torch.where(known, logarithms - logarithms[known].mean(), 0.0)
        best, least = None, torch.inf
        for step in range(self.steps + 1):
            factors = (logarithms * (step / self.steps)).exp()
            error = sum(
                inputs[reader.layer.name].error(scaling, reader.expand(factors), method)
                for reader in connection.readers
            )
            if error < least:
                best, least = (factors if step else None), error
        return best


@dataclass
class _Input:
    """What is kept of a layer's input."""

    layer: Layer
    matrix: LayerMatrix
    dim: int
    positions: int
    patches: list[Tensor] = field(default_factory=list)
    total: Tensor | None = None
    seen: int = 0

    def observe(self, x: Tensor) -> None:
        """Adds a batch."""
        features = x.abs().movedim(self.dim, -1).reshape(-1, x.shape[self.dim])
        total = features.sum(0, dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        self.seen += features.shape[0]
        known = self.matrix.positions(x)
        if known:
            chosen = torch.linspace(0, known - 1, min(self.positions, known)).round().long()
            self.patches.append(self.matrix.patches(x, chosen.to(x.device)))

    def means(self) -> Tensor:
        """[input channels], float64: the mean magnitudes."""
        assert self.total is not None
        return self.total / max(self.seen, 1)

    def error(self, scaling: ChannelScaling, factors: Tensor, method: str) -> float:
        """The squared error of the layer's output with its inputs divided by `factors` and its weight quantized."""
        weight, before = scaling.value(self.layer.weight), scaling.input_factors(self.layer)
        trial = times_inputs(self.layer, weight, factors).float()
        quantizer = copy.deepcopy(self.layer.quantizer)
        quantizer.enabled = True  # all are off while a model is prepared
        quantizer.fit(trial, method)
        # Against the weight and the inputs as they were at first.
        change = times_inputs(self.layer, quantizer(trial).double() - trial.double(), 1 / (factors * before)).float()
        rows = self.matrix.rows(change).transpose(1, 2)
        return sum(float((patches @ rows).double().square().sum()) for patches in self.patches)
