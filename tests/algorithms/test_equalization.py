"""Cross-layer equalization: the function stays, ranges of weights become alike, per-tensor weights gain."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import qdq
from algorithms.scaled_nets import (
    CONVOLUTIONS,
    TwoOutputs,
    built,
    change_of_function,
    changed,
    in_float,
    plain,
    prepared,
    quantized,
    randn,
    sqnr_db,
)
from fixtures import fashion
from fixtures.classifiers import s1, s2
from qdq.algorithms.equalization import Equalization
from qdq.algorithms.registry import algorithms_of
from qdq.errors import RecipeError

PER_TENSOR = plain(axis=None)
PAPER = Equalization(activations=False)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_function_stays(name: str) -> None:
    batches = [randn(4, 3, 12, 12, seed=i) for i in range(2)]
    qmodel = quantized(built(CONVOLUTIONS[name]), batches)
    assert changed(qmodel, prepared(Equalization(), qmodel, batches))
    # Data that it has not seen, too.
    assert change_of_function(Equalization(), qmodel, batches, 5 * randn(4, 3, 12, 12, seed=9)) < 1e-6


def test_both_layers_get_the_same_ranges() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    first, second = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    batches = [randn(16, 6)]
    qmodel = quantized(model, batches, PER_TENSOR)
    after = dict(prepared(PAPER, qmodel, batches).named_parameters())
    expected = (first.abs().amax(1) * second.abs().amax(0)).sqrt()
    for ranges in (after["0.weight"].abs().amax(1), after["2.weight"].abs().amax(0)):
        torch.testing.assert_close(ranges / ranges.max(), expected / expected.max())
    assert isinstance(after["0.weight"], nn.Parameter)
    torch.testing.assert_close(model[0].weight.detach(), first, rtol=0, atol=0)


def test_step_sizes_are_those_of_the_new_weights() -> None:
    batches = [randn(16, 6)]
    model = built(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    for recipe in (PER_TENSOR, plain(weight_calibration="mse")):
        after = prepared(Equalization(), quantized(model, batches, recipe), batches)
        quantizer, weight = after.get_submodule("2.weight_quantizer"), after.get_parameter("2.weight")
        wanted = quantizer.step_size.clone()
        quantizer.fit(weight, recipe.weight_calibration)
        torch.testing.assert_close(quantizer.step_size, wanted)


def test_depthwise_chains_become_alike() -> None:
    batches = [randn(4, 3, 12, 12)]
    qmodel = prepared(PAPER, quantized(built(CONVOLUTIONS["depthwise"]), batches), batches)
    ranges = [
        qmodel.get_parameter("0.weight").abs().flatten(1).amax(1),
        qmodel.get_parameter("2.weight").abs().flatten(1).amax(1),
        qmodel.get_parameter("4.weight").abs().amax((0, 2, 3)),
    ]
    shares = [r / r.max() for r in ranges]
    torch.testing.assert_close(shares[0], shares[1], rtol=5e-3, atol=0)
    torch.testing.assert_close(shares[1], shares[2], rtol=5e-3, atol=0)


def test_what_others_read_is_left_alone() -> None:
    batches = [randn(16, 6)]
    qmodel = quantized(built(TwoOutputs), batches)
    # a feeds b, which is called twice; c is an output; b feeds itself.
    assert changed(qmodel, prepared(Equalization(), qmodel, batches)) == set()
    assert Equalization().prepare(qmodel, [[x] for x in batches], progress=False) == set()


def test_channels_that_become_one_are_left_alone() -> None:
    """Behind a pixel shuffle every weight reads four channels."""
    batches = [randn(4, 3, 12, 12)]
    model = built(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(2, 4, 1)))
    assert Equalization().prepare(quantized(model, batches), [batches], progress=False) == set()


def test_a_channel_without_weights_keeps_factor_one() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    model[0].weight.data[3] = 0
    model[2].weight.data[:, 5] = 0
    batches = [randn(16, 6)]
    qmodel = quantized(model, batches)
    after = prepared(Equalization(), qmodel, batches)
    for channel in (3, 5):
        assert float(after.get_parameter("0.bias").detach()[channel]) == float(model[0].bias.detach()[channel])
    assert change_of_function(Equalization(), qmodel, batches, randn(8, 6)) < 1e-6


def test_a_range_that_the_user_gave_stays_true() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    given = plain(activations=qdq.QuantDescriptor(num_bits=8, amax=4.0))
    batches = [randn(16, 6)]
    qmodel = quantized(model, batches, given)
    assert changed(qmodel, prepared(Equalization(), qmodel, batches)) == set()


def test_channels_that_reach_the_bound_of_a_clip_are_left_alone() -> None:
    model = built(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1)))
    model[0].weight.data[:4] *= 20
    batches = [randn(4, 3, 12, 12)]
    before = quantized(model, batches)
    after = prepared(Equalization(), before, batches)
    reach = model[0](batches[0]).amax((0, 2, 3)) > 6 * 0.9
    moved = (after.get_parameter("0.weight") != before.get_parameter("0.weight")).flatten(1).any(1)
    assert reach.tolist() == [True] * 4 + [False] * 4 and moved.tolist() == (~reach).tolist()
    # Inside the bound, with its margin, after it as well, and the same function.
    weight, bias = after.get_parameter("0.weight"), after.get_parameter("0.bias")
    assert float(nn.functional.conv2d(batches[0], weight, bias).amax((0, 2, 3))[4:].max()) <= 6 * 0.9 * 1.0001
    torch.testing.assert_close(in_float(after, batches[0]), in_float(before, batches[0]), rtol=1e-5, atol=1e-5)
    wide = Equalization(clip_margin=0.99)
    assert changed(before, prepared(wide, before, batches)) <= {"0.weight", "0.bias", "2.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be an integer of at least 1, not 0"),
        ({"iterations": True}, "iterations must be an integer"),
        ({"tolerance": -1}, "tolerance must be a number at least 0 and below 1, not -1"),
        ({"clip_margin": 1}, "clip_margin must be a number at least 0 and below 1, not 1"),
        ({"activations": 1}, "activations must be True or False, not 1"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Equalization(**options)
    with pytest.raises(RecipeError, match=message):
        algorithms_of({"equalization": options})


def test_badly_scaled_channels_gain_where_weights_have_one_step_size() -> None:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]

    def net() -> nn.Module:
        stem = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        return nn.Sequential(
            *stem, *block(16, 24), *block(24, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
        )

    batches = [randn(16, 3, 16, 16, seed=i) for i in range(2)]
    held_out = [randn(16, 3, 16, 16, seed=10)]
    model = built(net, seed=1)
    before = sqnr_db(model, quantized(model, batches, PER_TENSOR), held_out)
    better = quantized(model, batches, plain(axis=None, algorithms=["equalization"]))
    assert sqnr_db(model, better, held_out) > before + 5


def test_s1_with_badly_scaled_channels_comes_back() -> None:
    model = s1()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.blocks:
            factors = 2 ** (6 * torch.rand(block.bn1.weight.shape, generator=generator) - 3)
            block.bn1.weight *= factors
            block.bn1.bias *= factors
            block.conv2.weight /= factors[:, None, None]
    batches = [fashion.load("train", limit=64)[0]]
    held_out = [fashion.load("test", limit=128)[0]]
    recipe = plain(axis=None, calibration="max")
    before = quantized(model, batches, recipe)
    better = quantized(model, batches, dataclasses.replace(recipe, algorithms={"equalization": {}}))
    assert sqnr_db(model, better, held_out) > sqnr_db(model, before, held_out) + 10


def test_s2_gains_where_weights_have_one_step_size() -> None:
    """Most of its channels stay inside the bound of ReLU6."""
    model = s2()
    batches = list(fashion.load("train", limit=128)[0].split(64))
    held_out = [fashion.load("test", limit=256)[0]]
    recipe = plain(axis=None, calibration="mse")
    before = quantized(model, batches, recipe)
    better = quantized(model, batches, dataclasses.replace(recipe, algorithms={"equalization": {}}))
    assert sqnr_db(model, better, held_out) > sqnr_db(model, before, held_out) + 0.5
    wanted = in_float(before, batches[0][:8])
    assert float((in_float(better, batches[0][:8]) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
