"""Cross-layer equalization: the weights that compute a channel and those that read it get the same range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..progress import track
from .algorithm import Algorithm, Samples
from .channel_scaling import ChannelScaling
from .float_values import Observer, observe_float_values
from .layer_channels import feature_maxima, output_maxima
from .option_checks import check_integer, check_real
from .producers import Clip, Connection, Reader, find_connections


@dataclass(frozen=True)
class Equalization(Algorithm):
    """Divides what computes channel i by s_i = sqrt(r1_i / r2_i), and multiplies the weights that read it.

    Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction"
    (ICCV 2019), section 4.1, equation 11: r1_i and r2_i are the largest weights that compute and that read channel i,
    both sqrt(r1_i * r2_i) afterwards. All pairs of layers in turn, until nothing changes. It serves weights with one
    step size for the tensor first of all.

    Between the layers lie positively homogeneous operations (ReLU, leaky ReLU, pooling, moves of values). Ranges count
    as shares of the largest of their tensor; of several layers that read a channel the largest share is taken.

    In the paper's form a channel of small weights and a large bias gets values that ruin the range of the activations,
    which share a step size as well. With samples at hand that can be known: r1_i is the larger of the share of the
    weights and the share of the activations. The paper's remedy, the absorption of high biases (section 4.1.3), is left
    out: it is exact only for values within three standard deviations and for layers without zero padding.

    ReLU6 and other clips with a bound are not homogeneous, and the paper's ReLU in place of ReLU6 is another function.
    Here they stay, and a channel behind one keeps factor 1, unless its float values over the samples stay inside the
    bound by `clip_margin`, before and after: s_i then is no smaller than keeps it so. On the samples the function is
    the same; a value beyond all samples may be cut earlier or later than before.

    Attributes:
        iterations: at most so many rounds through all pairs.
        tolerance: it ends when no factor of a round differs from 1 by more than this share.
        clip_margin: 0 to below 1: share of a clip's bound that a channel's values must leave free.
        activations: whether the activations count; False is the paper's form.
    """

    name: ClassVar[str] = "equalization"
    citation: ClassVar[str] = "Nagel et al. 2019, arXiv:1906.04721"

    iterations: int = 100
    tolerance: float = 1e-3
    clip_margin: float = 0.1
    activations: bool = True

    def __post_init__(self) -> None:
        check_integer("iterations", self.iterations, 1)
        check_real("tolerance", self.tolerance, least=0, below=1)
        check_real("clip_margin", self.clip_margin, least=0, below=1)
        if not isinstance(self.activations, bool):
            raise ValueError(f"activations must be True or False, not {self.activations!r}")

    @property
    def walk_samples(self) -> int:
        """None: its factors are found before the walk."""
        return 0

    @torch.no_grad()
    def prepare(self, graph_module: fx.GraphModule, samples: Samples, progress: bool = True) -> set[str]:
        """Equalizes every pair of layers. Returns the names of the tensors between them."""
        connections = [c for c in find_connections(graph_module, samples) if c.producer.layer is not None]
        if not connections:
            return set()
        pairs = [_Pair(c, self.clip_margin) for c in connections]
        observers = [o for pair in pairs for o in pair.observers(self.activations)]
        if observers:
            observe_float_values(graph_module, samples, observers, "looking at channels", progress)
        scaling = ChannelScaling(graph_module)
        for _ in track(range(self.iterations), "equalizing layers", self.iterations, progress):
            if max([pair.equalize(scaling) for pair in pairs]) <= self.tolerance:
                break
        return scaling.store()


class _Pair:
    """A connection, with what the samples and the rounds so far tell of its channels."""

    def __init__(self, connection: Connection, clip_margin: float) -> None:
        self.connection, self.allowed = connection, 1 - clip_margin
        count = connection.producer.channels
        self.factors = torch.ones(count, dtype=torch.float64, device=connection.free.device)
        # The largest values that readers are given, and the largest share of a clip's bound, with factors of 1.
        self.values, self.shares = torch.zeros_like(self.factors), torch.zeros_like(self.factors)

    def observers(self, activations: bool) -> list[Observer]:
        out: list[Observer] = [(clip.source, _keep_shares(self.shares, clip)) for clip in self.connection.clips]
        quantized = [r for r in self.connection.readers if activations and r.source.op == "call_module"]
        readers = {(r.source, r.dim): r for r in quantized}
        return out + [(reader.source, _keep_maxima(self.values, reader)) for reader in readers.values()]

    def equalize(self, scaling: ChannelScaling) -> float:
        """One step. Returns by how much a factor changed."""
        connection, layer = self.connection, self.connection.producer.layer
        assert layer is not None
        computing = output_maxima(layer, scaling.value(layer.weight))
        reading = [scaling.reader_maxima(connection, reader) for reader in connection.readers]
        before = _largest_shares([computing, self.values / self.factors])
        after = _largest_shares(reading)
        least = torch.where(self.shares <= self.allowed, self.shares / self.allowed, torch.inf)
        known = connection.free & (computing > 0) & (after > 0) & least.isfinite()
        factors = torch.where(known, before / after, 1.0).sqrt()
        factors = torch.where(known, torch.maximum(factors, least / self.factors), 1.0)
        scaling.divide(connection, factors)
        self.factors = self.factors * factors
        return float(factors.log().abs().max())


def _largest_shares(ranges: Sequence[Tensor]) -> Tensor:
    """Per channel, the largest share that it has of a whole range."""
    shares = [r / r.max() for r in ranges if bool(r.max() > 0)]
    return torch.stack(shares).amax(0) if shares else ranges[0]


def _keep_maxima(values: Tensor, reader: Reader) -> Callable[[Tensor], None]:
    """An observer which holds, per channel, the largest magnitude that a reader is given."""

    def observe(x: Tensor) -> None:
        values.copy_(torch.maximum(values, reader.maxima(feature_maxima(x, reader.dim), len(values))))

    return observe


def _keep_shares(shares: Tensor, clip: Clip) -> Callable[[Tensor], None]:
    """An observer which holds, per channel, the largest share of a clip's bound that its values take."""
    own = clip.channels >= 0

    def observe(x: Tensor) -> None:
        x = x.movedim(clip.dim, -1).reshape(-1, x.shape[clip.dim]).double()
        if not x.shape[0]:
            return
        bounds = ((x.amax(0), clip.high), (x.amin(0), clip.low))
        for values, bound in bounds:
            if bound != 0 and bound not in (torch.inf, -torch.inf):
                shares.scatter_reduce_(0, clip.channels[own], (values / bound)[own], "amax")

    return observe
