"""AWQ: the function stays, the error of the layers never grows, weights of few bits gain."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from algorithms.scaled_nets import (
    CONVOLUTIONS,
    GatedBlock,
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
from qdq.algorithms.awq import AWQ
from qdq.algorithms.registry import algorithms_of
from qdq.errors import RecipeError


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_function_of_convolutions_stays(name: str) -> None:
    batches = [randn(4, 3, 12, 12, seed=i) * torch.tensor([8.0, 1.0, 0.2]).reshape(3, 1, 1) for i in range(2)]
    qmodel = quantized(built(CONVOLUTIONS[name]), batches, plain(bits=4))
    assert changed(qmodel, prepared(AWQ(steps=4), qmodel, batches))
    assert change_of_function(AWQ(steps=4), qmodel, batches, 3 * randn(4, 3, 12, 12, seed=9)) < 1e-6


def test_the_function_of_transformers_stays() -> None:
    batches = [randn(4, 6, 16, seed=i) for i in range(2)]
    qmodel = quantized(built(GatedBlock), batches, plain(bits=3))
    touched = changed(qmodel, prepared(AWQ(), qmodel, batches))
    assert touched >= {"norm1.weight", "norm2.weight", "norm2.bias", "q.weight", "k.weight", "v.weight"}
    assert not touched & {"q.bias", "k.bias", "gate.bias", "o.bias", "down.bias"}
    assert change_of_function(AWQ(), qmodel, batches, 3 * randn(4, 6, 16, seed=9)) < 1e-6


def layer(large: float = 20.0) -> tuple[nn.Module, list[torch.Tensor]]:
    model = built(lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16)), norms=False)
    model[0].weight.data[[5, 17]] = large
    return model, [randn(64, 32, seed=i) for i in range(2)]


def test_alpha_is_that_of_least_error() -> None:
    model, batches = layer()
    qmodel = quantized(model, batches, plain(bits=3, activations="float"))
    after = prepared(AWQ(steps=10, positions=128), qmodel, batches)
    with torch.no_grad():
        x = model[0](torch.cat(batches))
        weight, means = model[1].weight, x.abs().mean(0)
        quantizer = qmodel.get_submodule("1.weight_quantizer")
        errors, trials = [], []
        for step in range(11):
            factors = (means / means.log().mean().exp()) ** (step / 10)
            quantizer.fit(weight * factors, "max")
            errors.append(float((x @ (quantizer(weight * factors) / factors - weight).T).square().sum()))
            trials.append(weight * factors)
        best = min(range(11), key=errors.__getitem__)
        assert best > 0 and errors[best] < 0.7 * errors[0]
        torch.testing.assert_close(after.get_parameter("1.weight"), trials[best])


def test_where_nothing_helps_nothing_changes() -> None:
    model, batches = layer(large=1.0)
    batches = [torch.cat([x, -x]) for x in batches]
    qmodel = quantized(model, batches, plain(bits=8))
    model[0].weight.data.zero_()
    silent = quantized(model, batches, plain(bits=8))
    assert changed(silent, prepared(AWQ(), silent, batches)) == set()
    assert AWQ().prepare(silent, [batches[:1]], progress=False) == set()
    assert AWQ().prepare(quantized(nn.Sequential(nn.Linear(32, 4)), batches), [batches[:1]], progress=False) == set()
    assert changed(qmodel, prepared(AWQ(steps=1), qmodel, batches)) == set()


def test_same_samples_same_result() -> None:
    batches = [randn(4, 6, 16, seed=i) for i in range(2)]
    qmodel = quantized(built(GatedBlock), batches, plain(bits=4))
    assert changed(prepared(AWQ(), qmodel, batches), prepared(AWQ(), qmodel, batches)) == set()


@pytest.mark.parametrize("option", ["steps", "positions"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_options_are_checked(option: str, value) -> None:
    with pytest.raises(ValueError, match=f"{option} must be an integer of at least 1, not {value}"):
        AWQ(**{option: value})
    with pytest.raises(RecipeError, match=f"{option} must be an integer of at least 1"):
        algorithms_of({"awq": {option: value}})


def feed_forward() -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 8))
    for norm in (model[0], model[3]):
        norm.weight.data[[5, 17]] = 8.0  # type: ignore[index,union-attr]
    return model


@pytest.mark.parametrize(
    ("build", "bits", "width"),
    [
        pytest.param(lambda: transformer(large=8.0), 4, 16, id="transformer, 4 bits"),
        pytest.param(feed_forward, 3, 32, id="feed-forward, 3 bits"),
    ],
)
def test_weights_of_few_bits_gain(build, bits: int, width: int) -> None:
    model = built(build, norms=False)
    batches = [randn(8, 12, width, seed=i) for i in range(2)]
    held_out = [randn(8, 12, width, seed=10)]
    for ranges, gain in (("max", 2.0), ("auto", 0.5)):
        fields = {"activations": "float", "weight_calibration": ranges}
        before = sqnr_db(model, quantized(model, batches, plain(bits, **fields)), held_out)
        better = quantized(model, batches, plain(bits, algorithms=["awq"], **fields))
        assert sqnr_db(model, better, held_out) > before + gain
