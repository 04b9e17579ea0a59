"""A quantized model is a PyTorch module: it can be copied, stored, trained and compiled."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import qdq
from pipeline.helpers import quantize, randn, run_file, run_model

IMAGE = randn(6, 3, 8, 8, seed=1)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 5))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), head).eval()


@pytest.fixture(scope="module")
def qmodel() -> fx.GraphModule:
    return quantize(network(), [IMAGE])


@pytest.fixture(scope="module")
def path(qmodel: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qdq.export_onnx(qmodel, tmp_path_factory.mktemp("models") / "m.onnx")


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IMAGE)


def test_a_deep_copy_is_whole_and_separate(qmodel: fx.GraphModule, path: Path, tmp_path: Path) -> None:
    twin = copy.deepcopy(qmodel)
    assert torch.equal(out(twin), out(qmodel))
    assert str(qdq.explain(twin)) == str(qdq.explain(qmodel))
    assert qdq.export_onnx(twin, tmp_path / "m.onnx").read_bytes() == path.read_bytes()
    expected = out(qmodel).clone()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(out(qmodel), expected)
    assert not torch.equal(out(twin), expected)


def test_a_state_dict_carries_ranges_to_another_quantized_copy(qmodel: fx.GraphModule, path: Path) -> None:
    other = quantize(network(seed=1), [10 * IMAGE])
    assert not torch.equal(out(other), out(qmodel))
    state = qmodel.state_dict()
    assert other.load_state_dict(state) == nn.modules.module._IncompatibleKeys([], [])  # type: ignore[attr-defined]
    assert torch.equal(out(other), out(qmodel))
    assert qdq.verify(other, path, [IMAGE], progress=False).sqnr_db > 60


def test_a_state_without_ranges_leaves_quantizers_uncalibrated(qmodel: fx.GraphModule, tmp_path: Path) -> None:
    twin = copy.deepcopy(qmodel)
    state = {n: v.clone() for n, v in twin.state_dict().items()}
    state["2.output_quantizer.step_size"].fill_(float("nan"))
    twin.load_state_dict(state)
    with pytest.raises(qdq.CalibrationError, match="2.output_quantizer"):
        qdq.export_onnx(twin, tmp_path / "m.onnx")


def test_gradients_reach_weights_and_a_step_of_training_lowers_the_loss(qmodel: fx.GraphModule) -> None:
    student = copy.deepcopy(qmodel).requires_grad_(True)
    target = out(network(seed=3))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (student(IMAGE) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        names = {n for n, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
        assert names == set()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert not any(p.requires_grad for p in qmodel.parameters())


def test_a_trained_model_still_equals_its_export(qmodel: fx.GraphModule, tmp_path: Path) -> None:
    student = copy.deepcopy(qmodel)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * randn(*parameter.shape, seed=4))
    path = qdq.export_onnx(student, tmp_path / "m.onnx")
    assert qdq.verify(student, path, [IMAGE], progress=False).sqnr_db > 60


def test_compile_without_graph_breaks_gives_equal_outputs(qmodel: fx.GraphModule) -> None:
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(qmodel), backend="aot_eager", fullgraph=True)
    assert torch.equal(out(compiled), out(qmodel))  # type: ignore[arg-type]


def test_tracing_again_with_torch_export_gives_equal_outputs(qmodel: fx.GraphModule) -> None:
    program = torch.export.export(copy.deepcopy(qmodel), (IMAGE,))
    assert torch.equal(out(program.module()), out(qmodel))


def test_the_simulation_runs_any_batch_size(qmodel: fx.GraphModule, path: Path) -> None:
    for size in (1, 2, 5):
        (simulated,), (deployed,) = run_model(qmodel, [IMAGE[:size]]), run_file(path, [IMAGE[:size]])
        assert simulated.shape == deployed.shape == (size, 5)


def test_one_sample_is_enough_to_capture_a_dynamic_batch() -> None:
    model = quantize(network(), [IMAGE[:1]])
    assert out(model).shape == (6, 5)


NAMES = {
    "CalibrationError", "CaptureError", "DataError", "Explanation", "ExportError", "Fidelity", "Override", "QdqError",
    "QuantDescriptor", "Recipe", "RecipeError", "Recovery", "RuntimeMissingError", "Sensitivity", "Speed", "Target",
    "TensorQuantizer", "benchmark", "calib", "calibrating", "explain", "export_onnx", "functional", "improve_modules",
    "nn", "quantize", "recover", "sensitivity", "verify",
}  # fmt: skip


def test_exported_names() -> None:
    assert set(qdq.__all__) == NAMES
    assert sorted(qdq.__all__) == list(qdq.__all__)
    assert all(hasattr(qdq, name) for name in NAMES)


def test_errors_share_one_base_and_a_builtin_class() -> None:
    bases = {
        qdq.CaptureError: RuntimeError,
        qdq.DataError: ValueError,
        qdq.RecipeError: ValueError,
        qdq.CalibrationError: RuntimeError,
        qdq.ExportError: RuntimeError,
        qdq.RuntimeMissingError: ImportError,
    }
    for error, builtin in bases.items():
        assert issubclass(error, qdq.QdqError) and issubclass(error, builtin)


def test_importing_the_library_loads_no_optional_package() -> None:
    optional = ["typer", "rich", "onnx", "onnxruntime", "onnxscript", "sklearn", "PIL", "openvino"]
    code = f"import sys, qdq; print([m for m in {optional} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_what_needs_an_extra_says_which(
    qmodel: fx.GraphModule, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(qdq.RuntimeMissingError, match=r"ONNX export needs the package 'onnxscript': .*'qdq\[onnx\]'"):
        qdq.export_onnx(qmodel, tmp_path / "m.onnx")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        qdq.RuntimeMissingError, match=r"running an ONNX file needs the package 'onnxruntime': .*qdq\[onnx"
    ):
        qdq.verify(qmodel, path, [IMAGE], progress=False)
