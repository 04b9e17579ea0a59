"""Algorithms on linears whose weights have step sizes in blocks: what they gain, and that it is deployed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import qdq
from algorithms.scaled_nets import built, quantized, randn, sqnr_db
from pipeline.helpers import run_file
from pipeline.helpers import sqnr_db as sqnr_of_arrays
from qdq import QuantDescriptor, Recipe
from qdq.constant_quantizers import WeightQuantizer

BLOCK = 16


def two_linears() -> nn.Module:
    return built(lambda: nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 24)))


def unlike_channels() -> nn.Module:
    """The values between both linears, and the weights that read them, are of unlike size."""
    model: Any = two_linears()
    factors = (0.8 * randn(48, seed=5)).exp()
    with torch.no_grad():
        model[0].weight.mul_(factors[:, None])
        model[0].bias.mul_(factors)
        model[2].weight.div_(factors)
    return model


def large_inputs(large: float, small_weights: bool) -> nn.Module:
    """Two channels leave the normalization so many times as large; the weights that read them may make up for it."""
    model: Any = built(lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 24)), norms=False)
    with torch.no_grad():
        model[0].weight[[5, 17]] *= large
        if small_weights:
            model[1].weight[:, [5, 17]] /= large
    return model


class Case(NamedTuple):
    """Where an algorithm gains, by at least so many dB; `shift` is the mean of the inputs."""

    build: Callable[[], nn.Module]
    gain: float
    shift: float = 0.0


CASES = {
    "bias_correction": Case(two_linears, 3.0, shift=2.0),
    "equalization": Case(unlike_channels, 2.0),
    "smoothquant": Case(lambda: large_inputs(30.0, small_weights=True), 6.0),
    "awq": Case(lambda: large_inputs(8.0, small_weights=False), 2.0),
    "fine_tuning": Case(two_linears, 3.0, shift=2.0),
}


def in_blocks(algorithms: Any) -> Recipe:
    weights = QuantDescriptor(num_bits=4, axis=0, narrow_range=True, block_size=BLOCK)
    return Recipe(weights=weights, activations="float", weight_calibration="max", algorithms=algorithms)


@pytest.mark.parametrize("name", CASES)
def test_gains_over_plain_rounding_and_runs_as_simulated(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.build()

    def data(*seeds: int) -> list[Tensor]:
        return [case.shift + randn(64, 32, seed=seed) for seed in seeds]

    batches, held_out = data(0, 1, 2, 3), data(10, 11)
    before = sqnr_db(model, quantized(model, batches, in_blocks([])), held_out)
    qmodel = quantized(model, batches, in_blocks([name]))
    quantizers = {m.name: m for m in qmodel.modules() if isinstance(m, WeightQuantizer)}
    weights = {n: qmodel.get_parameter(n.removesuffix("_quantizer")) for n in quantizers}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(quantizers) == len(linears)
    for key, quantizer in quantizers.items():
        channels, inputs = weights[key].shape
        assert quantizer.step_size.shape == (channels, inputs // BLOCK)
        assert int(quantizer.codes(weights[key]).abs().max()) <= 7

    path = qdq.export_onnx(qmodel, tmp_path / "m.onnx")
    # Where the runtime rounds inputs, a value in the middle between two codes may fall to either side.
    assert qdq.verify(qmodel, path, held_out, progress=False).sqnr_db > 60
    with torch.no_grad():
        wanted = [model(x).numpy() for x in held_out]
    deployed = sqnr_of_arrays(wanted, [run_file(path, [x])[0] for x in held_out])
    assert deployed > before + case.gain
