"""SmoothQuant: the function stays, factors are those of the paper, large activation channels gain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qdq
from algorithms.scaled_nets import (
    CONVOLUTIONS,
    GatedBlock,
    TwoOutputs,
    built,
    change_of_function,
    changed,
    plain,
    prepared,
    quantized,
    randn,
    sqnr_db,
    transformer,
)
from qdq import QuantDescriptor
from qdq.algorithms.input_scaling import scalable_inputs
from qdq.algorithms.registry import algorithms_of
from qdq.algorithms.smoothquant import SmoothQuant
from qdq.errors import RecipeError
from qdq.graph.record import record_of

# The paper's own form, with one factor for all tensors.
FOLDED = SmoothQuant(0.5, multiply=False)


def encoder(norm_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, norm_first=norm_first, batch_first=True)


@pytest.mark.parametrize(
    ("build", "scaled"),
    [
        (lambda: encoder(True), {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "linear1.bias"}),
        (lambda: encoder(False), {"linear1.weight", "linear1.bias", "linear2.weight"}),
        (GatedBlock, {"norm1.weight", "norm2.weight", "norm2.bias", "v.bias", "o.weight", "up.bias", "down.weight"}),
        (
            lambda: nn.Sequential(nn.RMSNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)),
            {"0.weight", "3.weight"},
        ),
    ],
    ids=["norms first", "norms last", "gated", "RMS norm"],
)
def test_the_function_stays(build, scaled: set[str]) -> None:
    batches = [randn(4, 6, 16, seed=i) for i in range(2)]
    qmodel = quantized(built(build), batches)
    touched = changed(qmodel, prepared(FOLDED, qmodel, batches))
    assert touched >= scaled
    # What a softmax or a nonlinear function reads, and what a residual addition reads, stays.
    assert not touched & {"q.bias", "k.bias", "gate.bias", "o.bias", "down.bias", "linear2.bias"}
    assert change_of_function(FOLDED, qmodel, batches, 3 * randn(4, 6, 16, seed=9)) < 1e-6


@pytest.mark.parametrize("name", ["conv, batch norm, relu", "flatten"])
def test_only_what_linears_read_is_scaled(name: str) -> None:
    batches = [randn(4, 3, 12, 12)]
    qmodel = quantized(built(CONVOLUTIONS[name]), batches)
    touched = changed(qmodel, prepared(FOLDED, qmodel, batches))
    assert touched == (set() if name != "flatten" else {"0.weight", "0.bias", "4.weight", "4.bias", "6.weight"})
    assert change_of_function(FOLDED, qmodel, batches, randn(4, 3, 12, 12, seed=9)) < 1e-6


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_factors_are_those_of_the_paper(alpha: float) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return torch.cat([self.a(y), self.b(y)], -1)

    model = built(Net)
    model.norm.weight.data[2] = model.norm.bias.data[2] = 0  # no values
    model.a.weight.data[:, 4] = model.b.weight.data[:, 4] = 0  # no weights
    batches = [randn(16, 6, seed=i) for i in range(3)]
    after = prepared(SmoothQuant(alpha), quantized(model, batches), batches)
    with torch.no_grad():
        values = model.norm(torch.cat(batches)).abs().amax(0)
        weights = torch.cat([model.a.weight, model.b.weight]).abs().amax(0)
        factors = values**alpha / weights ** (1 - alpha)
        factors[[2, 4]] = 1
        torch.testing.assert_close(after.get_parameter("norm.weight"), model.norm.weight / factors)
        torch.testing.assert_close(after.get_parameter("norm.bias"), model.norm.bias / factors)
        for name in ("a", "b"):
            weight = after.get_parameter(f"{name}.weight")
            torch.testing.assert_close(weight, model.get_parameter(f"{name}.weight") * factors)
            step = after.get_submodule(f"{name}.weight_quantizer").step_size
            torch.testing.assert_close(step, weight.abs().amax(1) / 127)


def test_what_others_read_is_left_alone() -> None:
    batches = [randn(16, 6)]
    qmodel = quantized(built(TwoOutputs), batches)
    assert FOLDED.prepare(qmodel, [batches], progress=False) == set()


def test_shared_parameters_are_left_alone() -> None:
    class Net(nn.Module):
        """One norm and its parameters, called twice, and a weight of two layers."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b, self.c = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.c.weight = self.b.weight
            self.last = nn.LayerNorm(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(self.norm(self.b(x)) + self.norm(x))
            return self.c(self.last(y))

    batches = [randn(16, 6)]
    qmodel = quantized(built(Net), batches)
    assert changed(qmodel, prepared(FOLDED, qmodel, batches)) == set()


@pytest.mark.parametrize("alpha", [-0.1, 1.5, True, "half"])
def test_options_are_checked(alpha) -> None:
    with pytest.raises(ValueError, match="alpha must be a number from 0 to 1, or 'auto', not"):
        SmoothQuant(alpha)
    with pytest.raises(RecipeError, match="alpha must be a number from 0 to 1, or 'auto', not"):
        algorithms_of({"smoothquant": {"alpha": alpha}})


def test_multiply_is_checked() -> None:
    with pytest.raises(ValueError, match="multiply must be true or false, not 1"):
        SmoothQuant(multiply=1)  # type: ignore[arg-type]


class Residual(nn.Module):
    """What the norm computes is added later, so that it cannot take factors; GELU takes none."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.last = (
            nn.LayerNorm(16),
            nn.Linear(16, 32),
            nn.Linear(32, 16),
            nn.LayerNorm(16),
        )
        with torch.no_grad():
            self.norm.weight[[3, 11]] *= large
            self.up.weight[:, [3, 11]] /= large

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.last(0.1 * y + self.down(nn.functional.gelu(self.up(y))))


def test_what_nothing_can_take_is_multiplied(tmp_path: Path) -> None:
    model = built(lambda: Residual(60.0), norms=False)
    batches, held_out = [randn(8, 12, 16, seed=i) for i in range(2)], [randn(8, 12, 16, seed=10)]
    before = quantized(model, batches, plain(calibration="max"))
    after = quantized(model, batches, plain(calibration="max", algorithms=["smoothquant"]))
    inserted = [n for n in after.graph.nodes if n.op == "get_attr" and str(n.target).endswith("_factors")]
    assert [n.target for n in inserted] == ["norm_output_quantizer_factors"]
    assert sqnr_db(model, after, held_out) > sqnr_db(model, before, held_out) + 6
    assert change_of_function(SmoothQuant(), before, batches, randn(8, 12, 16, seed=9)) < 1e-6
    deployable = plain(calibration="max", algorithms=["smoothquant"], reduce_range="auto")
    after = quantized(model, batches, deployable)
    path = qdq.export_onnx(after, tmp_path / "m.onnx")
    assert qdq.verify(after, path, held_out, progress=False).sqnr_db > 60
    alone = quantized(model, batches, plain(calibration="max", algorithms={"smoothquant": {"multiply": False}}))
    assert not any(str(n.target).endswith("_factors") for n in alone.graph.nodes)


def test_statistics_of_a_smoothed_model_serve_other_recipes() -> None:
    """They are those of the float model, whatever an algorithm has made of its tensors."""
    model = built(lambda: Residual(60.0), norms=False)
    batches = [randn(8, 12, 16, seed=i) for i in range(2)]
    smoothed = quantized(model, batches, plain(calibration="max", algorithms=["smoothquant"]))
    statistics = record_of(smoothed).statistics
    assert statistics is not None
    again = qdq.quantize(model, statistics, recipe=plain(calibration="max"), progress=False)
    plainly = quantized(model, batches, plain(calibration="max"))
    x = randn(8, 12, 16, seed=10)
    assert torch.equal(again(x), plainly(x))


def test_integer_inputs_and_set_ranges_are_not_multiplied() -> None:
    batches = [randn(8, 3, 6, 6, seed=i) for i in range(2)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert scalable_inputs(quantized(built(lambda: net), batches)) == []
    model = built(lambda: Residual(60.0), norms=False)
    fixed = qdq.Override(activations=QuantDescriptor(8, amax=4.0))
    recipe = plain(calibration="max", overrides={"norm": fixed, "gelu": fixed})
    assert scalable_inputs(quantized(model, [randn(8, 12, 16)], recipe)) == []


def test_large_activation_channels_gain() -> None:
    model = built(lambda: transformer(large=60.0), norms=False)
    for name, parameter in model.named_parameters():
        if name.endswith(("q.weight", "k.weight", "v.weight", "gate.weight", "up.weight", "3.weight")):
            parameter.data[:, [3, 11]] /= 60
    batches = [randn(8, 12, 16, seed=i) for i in range(2)]
    held_out = [randn(8, 12, 16, seed=10)]
    before = sqnr_db(model, quantized(model, batches, plain(calibration="max")), held_out)
    better = quantized(model, batches, plain(calibration="max", algorithms=["smoothquant"]))
    assert sqnr_db(model, better, held_out) > before + 10


def test_maxima_of_few_vectors_do_not_mislead() -> None:
    """Channels made alike have a largest value that many of them may exceed: of few vectors too small a range follows.

    Without a trial on other vectors this model lost 7 dB.
    """

    class Unequal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)
            self.head = nn.Linear(64, 16, bias=False)
            self.norm.weight.data[::9] *= 40

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))

    model = built(Unequal, norms=False)
    batches, held_out = [randn(32, 64, seed=i) for i in range(6)], [randn(256, 64, seed=99)]
    before = sqnr_db(model, quantized(model, batches, plain(calibration="max")), held_out)
    after = quantized(model, batches, plain(calibration="max", algorithms=["smoothquant"]))
    assert sqnr_db(model, after, held_out) > before - 0.5
