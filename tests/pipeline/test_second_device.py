"""Models that are not on the CPU: quantized, improved, compared and exported as they are on it, to the same values."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdq
from fixtures.second_device import DEVICE, Elsewhere, second_device, to_cpu
from qdq.algorithms.registry import ALGORITHMS
from qdq.export.lowering import lower

W4 = qdq.QuantDescriptor(4, axis=0, narrow_range=True)


def cnn() -> nn.Module:
    """With what convolutions are quantized in: depthwise, ReLU6, a residual addition, a concatenation."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 8, 1))
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = torch.cat([x + self.depthwise(x), x], 1)
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    return Net().eval()


def mlp() -> nn.Module:
    """With what linears are quantized in: normalizations before them, float operations between."""
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))


INPUTS = {cnn: (3, 8, 8), mlp: (5, 16)}


def batches(make: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, *INPUTS[make], generator=generator) for _ in range(3)]


def quantize(model: nn.Module, data: Any, **recipe: Any) -> Any:
    return qdq.quantize(model, data, recipe=qdq.Recipe(**recipe), progress=False)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in to_cpu(model.state_dict()).items()}


# Those that learn: what is the same after a few steps is so after many.
FEW_STEPS = {"adaround": {"steps": 5}, "block_reconstruction": {"steps": 5}, "fine_tuning": {"steps": 15}}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    **{name: {"weights": W4, "algorithms": {name: FEW_STEPS.get(name, {})}} for name in ALGORITHMS},
    "blocks": {
        "weights": qdq.QuantDescriptor(4, axis=0, narrow_range=True, block_size=16),
        "activations": "float",
        "algorithms": ["gptq"],
    },
    "reduced": {"reduce_range": True},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("make", [cnn, mlp])
def test_quantizes_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch, make: Any, recipe: str) -> None:
    data = batches(make)
    expected = quantize(make(), data, **RECIPES[recipe])
    with second_device(monkeypatch, make()) as there:
        qmodel = quantize(there(make()), there(data), **RECIPES[recipe])
        assert {value.device.type for value in qmodel.state_dict().values()} == {DEVICE.type}
        with torch.no_grad():
            output = qmodel(there(data[0]))
    assert isinstance(output, Elsewhere)
    found = state(qmodel)
    for name, value in state(expected).items():
        assert torch.equal(found[name], value), name
    with torch.no_grad():
        assert torch.equal(output.held, expected(data[0]))


@pytest.mark.parametrize("make", [cnn, mlp])
def test_exports_and_verifies(monkeypatch: pytest.MonkeyPatch, make: Any, tmp_path: Path) -> None:
    data = batches(make)
    with second_device(monkeypatch, make()) as there:
        qmodel = quantize(there(make()), there(data))
    path = qdq.export_onnx(qmodel, tmp_path / "there.onnx")
    same = qdq.export_onnx(quantize(make(), data), tmp_path / "here.onnx")
    assert path.read_bytes() == same.read_bytes()
    with second_device(monkeypatch, make()) as there:
        fidelity = qdq.verify(qmodel, path, there(data), progress=False)
    assert fidelity == qdq.verify(quantize(make(), data), same, data, progress=False)
    assert fidelity.tensors


def test_statistics_go_to_the_models_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = batches(cnn)
    expected = quantize(cnn(), data, weights=W4)
    with second_device(monkeypatch, cnn()) as there:
        model = there(cnn())
        qdq.calib.save(quantize(model, there(data)), tmp_path / "seen")
        statistics = qdq.calib.load(tmp_path / "seen")
        found = state(quantize(model, statistics, weights=W4))
    for name, value in state(expected).items():
        assert torch.equal(found[name], value), name


def test_sensitivity(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(cnn)
    expected = qdq.sensitivity(quantize(cnn(), data), data, bits=[4], progress=False)
    with second_device(monkeypatch, cnn()) as there:
        qmodel = quantize(there(cnn()), there(data))
        found = qdq.sensitivity(qmodel, there(data), bits=[4], progress=False)
    assert found.to_dict() == expected.to_dict()


def test_recovery_goes_on_from_a_journal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = batches(cnn)
    with torch.no_grad():
        wanted = cnn()(data[0])

    def recover(model: nn.Module, given: list[Tensor], name: str, budget: float) -> Any:
        def evaluate(candidate: nn.Module) -> float:
            with torch.no_grad():
                output = to_cpu(candidate(given[0]))
            return 1 / (1 + float((output - wanted).square().sum()))

        return qdq.recover(model, given, evaluate, 1.0, budget, journal=tmp_path / name, progress=False)

    expected = recover(cnn(), data, "here", 0)
    with second_device(monkeypatch, cnn()) as there:
        for _ in range(2):
            found = recover(there(cnn()), there(data), "there", 0)
    assert [(r.name, r.metric) for r in found.rungs] == [(r.name, r.metric) for r in expected.rungs]
    for name, value in state(expected.model).items():
        assert torch.equal(state(found.model)[name], value), name


IMPROVING: list[Any] = [
    {"equalization": {}, "adaround": FEW_STEPS["adaround"], "bias_correction": {}},
    ["smoothquant", "gptq"],
    ["awq", "weight_clipping"],
]


@pytest.mark.parametrize(
    ("make", "algorithms"),
    # Only the first has a block of several layers.
    [*product([cnn, mlp], IMPROVING), (cnn, {"block_reconstruction": FEW_STEPS["block_reconstruction"]})],
    ids=lambda value: value.__name__ if callable(value) else "+".join(value),
)
def test_improves_modules(monkeypatch: pytest.MonkeyPatch, make: Any, algorithms: Any) -> None:
    data = batches(make)

    def converted() -> nn.Module:
        return qdq.nn.quantize_modules(make(), qdq.Recipe(weights=W4))

    def calibrated(model: nn.Module, given: list[Tensor]) -> nn.Module:
        with torch.no_grad(), qdq.calibrating(model):
            for x in given:
                model(x)
        return model

    here = calibrated(converted(), data)
    twin = calibrated(converted(), data)
    qdq.improve_modules(here, data, algorithms, progress=False)
    with second_device(monkeypatch, twin) as there:
        model = calibrated(there(converted()), there(data))
        qdq.improve_modules(model, there(data), algorithms, progress=False)
    found = state(model)
    for name, value in state(here).items():
        assert torch.equal(found[name], value), name


def test_a_file_knows_no_devices() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.arange(4, device=x.device)

    qmodel = quantize(Positions().eval(), [torch.randn(8, 16)])
    made = [node for node in qmodel.graph.nodes if node.kwargs.get("device") is not None]
    assert made
    for node in made:
        node.update_kwarg("device", DEVICE)
    lowered = lower(qmodel)
    assert {node.kwargs["device"] for node in lowered.graph.nodes if "device" in node.kwargs} == {torch.device("cpu")}
    assert {node.kwargs["device"] for node in made} == {DEVICE}
