"""AdaRound: codes next to the weight, a smaller error of every layer's output, and of the whole net's."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import qdq
from algorithms.layer_cases import (
    LAYERS,
    assert_on_grid,
    layer_model,
    measured,
    quantized,
    randn,
    weight_and_quantizer,
)
from algorithms.trained_nets import score
from qdq.algorithms.adaround import AdaRound
from qdq.algorithms.bias_correction import BiasCorrection
from qdq.algorithms.registry import algorithms_of
from qdq.algorithms.walk import LayerVisit, TensorVisit, Walk
from qdq.errors import RecipeError


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_gains_and_no_channel_loses(name: str) -> None:
    model, batches = layer_model(name)
    qmodel = quantized(model, batches, bits=3)
    before, quantizer = weight_and_quantizer(qmodel)
    step = quantizer.step_size.clone()
    visitor = measured(qmodel, batches, AdaRound(steps=200))
    (old,), (new,) = visitor.before.values(), visitor.after.values()
    assert bool((new <= old * 1.001 + 1e-4).all())
    assert float(new.sum()) < 0.9 * float(old.sum())
    assert_on_grid(qmodel)
    after, _ = weight_and_quantizer(qmodel)
    assert float(((after - before).abs() / quantizer.step_for(before)).max()) <= 1 + 1e-4
    assert torch.equal(quantizer.step_size, step)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("axis", [0, None])
def test_any_bits_per_channel_and_per_tensor(bits: int, axis: int | None) -> None:
    model, batches = layer_model("grouped")
    qmodel = quantized(model, batches, bits=bits, axis=axis)
    visitor = measured(qmodel, batches, AdaRound(steps=100))
    (old,), (new,) = visitor.before.values(), visitor.after.values()
    assert float(new.sum()) < float(old.sum())
    assert_on_grid(qmodel)


def test_blocks_of_input_channels() -> None:
    model, batches = layer_model("linear")
    qmodel = quantized(model, batches, weights={"block_size": 16})
    assert weight_and_quantizer(qmodel)[1].step_size.shape == (6, 2)
    visitor = measured(qmodel, batches, AdaRound(steps=200))
    assert float(visitor.after["0.weight"].sum()) < 0.8 * float(visitor.before["0.weight"].sum())
    assert_on_grid(qmodel)


@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped"])
def test_pairs_that_must_not_saturate_stay_safe(name: str) -> None:
    model, batches = layer_model(name)
    qmodel = quantized(model, batches, bits=8, reduce_range=True)
    assert weight_and_quantizer(qmodel)[1].pairs_axis is not None
    visitor = measured(qmodel, batches, AdaRound(steps=200))
    assert bool((visitor.after["0.weight"] <= visitor.before["0.weight"] * 1.001 + 1e-4).all())
    assert float(visitor.after["0.weight"].sum()) < float(visitor.before["0.weight"].sum())
    assert_on_grid(qmodel)


def test_it_finds_about_the_best_of_all_choices() -> None:
    """Six values a channel: all 64 choices are tried."""
    batches = [randn(40, 6) @ randn(6, 6, seed=3)]
    model = torch.nn.Sequential(torch.nn.Linear(6, 4)).eval()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(randn(4, 6, seed=5))
    qmodel = quantized(model, batches, bits=3)

    class Exhaustive:
        best: Tensor

        def visit_tensor(self, visit: TensorVisit) -> None:
            pass

        def visit_layer(self, visit: LayerVisit) -> None:
            step = visit.layer.quantizer.step_for(visit.weight)
            below = (visit.weight / step).floor()
            (x,), (y,), bias = visit.inputs, visit.float_outputs, visit.bias
            assert bias is not None
            errors = []
            for up in itertools.product((0.0, 1.0), repeat=6):
                weight = (below + torch.tensor(up)).clamp(-3, 3) * step
                errors.append((y - x @ weight.T - bias).double().square().sum(0))
            self.best = torch.stack(errors).amin(0)

    exhaustive = Exhaustive()
    Walk(qmodel, [[x] for x in batches]).run([exhaustive], progress=False)
    visitor = measured(qmodel, batches, AdaRound())
    old, new = visitor.before["0.weight"], visitor.after["0.weight"]
    assert bool((new >= exhaustive.best - 1e-3).all())
    assert float(new.sum()) < 1.05 * float(exhaustive.best.sum()) < 0.7 * float(old.sum())


def test_the_same_twice() -> None:
    weights = []
    for _ in range(2):
        model, batches = layer_model("conv2d")
        qmodel = quantized(model, batches)
        measured(qmodel, batches, AdaRound(steps=50, positions=40))
        torch.rand(1)
        weights.append(weight_and_quantizer(qmodel)[0])
    assert torch.equal(*weights)


@pytest.mark.parametrize(("net", "loss"), [("S1", 0.01), ("S2", 0.03)])
def test_four_bits_cost_trained_nets_little(net: str, loss: float) -> None:
    plain, corrected = score(net, 4, []), score(net, 4, [BiasCorrection()])
    learned = score(net, 4, [AdaRound(), BiasCorrection()])
    assert learned.sqnr > corrected.sqnr + 4 > plain.sqnr + 6
    # The bar on a thousand images: one image is 0.1 point.
    assert learned.accuracy >= learned.in_float * (1 - loss)


def two_layers() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 6)).eval(), [randn(64, 24, seed=1)]


@pytest.mark.parametrize(("layers", "kept"), [(["2"], ["0"]), (["*"], []), (["0.weight", "2"], []), (["0"], ["2"])])
def test_layers_may_be_chosen(layers: list[str], kept: list[str]) -> None:
    model, batches = two_layers()
    weights = qdq.QuantDescriptor(3, axis=0, narrow_range=True)
    plain, chosen = (
        qdq.quantize(model, batches, recipe=qdq.Recipe(weights=weights, algorithms=algorithms), progress=False)
        for algorithms in ({}, {"adaround": {"layers": layers}})
    )
    for name in ("0", "2"):
        same = torch.equal(weight_and_quantizer(plain, name)[0], weight_and_quantizer(chosen, name)[0])
        assert same == (name in kept), name


def test_a_pattern_that_names_no_layer_is_refused() -> None:
    model, batches = two_layers()
    recipe = qdq.Recipe(algorithms={"adaround": {"layers": ["0", "head"]}})
    # What the recipe keeps in float may be named.
    qdq.quantize(
        model, batches, recipe=qdq.Recipe(algorithms={"adaround": {"layers": ["0"]}}, exclude=["0"]), progress=False
    )
    with pytest.raises(RecipeError, match=r"algorithms\['adaround'\]: the pattern 'head' of layers names no layer"):
        qdq.quantize(model, batches, recipe=recipe, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, not 0"),
        ({"steps": 1.5}, "steps must be an integer"),
        ({"positions": True}, "positions must be an integer of at least 1, not True"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0, not 0.0"),
        ({"learning_rate": "fast"}, "learning_rate must be a number above 0, not 'fast'"),
        ({"regularisation": float("nan")}, "regularisation must be a number above 0, not nan"),
        ({"warmup": 1.0}, "warmup must be a number at least 0 and below 1, not 1.0"),
        ({"warmup": -0.1}, "warmup must be a number at least 0 and below 1"),
        ({"layers": "0"}, "layers must be a list of patterns, or nothing for all, not '0'"),
        ({"layers": []}, r"layers must be a list of patterns, or nothing for all, not \[\]"),
        ({"layers": ["0", 1]}, "layers must be a list of patterns"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaRound(**options)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=message):
        algorithms_of({"adaround": options})
