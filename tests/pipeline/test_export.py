"""What the exported file holds, and that nothing but a whole file is ever left behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import qdq
from pipeline.helpers import Deployed, deploy, initializers, quantize, randn, run_file, run_model, sqnr_db
from qdq.affine_quantizer import AffineQuantizer
from qdq.export import onnx as onnx_export

IMAGE = randn(4, 3, 8, 8, seed=1)


class Small(nn.Module):
    """A convolution, a linear on rows and one on sequences, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.rows, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 12), nn.Linear(6, 5)
        self.words = nn.Embedding(11, 12)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = self.rows(torch.relu(self.conv(x)).mean((2, 3)))
        return self.last((y + self.words(ids)).reshape(-1, 2, 6))


BATCH = (IMAGE, torch.tensor([1, 10, 0, 3]))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return deploy(Small().eval(), [BATCH], tmp_path_factory.mktemp("export") / "small.onnx")


@pytest.fixture(scope="module")
def stored(deployed: Deployed) -> onnx.ModelProto:
    return onnx.load(deployed.path)


def nodes(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == kind]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def test_opset_names_metadata_and_a_dynamic_batch(stored: onnx.ModelProto, deployed: Deployed) -> None:
    assert {o.domain: o.version for o in stored.opset_import}[""] == 21
    assert [i.name for i in stored.graph.input] == ["x", "ids"]
    assert [o.name for o in stored.graph.output] == ["output"]
    assert {p.key: p.value for p in stored.metadata_props} == {"producer": "qdq", "qdq.target": "onnxruntime"}
    for value in [*stored.graph.input, *stored.graph.output]:
        first = value.type.tensor_type.shape.dim[0]
        assert first.dim_param and not first.dim_value
    onnx.checker.check_model(str(deployed.path), full_check=True)
    assert deployed.fidelity.sqnr_db > 55


def test_weights_are_int8_initializers_behind_dequantize_linear(stored: onnx.ModelProto, deployed: Deployed) -> None:
    arrays = initializers(deployed.path)
    model = deployed.qmodel
    found = {}
    for node in nodes(stored, "DequantizeLinear"):
        if node.input[0] in arrays and arrays[node.input[0]].dtype == np.int8:
            codes, step, zero = (arrays[i] for i in node.input[:3])
            assert not zero.any() and zero.dtype == np.int8 and step.dtype == np.float32
            found[codes.shape] = (codes, step, attributes(node))
    conv = model.conv.weight_quantizer
    codes, step, given = found[(8, 3, 3, 3)]
    assert given["axis"] == 0 and (step == conv.step_size.numpy()).all()
    assert (codes == conv.codes(model.conv.weight).numpy()).all()
    # A linear on more than two dimensions is a MatMul: its weight is stored as [in, out], channels last.
    codes, step, given = found[(6, 5)]
    assert given["axis"] == 1
    assert (codes == model.last.weight_quantizer.codes(model.last.weight).numpy().T).all()
    assert all(codes.min() >= -127 and codes.any() for codes, _, _ in found.values())


def test_an_embedding_is_gathered_as_codes(stored: onnx.ModelProto, deployed: Deployed) -> None:
    arrays = initializers(deployed.path)
    table = next(name for name, a in arrays.items() if a.shape == (11, 12))
    assert arrays[table].dtype == np.int8
    assert [n.op_type for n in stored.graph.node if table in n.input] == ["Gather"]


def test_biases_of_integer_operations_are_int32(stored: onnx.ModelProto, deployed: Deployed) -> None:
    arrays, model = initializers(deployed.path), deployed.qmodel
    biases = {
        len(arrays[n.input[0]]): (arrays[n.input[0]], arrays[n.input[1]], arrays[n.input[2]])
        for n in nodes(stored, "DequantizeLinear")
        if n.input[0] in arrays and arrays[n.input[0]].dtype == np.int32
    }
    assert set(biases) == {8, 12}  # the conv's and the 2-d linear's; a MatMul's bias is added in float
    codes, step, zero = biases[8]
    assert not zero.any()
    input_step = float(model.x_quantizer.step_size)
    expected = input_step * model.conv.weight_quantizer.step_size.double().numpy()
    assert np.allclose(step, expected, rtol=1e-7)
    assert (codes == np.round(model.conv.bias.detach().double().numpy() / expected)).all()


