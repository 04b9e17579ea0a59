"""Weights of 2 to 8 bits, per channel and in blocks: codes, step sizes, recipes, and what they cost trained models."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qdq
from fixtures import fashion
from fixtures.classifiers import s1
from fixtures.transformers import MaskedEncoder, masked_sequences
from pipeline.helpers import operations, optimized_graph, quantize, randn, run_file, run_model, sqnr_db
from qdq import Override, QuantDescriptor, Recipe, RecipeError
from qdq.constant_quantizers import WeightQuantizer
from qdq.integer_operations import BlockRounding


def fitted(weight: torch.Tensor, bits: int, axis: int | None, block_size: int | None, method: str = "max") -> Any:
    channels = 1 if axis is None else weight.shape[axis]
    inputs = weight.shape[1 - (axis or 0)] if block_size else 0
    quantizer = WeightQuantizer("w", bits, axis, channels, block_size=block_size, inputs=inputs)
    quantizer.fit(weight, method)
    return quantizer


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("channels", "inputs", "block_size"), [(5, 70, 16), (1, 7, 32), (3, 32, 32), (4, 1, 16)])
def test_blocks_are_quantized_each_by_itself(bits: int, axis: int, channels: int, inputs: int, block_size: int) -> None:
    rows = randn(channels, inputs, seed=bits)
    rows[0, :2] = 0
    weight = rows if axis == 0 else rows.t().contiguous()
    quantizer = fitted(weight, bits, axis, block_size)
    bound = 2 ** (bits - 1) - 1
    groups = -(-inputs // block_size)
    assert quantizer.bound == bound and quantizer.step_size.shape == (channels, groups)
    codes = quantizer.codes(weight)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    codes = codes if axis == 0 else codes.t()
    for channel in range(channels):
        for group in range(groups):
            part = slice(group * block_size, (group + 1) * block_size)
            values = rows[channel, part].numpy()
            step = np.maximum(np.abs(values).max(), np.float32(2.0**-48)) / np.float32(bound)
            assert quantizer.step_size[channel, group].numpy() == step
            np.testing.assert_array_equal(codes[channel, part].numpy(), np.rint(values / step).astype(np.int8))
    step = quantizer.step_for(weight)
    assert step.shape == weight.shape
    torch.testing.assert_close(quantizer(weight), quantizer.codes(weight) * step, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("factor", [1e-9, 1e-6, 1e9])
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_the_unit_of_weights_and_inputs_is_no_matter(target: str, factor: float, bits: int, tmp_path: Path) -> None:
    def error(factor: float) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        batches = [randn(64, 16, seed=seed) / factor for seed in range(3)]
        with torch.no_grad():
            model.get_parameter("0.weight").mul_(factor)
        recipe = Recipe(weights=QuantDescriptor(bits, axis=0, narrow_range=True))
        qmodel = quantize(model, batches, recipe=recipe, target=target)
        qdq.export_onnx(qmodel, tmp_path / "m.onnx")
        (wanted,), (given,) = run_model(model, batches[:1]), run_file(tmp_path / "m.onnx", batches[:1])
        return sqnr_db(wanted, given)

    assert error(factor) == pytest.approx(error(1.0), abs=1.0)


@pytest.mark.parametrize(("axis", "shape"), [(None, ()), (0, (6, 1, 1, 1)), (1, (1, 4, 1, 1))])
def test_step_for_broadcasts_to_weights_of_any_rank(axis: int | None, shape: tuple[int, ...]) -> None:
    weight = randn(6, 4, 3, 3)
    quantizer = fitted(weight, 4, axis, None)
    assert quantizer.step_for(weight).shape == shape
    assert (weight / quantizer.step_for(weight)).abs().max() <= quantizer.bound * (1 + 1e-6)


def test_least_squares_gain_in_blocks_and_small_blocks_gain_over_channels() -> None:
    weight = randn(16, 100) * torch.linspace(0.1, 3, 100)

    def error(block_size: int | None, method: str, bits: int = 4) -> float:
        return float((fitted(weight, bits, 0, block_size, method)(weight) - weight).square().sum())

    assert error(16, "mse") < error(16, "max") < error(32, "max") < error(None, "max")
    assert error(32, "mse") < error(32, "max") and error(32, "max", 3) > 3 * error(32, "max")


def test_blocks_of_zeros_stay_zero_and_pass_gradients() -> None:
    weight = torch.zeros(2, 40, requires_grad=True)
    quantizer = fitted(weight, 4, 0, 16)
    out = quantizer(weight)
    assert not out.detach().any()
    out.sum().backward()
    assert weight.grad is not None and bool((weight.grad == 1).all())


def test_quantizers_with_blocks_are_copied_saved_and_described() -> None:
    weight = randn(4, 50)
    quantizer = fitted(weight, 3, 0, 32)
    other = WeightQuantizer("w", 3, 0, 4, block_size=32, inputs=50)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.codes(weight), quantizer.codes(weight))
    assert torch.equal(copy.deepcopy(quantizer)(weight), quantizer(weight))
    assert quantizer.extra_repr() == "int8, 3 bits, axis=0, channels=4, blocks of 32"
    assert WeightQuantizer("w", 4, 0, 4, stored_bits=4).extra_repr() == "int4, 4 bits, axis=0, channels=4"


def test_inputs_are_rounded_in_blocks_only_while_the_weight_is_quantized() -> None:
    weights = fitted(randn(4, 50), 4, 0, 16)
    rounding = BlockRounding(weights, 16)
    x = randn(3, 2, 50)
    x[0, 0, :16] = 0
    rounded = rounding(x)
    assert rounded.shape == x.shape and not rounded[0, 0, :16].any()
    for part in (slice(16, 32), slice(48, 50)):
        values = x[1, 1, part]
        step = values.abs().max() / 127
        torch.testing.assert_close(rounded[1, 1, part], torch.round(values / step) * step)
    weights.enabled = False
    assert rounding(x) is x or torch.equal(rounding(x), x)
    assert rounding.extra_repr() == "int8, blocks of 16"


DESCRIPTOR = QuantDescriptor(4, axis=0, narrow_range=True, block_size=32)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(weights=DESCRIPTOR),
        Recipe(weights=DESCRIPTOR, activations="float"),
        Recipe(activations=float),  # type: ignore[arg-type]
        Recipe(overrides={"a": Override(weights=DESCRIPTOR, activations="float"), "b": {"activations": float}}),
        Recipe(activations="float", overrides={"a": {"activations": {"num_bits": 8}}}),
    ],
)
def test_recipes_with_blocks_and_float_activations_survive_files(recipe: Recipe) -> None:
    assert Recipe.from_yaml(recipe.to_yaml()) == Recipe.from_dict(recipe.to_dict()) == recipe
    recipe.check_deployable()


def test_recipes_by_hand() -> None:
    text = "weights: {num_bits: 4, block_size: 128}\nactivations: float\noverrides: {a: {weights: {block_size: 32}}}"
    recipe = Recipe.from_yaml(text)
    toml = 'activations = "float"\nweights = {num_bits = 4, block_size = 128}\n[overrides]\n'
    assert recipe == Recipe.from_toml(toml + "a = {weights = {block_size = 32}}")
    assert recipe.weights == QuantDescriptor(4, axis=0, narrow_range=True, block_size=128)
    assert recipe.activations == "float" and recipe.activations_for("b") is None
    assert recipe.weights_for("a.weight") == QuantDescriptor(8, axis=0, narrow_range=True, block_size=32)
    assert recipe.weights_for("b") == recipe.weights
    mixed = Recipe(activations="float", overrides={"a": {"activations": {"num_bits": 8}}})
    assert mixed.activations_for("a") is not None and mixed.activations_for("b") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": QuantDescriptor(block_size=32)}, r"^weights.block_size=32 needs axis=0: blocks are parts of"),
        (
            {"weights": QuantDescriptor(axis=0, block_size=24)},
            "^weights.block_size must be a power of two from 16 to 256, .* 24",
        ),
        (
            {"weights": QuantDescriptor(4, axis=0, block_size=512)},
            "^weights.block_size must be a power of two from 16 to 256, .* 512",
        ),
        (
            {"weights": QuantDescriptor(axis=0, block_size=8)},
            "^weights.block_size must be a power of two from 16 to 256, .* 8",
        ),
        (
            {"activations": QuantDescriptor(block_size=32)},
            "^activations.block_size must be None: blocks are for weights",
        ),
        ({"activations": "int8"}, '^activations must be a QuantDescriptor or "float", not str'),
        ({"overrides": {"a": {"weights": {"block_size": 5}}}}, r"^overrides\['a'\].weights.block_size must be a power"),
        ({"overrides": {"a": {"weights": {"block_size": 0}}}}, r"^overrides\['a'\].weights: block_size must be 1 or"),
        ({"overrides": {"a": {"weights": {"block_size": "4"}}}}, "weights: block_size must be None or an integer"),
        ({"overrides": {"a": {"activations": "f"}}}, r"^overrides\['a'\].activations must be a mapping, not str"),
    ],
    ids=str,
)
def test_impossible_blocks_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**fields)


def test_modules_refuse_float_activations() -> None:
    model = nn.Sequential(nn.Linear(32, 4))
    with pytest.raises(RecipeError, match=r"^overrides\['0'\].activations=\"float\" is for qdq.quantize: in modules"):
        qdq.nn.quantize_modules(model, Recipe(overrides={"0": Override(activations="float")}))
    assert type(model[0]) is nn.Linear


def test_descriptors_check_and_keep_the_block_size() -> None:
    assert DESCRIPTOR.block_size == 32 and QuantDescriptor().block_size is None
    assert (
        QuantDescriptor.from_yaml(DESCRIPTOR.to_yaml()) == DESCRIPTOR != QuantDescriptor(4, axis=0, narrow_range=True)
    )
    for value in (True, 1.5, "32"):
        with pytest.raises(TypeError, match="block_size must be None or an integer, got"):
            QuantDescriptor(block_size=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_size must be 1 or more, got 0"):
        QuantDescriptor(block_size=0)


def plain(bits: int, block_size: int | None = None, activations: Any = "float") -> Recipe:
    """Plain rounding, without what improves on it."""
    weights = QuantDescriptor(bits, axis=0, narrow_range=True, block_size=block_size)
    return Recipe(weights=weights, activations=activations, algorithms={})


def test_fewer_bits_cost_a_trained_classifier_more() -> None:
    """S1, weights alone and plain rounding: 8 bits cost nothing, 4 bits less than two points."""
    model, (images, labels) = s1(), fashion.load("test", limit=300)
    reference = run_model(model, [images])
    right, noise = {}, {}
    for bits in (8, 4):
        out = run_model(quantize(model, [images[:1]], recipe=plain(bits)), [images])
        right[bits] = float((out[0].argmax(1) == labels.numpy()).mean())
        noise[bits] = sqnr_db(reference, out)
    before = float((reference[0].argmax(1) == labels.numpy()).mean())
    assert noise[8] > 38 and 12 < noise[4] < 20
    assert right[8] >= before - 0.004 and right[4] >= before - 0.02


def test_blocks_gain_on_an_encoder_and_nothing_but_weights_is_quantized() -> None:
    torch.manual_seed(0)
    model, data = MaskedEncoder().eval(), masked_sequences(4)
    reference = run_model(model, data)
    noise = {}
    for block_size in (None, 16):
        qmodel = quantize(model, [data], recipe=plain(4, block_size))
        noise[block_size] = sqnr_db(reference, run_model(qmodel, data))
        entries = list(qdq.explain(qmodel))
        assert not any(e.quantized for e in entries if e.role != "weight")
        linears = [e for e in entries if e.quantized]
        assert len(linears) == 9
        how = "4 bits" + (f", blocks of {block_size}" if block_size else "") + ", weight only: the recipe keeps"
        assert all(e.reason.startswith(how) for e in linears)
        assert all(e.reason.endswith(f"to int8, in blocks of {block_size or 32}") for e in linears)
    assert noise[16] > noise[None] and min(noise.values()) > 12


def test_integer_activations_beside_blocks() -> None:
    """Linears in blocks compute in float, and say so; the convolution before them stays in integers."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
    descriptor = QuantDescriptor(8, calib_method="histogram")
    explanation = qdq.explain(quantize(model, [randn(4, 4, 8, 8)], recipe=plain(4, 32, descriptor)))
    assert explanation.find("0.weight").reason.startswith("QLinearConv")
    assert "no integer kernel takes step sizes per block" in explanation.find("3.weight").reason
    assert "no integer kernel takes step sizes per block" in explanation.find("linear").reason


