"""Layers in unusual spellings: each is captured, quantized, exported and run, and equals its simulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import qdq
from pipeline.helpers import deploy, initializers, operations, optimized_graph, quantize, randn, run_model, sqnr_db
from qdq.constant_quantizers import WeightQuantizer

IMAGE, ROWS, SEQUENCE = randn(4, 4, 8, 8, seed=1), randn(4, 8, seed=2), randn(4, 5, 8, seed=3)


class Tied(nn.Module):
    """One weight in two modules: the table of an embedding and the head, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.words(ids))))


class Twice(nn.Module):
    """One module called twice, on tensors of different range."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.relu(10 * self.shared(torch.relu(self.first(x)))))


class ConvSize(nn.Module):
    """The functional call with the weight as a plain parameter, computed from another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(nn.functional.conv2d(x, self.weight * 0.5, self.bias, stride=2))


class Addmm(nn.Module):
    """`addmm` with the weight as [in, out], as models ported from other frameworks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.addmm(self.bias, x, self.weight))


class Matmul(nn.Module):
    """A matrix product with a parameter on the right."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.weight)


def weight_norm(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        return parametrizations.weight_norm(layer)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "conv without bias": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.ReLU()), IMAGE, "QLinearConv"),
    "conv padding same": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, (3, 5), padding="same"), nn.ReLU()),
        IMAGE,
        "QLinearConv",
    ),
    "conv padding valid": (lambda: nn.Conv2d(4, 4, 3, padding="valid"), IMAGE, "QLinearConv"),
    "conv1d padding same": (lambda: nn.Conv1d(5, 4, 3, padding="same"), SEQUENCE, "QLinearConv"),
    "conv reflect padding": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), IMAGE, "QLinearConv"),
    "conv circular padding": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), IMAGE, "QLinearConv"),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Conv2d(4, 6, 3)), nn.ReLU()), IMAGE, "QLinearConv"),
    "weight of an expression": (ConvSize, IMAGE, "QLinearConv"),
    "called twice": (Twice, IMAGE, "QLinearConv"),
    "batch norm behind linear": (lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU()), ROWS, "QGemm"),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU()), ROWS, "QGemm"),
    "addmm": (Addmm, ROWS, "QGemm"),
    "matmul": (Matmul, ROWS, "QGemm"),
    "linear 3d without bias": (lambda: nn.Linear(8, 6, bias=False), SEQUENCE, "MatMulIntegerToFloat"),
    "linear 3d": (lambda: nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4)), SEQUENCE, "MatMulIntegerToFloat"),
    "tied weights": (Tied, torch.arange(20).reshape(4, 5), "MatMulIntegerToFloat"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_runs_in_integers_and_equals_its_simulation(name: str, tmp_path: Path) -> None:
    build, x, operator = LAYERS[name]
    torch.manual_seed(0)
    model = build().eval()
    deployed = deploy(model, [x, x.flip(0)], tmp_path / "m.onnx", recipe=qdq.Recipe(reduce_range=True))
    assert deployed.fidelity.sqnr_db > 55, str(deployed.fidelity)
    assert all(e.quantized for e in qdq.explain(deployed.qmodel) if e.role == "weight")
    executed = operations(optimized_graph(deployed.path))
    assert executed[operator] >= 1 and executed["Conv"] == executed["FusedConv"] == executed["Gemm"] == 0, executed
    assert sqnr_db(run_model(model, [x]), run_model(deployed.qmodel, [x])) > 25


def test_a_tied_weight_has_one_quantizer_and_is_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    deployed = deploy(Tied().eval(), [torch.arange(20).reshape(4, 5)], tmp_path / "m.onnx")
    found = [n for n, m in deployed.qmodel.named_modules() if isinstance(m, WeightQuantizer)]
    assert len(found) == 2  # body, and the tied one
    tables = [a for a in initializers(deployed.path).values() if a.size == 160]
    # The head's product needs the transposed table, so that there are two, both of codes.
    assert len(tables) <= 2 and all(a.dtype == "int8" for a in tables)


def test_a_module_called_twice_has_one_weight_quantizer_and_a_bias_per_call(tmp_path: Path) -> None:
    torch.manual_seed(0)
    deployed = deploy(Twice().eval(), [IMAGE], tmp_path / "m.onnx")
    weights = [a for a in initializers(deployed.path).values() if a.dtype == "int8" and a.size == 144]
    biases = [a for a in initializers(deployed.path).values() if a.dtype == "int32" and a.any()]  # without zero points
    assert len(weights) == 2  # of `first`, and of `shared` once
    assert len(biases) == 3  # the bias's step is that of the input times that of the weight


def test_weight_norm_leaves_one_folded_weight() -> None:
    torch.manual_seed(0)
    qmodel = quantize(weight_norm(nn.Conv2d(4, 6, 3)).eval(), [IMAGE])
    parameters = {n for n, _ in qmodel.named_parameters()}
    assert parameters == {"weight_folded", "bias"}


def test_batch_norms_are_folded_and_gone() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    norm.running_mean, norm.running_var = torch.rand(4), torch.rand(4) + 0.5  # type: ignore[assignment]
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), norm, nn.ReLU()).eval()
    qmodel = quantize(model, [IMAGE], recipe=qdq.Recipe(algorithms=[]))
    assert set(dict(qmodel.named_parameters())) == {"0.weight", "0.bias"}
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    expected = model[0].weight.detach() * factor.reshape(-1, 1, 1, 1)
    assert torch.allclose(qmodel.get_submodule("0").weight, expected, atol=1e-6)
    assert torch.allclose(qmodel.get_submodule("0").bias, (norm.bias - norm.running_mean * factor).detach(), atol=1e-6)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0][:, -1])