def test_no_float_copy_of_a_quantized_weight_is_left(deployed: Deployed) -> None:
    floats = {a.shape for a in initializers(deployed.path).values() if a.dtype == np.float32 and a.size > 12}
    assert floats == set()


def test_quantizers_keep_their_names_and_ranges(stored: onnx.ModelProto, deployed: Deployed) -> None:
    arrays = initializers(deployed.path)
    modules = {n: m for n, m in deployed.qmodel.named_modules() if isinstance(m, AffineQuantizer)}
    named = {p.value: n for n in nodes(stored, "QuantizeLinear") for p in n.metadata_props if p.key == "qdq.quantizer"}
    assert set(named) == set(modules)
    for name, node in named.items():
        assert arrays[node.input[1]] == modules[name].step_size.numpy()
        assert arrays[node.input[2]] == modules[name].zero_point.numpy()
        assert arrays[node.input[2]].dtype == np.uint8


def test_the_file_holds_no_trace_of_the_machine(deployed: Deployed) -> None:
    content = deployed.path.read_bytes()
    for trace in (str(Path(__file__).parent), str(Path(torch.__file__).parent), "site-packages"):
        assert trace.encode() not in content, trace


def test_exporting_changes_neither_model_nor_a_second_file(deployed: Deployed, tmp_path: Path) -> None:
    before = {n: v.clone() for n, v in deployed.qmodel.state_dict().items()}
    again = qdq.export_onnx(deployed.qmodel, tmp_path / "again.onnx")
    assert all(torch.equal(v, before[n]) for n, v in deployed.qmodel.state_dict().items())
    assert list(deployed.qmodel.state_dict()) == list(before)
    assert again.read_bytes() == deployed.path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.onnx"]


# Paths and interrupts.


@pytest.fixture(scope="module")
def linear() -> Any:
    torch.manual_seed(0)
    return quantize(nn.Linear(6, 4).eval(), [randn(8, 6)])