class EveryWidth(nn.Module):
    """For each width of weights a convolution and a linear behind it, each pair with an output of its own."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10)) for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(pair(x) for pair in self.pairs)


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_weights_of_2_to_7_bits_run_as_simulated_beside_integer_activations(
    activation_bits: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    widths = range(2, 8)
    model: Any = EveryWidth(len(widths)).eval()
    for pair in model.pairs[1:]:
        pair.load_state_dict(model.pairs[0].state_dict())
    data = [randn(16, 8, 6, 6, seed=seed) for seed in range(2)]
    recipe = Recipe(
        activations=QuantDescriptor(activation_bits),
        calibration="max",
        algorithms={},
        overrides={
            f"pairs.{i}": {"weights": QuantDescriptor(bits, axis=0, narrow_range=True)} for i, bits in enumerate(widths)
        },
    )
    qmodel = quantize(model, data, recipe=recipe)
    path = qdq.export_onnx(qmodel, tmp_path / "m.onnx")
    for i, bits in enumerate(widths):
        for name in (f"pairs.{i}.0", f"pairs.{i}.3"):
            quantizer: Any = qmodel.get_submodule(f"{name}.weight_quantizer")
            assert int(quantizer.codes(qmodel.get_parameter(f"{name}.weight")).abs().max()) == 2 ** (bits - 1) - 1
    unseen = randn(16, 8, 6, 6, seed=9)
    exact, simulated, given = run_model(model, [unseen]), run_model(qmodel, [unseen]), run_file(path, [unseen])
    executed = operations(optimized_graph(path))
    for operator in ("QLinearConv", "QGemm") if activation_bits == 8 else ("Conv", "Gemm"):
        assert executed[operator] == len(widths)
    assert min(sqnr_db([a], [b]) for a, b in zip(simulated, given, strict=True)) > 100
    # Each bit is worth 6 dB, less what the activations cost.
    quality = [sqnr_db([a], [b]) for a, b in zip(exact, given, strict=True)]
    assert quality[0] > 5 and all(more > fewer + 2.5 for fewer, more in pairwise(quality))
