"""Small nets for algorithms that move factors between layers, and what their tests measure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import qdq
from qdq.affine_quantizer import AffineQuantizer
from qdq.algorithms.algorithm import Algorithm
from qdq.calibration import constants_in_float
from qdq.constant_quantizers import BiasQuantizer, WeightQuantizer


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal values that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built(build: Callable[[], nn.Module], seed: int = 0, norms: bool = True) -> nn.Module:
    """A model in eval mode with random weights, and, with `norms`, norms and batch statistics of unlike size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        for module in model.modules() if norms else ():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
                module.weight.data = torch.randn(module.weight.shape).exp()
                if getattr(module, "bias", None) is not None:
                    module.bias.data.normal_()
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def plain(bits: int = 8, axis: int | None = 0, **options: Any) -> qdq.Recipe:
    """A recipe without algorithms, the same on every machine."""
    weights = qdq.QuantDescriptor(num_bits=bits, axis=axis, narrow_range=True)
    return qdq.Recipe(**{"weights": weights, "algorithms": {}, "reduce_range": False, **options})


def quantized(model: nn.Module, batches: Sequence[Tensor], recipe: qdq.Recipe | None = None) -> fx.GraphModule:
    """`qdq.quantize` without a progress bar, by default without algorithms."""
    return qdq.quantize(model, batches, recipe=plain() if recipe is None else recipe, progress=False)


def prepared(algorithm: Algorithm, qmodel: fx.GraphModule, batches: Sequence[Tensor]) -> fx.GraphModule:
    """A copy that an algorithm has changed; the ranges of its activations are still the old ones."""
    qmodel = copy.deepcopy(qmodel)
    with constants_in_float(qmodel):
        algorithm.prepare(qmodel, [[x] for x in batches], progress=False)
    return qmodel


@torch.no_grad()
def in_float(qmodel: fx.GraphModule, x: Tensor) -> Tensor:
    """What a quantized graph's parameters compute unquantized, in float64."""
    qmodel = copy.deepcopy(qmodel).double()
    for module in qmodel.modules():
        if isinstance(module, (AffineQuantizer, WeightQuantizer, BiasQuantizer)):
            module.enabled = False
    return qmodel(x.double())


def change_of_function(algorithm: Algorithm, qmodel: fx.GraphModule, batches: Sequence[Tensor], x: Tensor) -> float:
    """Largest change of the float output for `x`, as a share of the largest output."""
    before = in_float(qmodel, x)
    after = in_float(prepared(algorithm, qmodel, batches), x)
    return float((after - before).abs().max() / before.abs().max())


def changed(before: fx.GraphModule, after: fx.GraphModule) -> set[str]:
    """The parameters that differ."""
    values = dict(after.named_parameters())
    return {name for name, value in before.named_parameters() if not torch.equal(value, values[name])}


@torch.no_grad()
def sqnr_db(model: nn.Module, qmodel: nn.Module, batches: Sequence[Tensor]) -> float:
    """10 log10(sum ref^2 / sum (out - ref)^2)."""
    reference = torch.cat([model(x) for x in batches]).double()
    noise = torch.cat([qmodel(x) for x in batches]).double() - reference
    return float(10 * (reference.square().sum() / noise.square().sum()).log10())


class Branches(nn.Module):
    """A stem that two convolutions read, a residual addition, and channels that are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.inner, self.outer = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.last, self.fc = nn.Conv2d(16, 8, 3), nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        y = torch.cat([self.left(x).relu(), self.right(x)], 1)
        y = nn.functional.max_pool2d(self.last(y).relu(), 2)
        y = y + self.outer(nn.functional.leaky_relu(self.inner(y)))
        return self.fc(nn.functional.adaptive_avg_pool2d(y, 2).flatten(1))


class TwoOutputs(nn.Module):
    """The hidden layer is an output as well, the second weight is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x).relu()
        y = self.c(self.b(self.b(x).relu()).relu())
        return self.d(y), y


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "conv, batch norm, relu": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
    ),
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.PReLU(8), nn.Conv2d(8, 6, 1)
    ),
    "groups": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(12, 6, 1, groups=2),
    ),
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 12, 2, 2, groups=4),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.ConvTranspose2d(12, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
    ),
    "flatten": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 4)
    ),
    "moves": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.PixelUnshuffle(2), nn.ZeroPad2d(1), nn.ReLU(), nn.ChannelShuffle(4), nn.Conv2d(32, 4, 3)
    ),
    "branches": Branches,
}


class RootMeanSquare(nn.Module):
    """A norm written out, as large language models have it, with a shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width).exp()), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)) + self.bias


class GatedBlock(nn.Module):
    """Attention with separate projections and a gated feed-forward network."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), RootMeanSquare(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(width, 32), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        y = self.norm1(x)
        q, k, v = (p(y).reshape(n, length, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        x = x + self.o(y)
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def transformer(large: float = 1.0) -> nn.Module:
    """Two blocks and a head; of 16 channels two leave every norm `large` times as large."""
    model = nn.Sequential(GatedBlock(), GatedBlock(), nn.LayerNorm(16), nn.Linear(16, 8))
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, RootMeanSquare)):
            module.weight.data = torch.ones(16)
            module.weight.data[[3, 11]] = large
    return model
