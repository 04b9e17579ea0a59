"""Blocks of a graph, and rounding that is learned from their outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import qdq
from algorithms.layer_cases import LAYERS, assert_on_grid, layer_model, quantized, randn, weight_and_quantizer
from algorithms.trained_nets import score
from qdq.algorithms.adaround import AdaRound
from qdq.algorithms.algorithm import Algorithm
from qdq.algorithms.bias_correction import BiasCorrection
from qdq.algorithms.block_reconstruction import BlockReconstruction
from qdq.algorithms.block_run import run_quantized
from qdq.algorithms.blocks import blocks_of
from qdq.algorithms.layer import layers_of
from qdq.algorithms.registry import algorithms_of
from qdq.algorithms.walk import Walk
from qdq.errors import RecipeError
from qdq.recipe import Recipe


class Residual(nn.Module):
    """A layer, a residual block of linears, a residual block of a single one, a head; a mask that both blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(12, 32), nn.Linear(32, 48), nn.Linear(48, 32)
        self.c, self.head = nn.Linear(32, 32), nn.Linear(32, 6)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=index) / parameter.shape[-1] ** 0.5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.a(x)))) * mask
        x = x + self.c(x) * mask
        return torch.softmax(self.head(x), -1)


class ReadAtTheEnd(nn.Module):
    """The first two results are outputs beside the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.a(x)
        z = self.b(y)
        return y, z, self.c(z)


def residual_batches(count: int = 4) -> list[tuple[tuple[Tensor, Tensor], dict[str, object]]]:
    mask = (randn(1, 32, seed=99) > -1).float()
    return [((randn(64, 12, seed=s) + randn(64, 1, seed=50 + s), mask), {}) for s in range(count)]


def residual(bits: int = 2, **weights: object) -> tuple[fx.GraphModule, Walk]:
    descriptor = qdq.QuantDescriptor(num_bits=bits, axis=0, narrow_range=True, **weights)  # type: ignore[arg-type]
    activations = {"activations": "float"} if weights else {}
    ranges = {"calibration": "max", "weight_calibration": "max"}
    recipe = Recipe(weights=descriptor, algorithms=[], **ranges, **activations)  # type: ignore[arg-type]
    batches = residual_batches()
    qmodel = qdq.quantize(Residual().eval(), batches, recipe=recipe, progress=False)
    return qmodel, Walk(qmodel, [list(args) for args, _ in batches])


def names(qmodel: fx.GraphModule) -> list[list[str]]:
    _, blocks = blocks_of(qmodel, layers_of(qmodel))
    return [[layer.name.removesuffix(".weight") for layer in block.layers.values()] for block in blocks]


def improve(walk: Walk, *algorithms: Algorithm) -> None:
    walk.run(algorithms, progress=False)
    for algorithm in algorithms:
        algorithm.finish(walk, progress=False)


def sqnr(qmodel: fx.GraphModule) -> float:
    """Over batches that nothing was learned from."""
    model = Residual().eval()
    with torch.no_grad():
        pairs = [(model(*args), qmodel(*args)) for args, _ in residual_batches(8)[4:]]
    signal, noise = sum(float(y.square().sum()) for y, _ in pairs), sum(float((y - z).square().sum()) for y, z in pairs)
    return 10 * float(torch.log10(torch.tensor(signal / noise)))


def test_blocks_end_where_one_tensor_is_left() -> None:
    qmodel, _ = residual(8)
    assert names(qmodel) == [["stem"], ["a", "b"], ["c"], ["head"]]
    first, blocks = blocks_of(qmodel, layers_of(qmodel))
    walked = [node for block in blocks for node in block.nodes]
    assert len(set(walked)) == len(walked) and not set(first) & set(walked)
    order = list(qmodel.graph.nodes)
    assert walked == sorted(walked, key=order.index)
    for block in blocks:  # nothing but the output is read later
        inner = set(block.nodes) - {block.output}
        assert all(set(node.users) <= set(block.nodes) for node in inner)


def test_what_is_read_at_the_end_keeps_a_block_open() -> None:
    batches = [randn(16, 12, seed=1)]
    qmodel = quantized(ReadAtTheEnd().eval(), batches)
    assert names(qmodel) == [["a"], ["b", "c"]]
    improve(Walk(qmodel, [[x] for x in batches]), BlockReconstruction(steps=5))
    for name in "abc":
        assert_on_grid(qmodel, name)


def test_blocks_compute_what_the_graph_computes() -> None:
    qmodel, walk = residual(4)
    first, blocks = blocks_of(qmodel, layers_of(qmodel))
    placeholders = [n for n in first if n.op == "placeholder"]
    values = dict(zip(placeholders, walk.batches[0], strict=True))
    with torch.no_grad():
        run_quantized(walk, [n for n in first if n not in placeholders], values)
        for block in blocks:
            run_quantized(walk, block.nodes, values)
        torch.testing.assert_close(values[blocks[-1].output], qmodel(*walk.batches[0]))


@pytest.mark.parametrize("name", LAYERS)
def test_a_single_layer_gets_adaround(name: str) -> None:
    weights = []
    for algorithm in (AdaRound(), BlockReconstruction()):
        model, batches = layer_model(name)
        qmodel = quantized(model, batches, bits=3)
        improve(Walk(qmodel, [[x] for x in batches]), algorithm)
        weights.append(weight_and_quantizer(qmodel)[0])
    assert torch.equal(*weights)


@pytest.mark.parametrize("weights", [{}, {"block_size": 16}])
def test_residual_blocks_gain_over_layers_alone(weights: dict[str, object]) -> None:
    """In the mean over three bit widths: one choice of codes in such a small net is partly luck."""
    found = []
    for algorithms in ([], [AdaRound()], [BlockReconstruction(steps=200)]):
        of_bits = []
        for bits in (2, 3, 4):
            qmodel, walk = residual(bits, **weights)
            improve(walk, *algorithms)
            of_bits.append(sqnr(qmodel))
            for name in ("stem", "a", "b", "c", "head") if algorithms else ():
                assert_on_grid(qmodel, name)
        found.append(sum(of_bits) / 3)
    assert found[2] > found[1] + 0.3 > found[0] + 3


def test_codes_lie_next_to_the_weight_and_step_sizes_stay() -> None:
    qmodel, walk = residual(3)
    before = {n: weight_and_quantizer(qmodel, n)[0] for n in ("a", "b")}
    steps = {n: weight_and_quantizer(qmodel, n)[1].step_size.clone() for n in before}
    improve(walk, BiasCorrection(), BlockReconstruction(steps=50))
    for name, old in before.items():
        new, quantizer = weight_and_quantizer(qmodel, name)
        assert float(((new - old).abs() / quantizer.step_for(old)).max()) <= 1 + 1e-4
        assert torch.equal(quantizer.step_size, steps[name])


@pytest.mark.parametrize("last", [lambda x: x > 0, lambda x: x.argmax(-1), lambda x: (x > 0).float()])
def test_a_block_that_gives_no_float_or_no_gradient_stays_at_adaround(last: Callable[[Tensor], Tensor]) -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            with torch.no_grad():
                for index, parameter in enumerate(self.parameters()):
                    parameter.copy_(randn(*parameter.shape, seed=index) / parameter.shape[-1] ** 0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return last(x + self.b(torch.relu(self.a(x))))

    weights, data = [], [randn(32, 12, seed=s) for s in range(2)]
    for steps in (1, 20):
        algorithms = {"block_reconstruction": {"steps": steps, "warmup": 0.5}}
        qmodel = qdq.quantize(Decides().eval(), data, recipe=Recipe(algorithms=algorithms), progress=False)
        weights.append(weight_and_quantizer(qmodel, "b")[0])
    assert torch.equal(*weights)


def test_the_same_twice() -> None:
    weights = []
    for _ in range(2):
        qmodel, walk = residual()
        improve(walk, BlockReconstruction(steps=30))
        torch.rand(1)
        weights.append(weight_and_quantizer(qmodel, "a")[0])
    assert torch.equal(*weights)


def test_a_trained_net_gains_over_adaround() -> None:
    layers = score("S1", 2, [AdaRound(), BiasCorrection()], images=64, tested=200)
    blocks = score("S1", 2, [BiasCorrection(), BlockReconstruction(steps=80)], images=64, tested=200)
    plain = score("S1", 2, [], images=64, tested=200)
    assert blocks.sqnr > layers.sqnr + 0.2 > plain.sqnr + 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, not 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, not -1"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0, not 0"),
        ({"regularisation": -1.0}, "regularisation must be a number above 0, not -1.0"),
        ({"warmup": 1.0}, "warmup must be a number at least 0 and below 1, not 1.0"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockReconstruction(**options)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=message):
        algorithms_of({"block_reconstruction": options})
