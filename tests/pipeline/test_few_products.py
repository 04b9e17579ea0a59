"""Convolutions that multiply little and stand between operations in float: where they stay in float, and where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdq
from pipeline.helpers import deploy, operations, optimized_graph, quantize, randn
from qdq import QuantDescriptor, Recipe
from qdq.graph.few_products import REASON

PHOTO = randn(2, 3, 16, 16, seed=1)


class Stem(nn.Module):
    """A first convolution, what follows it, and a convolution of 8 channels."""

    def __init__(self, behind: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8 if options.get("groups", 1) == 1 else 9, **{"kernel_size": 3, **options})
        self.behind = behind
        self.second = nn.LazyConv2d(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.behind(self.first(x)))


def stem(behind: Callable[[Tensor], Tensor], **options: Any) -> nn.Module:
    model = Stem(behind, **options).eval()
    model(PHOTO)
    return model


def first_is_quantized(model: nn.Module, **options: Any) -> bool:
    found = qdq.explain(quantize(model, [PHOTO], **options)).find("first.weight")
    assert found.quantized or REASON in found.reason or found.reason.endswith("the recipe keeps it in float")
    return found.quantized


FLOAT = {
    "silu": nn.functional.silu,
    "hard swish": nn.functional.hardswish,
    "gelu": nn.functional.gelu,
    "leaky relu": nn.functional.leaky_relu,
    "layer norm": lambda y: nn.functional.layer_norm(y, y.shape[1:]),
}
CODES = {
    "nothing": lambda y: y,
    "relu": torch.relu,
    "relu6 and a pool": lambda y: nn.functional.max_pool2d(nn.functional.relu6(y), 2),
    "average pool": lambda y: nn.functional.avg_pool2d(y.relu(), 2),
}


@pytest.mark.parametrize("name", FLOAT)
def test_it_stays_in_float_before_an_operation_in_float(name: str, tmp_path: Path) -> None:
    deployed = deploy(stem(FLOAT[name]), [PHOTO], tmp_path / "model.onnx")
    found = qdq.explain(deployed.qmodel)
    assert not found.find("first.weight").quantized and REASON in found.find("first.weight").reason
    assert found.find("second.weight").quantized
    assert not found.find("x").quantized
    run = operations(optimized_graph(deployed.path))
    assert run["QLinearConv"] == 1 and run["Conv"] + run["FusedConv"] == 1
    assert deployed.fidelity.sqnr_db > 30


@pytest.mark.parametrize("name", CODES)
def test_it_is_quantized_where_an_operation_reads_its_codes(name: str) -> None:
    assert first_is_quantized(stem(CODES[name]))


def test_it_is_quantized_where_it_reads_codes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 5), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3)).eval()
    found = qdq.explain(quantize(model, [PHOTO]))
    assert all(found.find(f"{index}.weight").quantized for index in (0, 2, 4))


def test_it_stays_in_float_before_a_layer_without_integers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    found = qdq.explain(quantize(model, [PHOTO]))
    assert [found.find(f"{index}.weight").quantized for index in (0, 1, 3)] == [False, True, True]
    blocks = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(2), nn.Linear(196, 8)).eval()
    weights = QuantDescriptor(num_bits=8, axis=0, narrow_range=True, block_size=32)
    found = qdq.explain(quantize(blocks, [PHOTO], recipe=Recipe(weights=weights)))
    assert not found.find("0.weight").quantized and found.find("3.weight").quantized


def test_calls_of_one_weight_are_quantized_together() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.silu(self.first(x))
            return self.second(torch.relu(self.first(y)))

    found = qdq.explain(quantize(Twice().eval(), [PHOTO]))
    convolutions = [e for e in found if e.role == "activation" and e.operation == "conv2d"]
    assert len(convolutions) == 3 and all(REASON not in entry.reason for entry in convolutions)
    assert found.find("x").quantized


def test_a_branch_that_reads_codes_is_enough() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return torch.tanh(y) + self.second(y)

    assert first_is_quantized(Branches().eval())


def test_the_output_of_the_model_keeps_its_codes() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return y, self.second(torch.tanh(y))

    assert first_is_quantized(Both().eval())


def test_it_stays_in_float_before_a_layer_that_the_recipe_keeps_in_float() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    model = nn.Sequential(*layers).eval()
    found = qdq.explain(quantize(model, [PHOTO], recipe=Recipe(exclude=["2"])))
    assert [found.find(f"{index}.weight").quantized for index in (0, 2, 4)] == [False, False, True]


@pytest.mark.parametrize("options", [{"kernel_size": 4}, {"kernel_size": (2, 5)}, {"groups": 3}])
def test_more_products_or_groups_are_quantized(options: dict[str, Any]) -> None:
    assert first_is_quantized(stem(nn.functional.silu, **options))


def test_more_channels_and_other_dimensions_are_quantized() -> None:
    pointwise = nn.Sequential(nn.Conv2d(5, 8, 1), nn.SiLU(), nn.Conv2d(8, 8, 3)).eval()
    assert qdq.explain(quantize(pointwise, [randn(2, 5, 8, 8)])).find("0.weight").quantized
    sound = nn.Sequential(nn.Conv1d(1, 8, 10), nn.GELU(), nn.Conv1d(8, 8, 3)).eval()
    assert qdq.explain(quantize(sound, [randn(2, 1, 40)])).find("0.weight").quantized


def test_it_stays_in_float_whatever_else_the_recipe_keeps_there() -> None:
    qmodel = quantize(stem(nn.functional.silu), [PHOTO], recipe=Recipe(exclude=["second"]))
    assert not any(entry.quantized for entry in qdq.explain(qmodel))


def test_a_model_of_such_convolutions_alone_is_quantized() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU()).eval()
    assert qdq.explain(quantize(model, [PHOTO])).find("0.weight").quantized


def test_an_override_quantizes_it() -> None:
    model = stem(nn.functional.silu)
    weights = QuantDescriptor(num_bits=8, axis=0, narrow_range=True)
    assert first_is_quantized(model, recipe=Recipe(overrides={"first": {"weights": weights}}))
    activations = QuantDescriptor(num_bits=8, calib_method="histogram")
    assert first_is_quantized(model, recipe=Recipe(overrides={"first": {"activations": activations}}))
    assert first_is_quantized(model, recipe=Recipe(overrides={"x": {"activations": activations}}))
    assert first_is_quantized(model, recipe=Recipe(overrides={"*": {"weights": weights}}))
    assert not first_is_quantized(model, recipe=Recipe(overrides={"first": {"calibration": "max"}}))
    assert not first_is_quantized(model, recipe=Recipe(exclude=["first"]))


def test_weights_alone_are_quantized_all_the_same() -> None:
    assert first_is_quantized(stem(nn.functional.silu), recipe=Recipe(activations="float"))


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_runtimes_that_fuse_activations_quantize_it(target: str) -> None:
    assert first_is_quantized(stem(nn.functional.silu), target=target)


def test_recovery_collects_what_a_recipe_quantizes_against_the_rule() -> None:
    """One pass over the data serves every rung, also one whose recipe has such an override."""
    model, passes = stem(nn.functional.silu), []

    def batches() -> Iterator[Tensor]:
        passes.append(1)
        yield from (randn(4, 3, 16, 16, seed=seed) for seed in range(4))

    recipe = Recipe(overrides={"first": {"weights": QuantDescriptor(num_bits=8, axis=0, narrow_range=True)}})
    found = qdq.recover(model, batches(), lambda _model: 1.0, recipe=recipe, progress=False)
    direct = quantize(model, [randn(4, 3, 16, 16, seed=seed) for seed in range(4)], recipe=recipe)
    assert len(passes) == 1
    assert torch.equal(found.model(PHOTO), direct(PHOTO))
