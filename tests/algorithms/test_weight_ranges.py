"""Ranges of weights of few bits: channel by channel the one that serves the layer's output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import qdq
from algorithms.layer_cases import LAYERS, channel_errors, layer_model, quantized, weight_and_quantizer
from fixtures import fashion
from fixtures.classifiers import s1
from qdq.algorithms.walk import LayerVisit, Walk
from qdq.algorithms.weight_ranges import WeightRanges
from qdq.calib.statistics import Statistics
from qdq.graph.record import record_of


class Watched(WeightRanges):
    """Keeps the step sizes of both ranges and the error of each channel's output with each, computed by itself."""

    def visit_layer(self, visit: LayerVisit) -> None:
        quantizer = visit.layer.quantizer
        self.steps: list[Tensor] = []
        self.errors: list[Tensor] = []
        for method in ("mse", "max"):
            quantizer.fit(visit.weight, method)
            self.steps.append(quantizer.step_size.clone())
            self.errors.append(channel_errors(visit))
        self.batches = len(visit.inputs)
        super().visit_layer(visit)
        self.taken = quantizer.step_size.clone()


def watched(qmodel: fx.GraphModule, batches: list[Tensor]) -> Watched:
    visitor = Watched()
    Walk(qmodel, [[x] for x in batches]).run([visitor], progress=False)
    return visitor


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("name", LAYERS)
def test_each_step_size_is_one_of_the_two(name: str, axis: int | None) -> None:
    model, batches = layer_model(name)
    visitor = watched(quantized(model, batches, bits=3, axis=axis), batches)
    least, whole = visitor.steps
    assert visitor.taken.shape == least.shape
    assert bool(((visitor.taken == least) | (visitor.taken == whole)).all())
    one, other = (error.sum() if axis is None else error.reshape(-1, len(least)).sum(0) for error in visitor.errors)
    clear = (other / one - visitor.margin).abs() > 1e-3
    assert torch.equal((visitor.taken == whole)[clear], (other < visitor.margin * one)[clear] | (whole == least)[clear])
    assert visitor.chosen == {"0.weight": int((other < visitor.margin * one).sum())} or not clear.all()


def large_inputs() -> tuple[nn.Module, list[Tensor]]:
    """Of channel 0 the largest weight meets the largest input by far; of channel 1 it meets none."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(512, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, 512, generator=generator))
        layer.weight[0, 0], layer.weight[1, 1] = 8.0, 8.0
    x = torch.randn(64, 512, generator=generator)
    x[:, 0] *= 50
    x[:, 1] = 0
    return nn.Sequential(layer).eval(), [x]


def test_the_whole_range_is_kept_where_the_largest_weights_meet_the_largest_inputs() -> None:
    model, batches = large_inputs()
    weights = qdq.QuantDescriptor(4, axis=0, narrow_range=True)
    steps = {}
    for method in ("auto", "max", "mse"):
        recipe = qdq.Recipe(weights=weights, algorithms=[], weight_calibration=method)
        qmodel = qdq.quantize(model, batches, recipe=recipe, progress=False)
        steps[method] = weight_and_quantizer(qmodel)[1].step_size
    assert bool((steps["mse"] < 0.9 * steps["max"]).all())
    assert steps["auto"][0] == steps["max"][0]
    assert steps["auto"][1] == steps["mse"][1]


def test_blocks_of_a_channel_go_together() -> None:
    model, batches = large_inputs()
    qmodel = quantized(model, batches, bits=4, weights={"block_size": 16}, activations="float")
    visitor = watched(qmodel, batches)
    least, whole = visitor.steps
    assert least.shape == (2, 32)
    for taken, one, other in zip(visitor.taken, least, whole, strict=True):
        assert torch.equal(taken, one) or torch.equal(taken, other)


def test_weights_of_eight_bits_and_statistics_without_inputs() -> None:
    model, batches = large_inputs()
    qmodel = qdq.quantize(model, batches, progress=False)
    quantizer = weight_and_quantizer(qmodel)[1]
    taken = quantizer.step_size.clone()
    quantizer.fit(model.get_parameter("0.weight"), "max")
    assert torch.equal(taken, quantizer.step_size)

    seen = record_of(qmodel).statistics
    assert seen is not None
    recipe = qdq.Recipe(weights=qdq.QuantDescriptor(4, axis=0, narrow_range=True))
    without = Statistics(seen.histograms, [])
    qmodel = qdq.quantize(model, without, recipe=recipe, example_inputs=batches[0], progress=False)
    quantizer = weight_and_quantizer(qmodel)[1]
    taken = quantizer.step_size.clone()
    quantizer.fit(model.get_parameter("0.weight"), "mse")
    assert torch.equal(taken, quantizer.step_size)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_trained_network_gains(bits: int) -> None:
    batches = list(fashion.load("train", limit=64)[0].split(32))
    images = fashion.load("test", limit=200)[0]
    model = s1()
    with torch.no_grad():
        wanted = model(images)
    errors = {}
    for method in ("auto", "max", "mse"):
        weights = qdq.QuantDescriptor(bits, axis=0, narrow_range=True)
        recipe = qdq.Recipe(weights=weights, algorithms=[], weight_calibration=method)
        qmodel = qdq.quantize(model, batches, recipe=recipe, progress=False)
        with torch.no_grad():
            errors[method] = float((qmodel(images) - wanted).square().sum())
    assert errors["auto"] < errors["max"]
    assert errors["auto"] < 1.05 * errors["mse"]