def test_paths_that_cannot_be_written_are_refused_before_the_work(linear: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(qdq.ExportError, match="cannot write .*: it is a folder; give the path of a file"):
        qdq.export_onnx(linear, tmp_path / "folder")
    with pytest.raises(qdq.ExportError, match="the folder .*missing' does not exist"):
        qdq.export_onnx(linear, tmp_path / "missing" / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the super-user may write everywhere")
def test_a_folder_without_permission_is_refused(linear: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(qdq.ExportError, match="permission denied"):
            qdq.export_onnx(linear, tmp_path / "m.onnx")
    finally:
        tmp_path.chmod(0o700)


def test_permissions_are_asked_of_the_system(linear: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same refusal where tests run as the super-user, who is never denied."""

    def refuse(dir: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "m.onnx"
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", refuse)
        with pytest.raises(qdq.ExportError, match="m.onnx': permission denied"):
            qdq.export_onnx(linear, path)
    path.write_bytes(b"kept")
    monkeypatch.setattr("os.access", lambda asked, mode: Path(asked) != path)
    with pytest.raises(qdq.ExportError, match="m.onnx': permission denied"):
        qdq.export_onnx(linear, path)
    assert path.read_bytes() == b"kept"


FAILURES = [
    (KeyboardInterrupt(), KeyboardInterrupt, None),
    (OSError(28, "No space left on device"), qdq.ExportError, "cannot write .*m.onnx': No space left on device"),
    (onnx.checker.ValidationError("bad node"), qdq.ExportError, "the exported model is not valid ONNX: bad node"),
    (RuntimeError("surprise"), RuntimeError, "surprise"),
]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(("failure", "error", "message"), FAILURES, ids=lambda v: type(v).__name__)
def test_a_failure_halfway_leaves_no_broken_file(
    linear: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, error: Any, message: str |
        None,
    exists: bool,
) -> None:  # fmt: skip
    """The draft is written and checked beside its place: the check is where this test interrupts."""
    path = tmp_path / "m.onnx"
    if exists:
        path.write_bytes(b"an older file")
    drafts: list[list[Path]] = []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        drafts.append([p for p in tmp_path.rglob("m.onnx") if p != path])
        raise failure

    monkeypatch.setattr(onnx.checker, "check_model", interrupted)
    with pytest.raises(error, match=message):
        qdq.export_onnx(linear, path)
    assert len(drafts[0]) == 1  # there was something to clean up
    assert [p.name for p in tmp_path.iterdir()] == (["m.onnx"] if exists else [])
    if exists:
        assert path.read_bytes() == b"an older file"


def test_an_existing_file_is_replaced(linear: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"an older file")
    assert qdq.export_onnx(linear, str(path)) == path
    onnx.checker.check_model(str(path))


def test_an_uncalibrated_quantizer_at_export_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    qmodel = quantize(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), [randn(8, 6)])
    fresh = qmodel.get_submodule("1.output_quantizer")
    assert isinstance(fresh, AffineQuantizer)
    fresh.calibrated = False
    with pytest.raises(qdq.CalibrationError, match="cannot export: 1 quantizers have no range: 1.output_quantizer"):
        qdq.export_onnx(qmodel, tmp_path / "m.onnx")
    with pytest.raises(qdq.CalibrationError, match="quantizer '1.output_quantizer' has no range: it saw no data"):
        qmodel(randn(2, 6))
    assert list(tmp_path.iterdir()) == []


def test_a_float_model_is_exported_with_example_inputs(tmp_path: Path) -> None:
    model = Small().train()
    path = qdq.export_onnx(model, tmp_path / "float.onnx", example_inputs=BATCH)
    assert model.training
    stored = onnx.load(path)
    assert not nodes(stored, "QuantizeLinear") and not nodes(stored, "DequantizeLinear")
    assert {p.key: p.value for p in stored.metadata_props} == {"producer": "qdq"}
    smaller = (IMAGE[:1], BATCH[1][:1])
    assert sqnr_db(run_model(model.eval(), smaller), run_file(path, smaller)) > 100
    with pytest.raises(
        qdq.QdqError, match="a Small that qdq.quantize did not make: to write it as float ONNX, pass ex"
    ):
        qdq.export_onnx(model, tmp_path / "float.onnx")
    with pytest.raises(qdq.QdqError, match="model must be a torch.nn.Module, not str"):
        qdq.export_onnx("model", tmp_path / "float.onnx")  # type: ignore[arg-type]


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_an_operation_that_onnx_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(qdq.ExportError, match="PyTorch's ONNX exporter failed: .*bessel_j0"):
        qdq.export_onnx(Unknown(), tmp_path / "m.onnx", example_inputs=randn(2, 3))
    assert list(tmp_path.iterdir()) == []


class Named(nn.Module):
    """Outputs of every kind of container, one of them named as an input is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.fc(x)
        return {"x": y, "scores": {"first": y.softmax(-1), "pair": (y.relu(), y.tanh())}}


def test_outputs_bear_the_names_of_their_containers(tmp_path: Path) -> None:
    deployed = deploy(Named().eval(), [randn(4, 6)], tmp_path / "m.onnx")
    names = [o.name for o in onnx.load(deployed.path).graph.output]
    assert names == ["x_out", "scores_first", "scores_pair_0", "scores_pair_1"]
    assert deployed.fidelity.sqnr_db > 60


# Files of more than 2 GiB, made small.


@pytest.fixture
def _tiny_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "EXTERNAL_DATA_ABOVE", 1000)


@pytest.mark.usefixtures("_tiny_limit")
def test_large_models_store_their_tensors_beside_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = randn(4, 64)
    qmodel = quantize(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval(), [x])
    path = qdq.export_onnx(qmodel, tmp_path / "large.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    data = tmp_path / "large.onnx.data"
    assert data.stat().st_size >= 2 * 64 * 128
    assert path.stat().st_size < data.stat().st_size
    fidelity = qdq.verify(qmodel, path, [x], progress=False)
    assert fidelity.sqnr_db > 55 and fidelity.samples == 4
    assert qdq.benchmark(path, rounds=1, progress=False).median_ms > 0
    # The pair may be moved to another folder together.
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    path.rename(moved / path.name)
    data.rename(moved / data.name)
    assert qdq.verify(qmodel, moved / path.name, [x], progress=False).sqnr_db == fidelity.sqnr_db
    # Replaced by a small one, the file needs its data no more, and an old pair is overwritten whole.
    again = qdq.export_onnx(qmodel, moved / path.name)
    assert qdq.verify(qmodel, again, [x], progress=False).sqnr_db == fidelity.sqnr_db
