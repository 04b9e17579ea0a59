"""`qdq.recover` and `qdq.sensitivity` of models that are captured otherwise than with dimension 0 dynamic."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import qdq
from fixtures.transformers import TextEncoder, text
from pipeline.helpers import randn
from qdq.graph.record import record_of
from qdq.graph.targets import ONNXRUNTIME
from qdq.recovery.files import DeployedFiles

RECIPE = qdq.Recipe(calibration="max", algorithms=[])
BOTH = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC})


@pytest.fixture
def quick() -> Iterator[None]:
    """Without the extra `onnx` no file is made, which takes most of the time of small models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        yield


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return TextEncoder().eval()


def of_length(length: int, seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(x[:, :length] for x in text(batch=4, seed=seed))


class Pairs(nn.Module):
    """Takes a batch of 4 alone: its code says so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(2, 2, 6) + x.reshape(2, 2, 6).mean(1, keepdim=True))


@pytest.mark.usefixtures("quick")
def test_two_dynamic_dimensions(tmp_path: Path) -> None:
    lengths: list[int] = []

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            for length in (5, 12):
                lengths.append(length)
                assert model(*of_length(length)).shape == (4, 32)
        return 1.0

    journal = tmp_path / "j.json"
    data = [of_length(12), of_length(7, seed=1)]
    options: dict[str, Any] = {"recipe": RECIPE, "budget": 0, "journal": journal, "progress": False}
    found = qdq.recover(encoder(), data, evaluate, dynamic_shapes=BOTH, **options)
    assert lengths == [5, 12, 5, 12] and found.reached
    assert qdq.recover(encoder(), None, evaluate, dynamic_shapes=BOTH, **options).metric == found.metric
    with pytest.raises(qdq.DataError, match="is of other dynamic_shapes: .*DYNAMIC.* in the journal, now None"):
        qdq.recover(encoder(), None, evaluate, **options)

    result = qdq.sensitivity(encoder(), data, recipe=RECIPE, dynamic_shapes=BOTH, progress=False)
    assert result.samples == 8
    with pytest.raises(qdq.DataError, match="was captured for"):
        qdq.sensitivity(encoder(), data, recipe=RECIPE, progress=False)


def test_the_float_file_has_the_same_dynamic_dimensions(tmp_path: Path) -> None:
    model, data = nn.Linear(6, 3).eval(), [randn(2, 5, 6)]
    quantized = qdq.quantize(model, data, recipe=RECIPE, dynamic_shapes=BOTH[:1], progress=False)
    files = DeployedFiles(model, ((data[0],), {}), ONNXRUNTIME, tmp_path, BOTH[:1])
    assert files.measure(quantized)[1] is not None
    for name in ("float.onnx", "quantized.onnx"):
        (given,) = onnx.load(tmp_path / name).graph.input
        assert [bool(d.dim_param) for d in given.type.tensor_type.shape.dim] == [True, True, False], name


def test_nothing_dynamic() -> None:
    model = Pairs().eval()
    data = [randn(4, 6, seed=i) for i in range(3)]
    with pytest.raises(qdq.CaptureError, match="pass dynamic_shapes='static'"):
        qdq.recover(model, data, lambda m: 1.0, recipe=RECIPE, progress=False)
    found = qdq.recover(
        model, data, lambda m: float(m(data[0]).shape[0]), recipe=RECIPE, progress=False, dynamic_shapes="static"
    )
    assert found.reached and found.rungs[0].latency_ratio and found.float_size
    result = qdq.sensitivity(model, data, recipe=RECIPE, dynamic_shapes="static", progress=False)
    assert result.samples == 12 and len(result)


def test_example_inputs_decide_what_is_captured(tmp_path: Path) -> None:
    """A branch on the length: the example, not the first batch, says which is meant."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
            return self.fc(x) if x.shape[0] > 6 else self.fc(x + shift)

    model = Branch().eval()
    data = [{"x": randn(8, 6), "shift": randn(6)}]
    example = {"x": randn(2, 6), "shift": randn(6)}
    shapes = {"x": {0: Dim.DYNAMIC}, "shift": {}}
    options: dict[str, Any] = {"recipe": RECIPE, "progress": False, "dynamic_shapes": shapes}
    seen = qdq.quantize(model, [{**data[0], "x": randn(5, 6)}], example_inputs=example, **options)
    statistics = record_of(seen).statistics
    assert statistics is not None
    options |= {"journal": tmp_path / "j.json", "budget": 0}

    def evaluate(m: nn.Module) -> float:
        return 1 / (1 + float(m(**example).square().sum()))

    found = qdq.recover(model, statistics, evaluate, example_inputs=example, **options)
    assert record_of(found.model).contract.check((), example)[1].keys() <= example.keys()
    with pytest.raises(qdq.DataError, match="size 8 in dimension 0"):
        record_of(found.model).contract.check((), data[0])
    written = json.loads((tmp_path / "j.json").read_text())
    assert written["example_inputs"] == "float32[2, 6], shift=float32[6]"
    with pytest.raises(qdq.DataError, match="is of other example_inputs: .* in the journal, now None"):
        qdq.recover(model, statistics, evaluate, **options)


def test_a_quantized_model_takes_neither() -> None:
    model, data = Pairs().eval(), [randn(4, 6)]
    quantized = qdq.quantize(model, data, recipe=RECIPE, dynamic_shapes="static", progress=False)
    for options in ({"dynamic_shapes": "static"}, {"example_inputs": data[0]}):
        with pytest.raises(qdq.QdqError, match="quantized already: .* and dynamic_shapes are for a float"):
            qdq.sensitivity(quantized, data, progress=False, **options)  # type: ignore[arg-type]
    assert len(qdq.sensitivity(quantized, data, progress=False)) > 0