def test_an_lstm_stays_in_float_is_explained_and_exports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Recurrent().eval()
    deployed = deploy(model, [SEQUENCE], tmp_path / "m.onnx", dynamic_shapes="static")
    assert deployed.fidelity.sqnr_db > 40
    explanation = qdq.explain(deployed.qmodel)
    assert explanation.find("fc.weight").quantized
    assert not explanation.find("lstm.weight_ih_l0").quantized
    assert "lstm" in explanation.find("lstm.weight_ih_l0").reason
    stored = operations(onnx.load(deployed.path))
    assert stored["LSTM"] == 1
    assert sqnr_db(run_model(model, [SEQUENCE]), run_model(deployed.qmodel, [SEQUENCE])) > 30


def test_a_model_with_nothing_to_quantize_goes_through(tmp_path: Path) -> None:
    deployed = deploy(nn.Sequential(nn.LayerNorm(8), nn.Softmax(-1)).eval(), [ROWS], tmp_path / "m.onnx")
    assert deployed.fidelity.sqnr_db > 100
    assert not any(e.quantized for e in qdq.explain(deployed.qmodel))


class Buffered(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.fc(x)
        return -self.fc(x)


class FixedBatch(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).reshape(4, 2)


class Locked(Branching):
    def __init__(self) -> None:
        import threading

        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            Branching,
            r"(?s)torch.export could not capture the model: .*test_layers\.py:\d+, in forward.*branches on values",
        ),
        (
            FixedBatch,
            r"(?s)could not capture the model.*fixes a dimension that should be dynamic.*dynamic_shapes='static'",
        ),
        (Buffered, "the model writes to the buffer or input 'calls' in eval mode; a deployed graph has no state"),
        (Locked, "the model cannot be copied .*; qdq works on a copy so that yours is never changed"),
        (lambda: nn.Linear(8, 2).half(), "the model holds float16 parameters; quantization starts from float32"),
        (lambda: nn.Linear(8, 2).double(), "the model holds float64 parameters; quantization starts from float32"),
    ],
)
def test_a_model_that_cannot_be_captured_is_told_why_and_where(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(qdq.CaptureError, match=message):
        quantize(build(), [ROWS])


def test_static_and_other_dynamic_dimensions_on_request(tmp_path: Path) -> None:
    torch.manual_seed(0)
    qmodel = quantize(FixedBatch().eval(), [ROWS], dynamic_shapes="static")
    path = qdq.export_onnx(qmodel, tmp_path / "static.onnx")
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4
    with pytest.raises(qdq.DataError, match=r"input 'x' has shape \[2, 8\], the model was captured for \[4, 8\]"):
        qdq.verify(qmodel, path, [ROWS[:2]], progress=False)

    any_size = torch.export.Dim.DYNAMIC
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    sizes = ({0: any_size, 2: any_size, 3: any_size},)
    qmodel = quantize(model, [IMAGE], dynamic_shapes=sizes)
    path = qdq.export_onnx(qmodel, tmp_path / "dynamic.onnx")
    assert qdq.verify(qmodel, path, [IMAGE, randn(1, 4, 12, 20)], progress=False).sqnr_db > 40
    with pytest.raises(
        qdq.DataError, match="dynamic_shapes must be None, 'static' or what torch.export takes, not 'all'"
    ):
        quantize(model, [IMAGE], dynamic_shapes="all")
