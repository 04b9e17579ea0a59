"""Module-quantized models on their way to ONNX: `qdq.export_onnx` and `qdq.verify`."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import qdq
from fixtures.zoo import ZOO
from pipeline.helpers import initializers, operations, optimized_graph, randn, run_file, sqnr_db
from qdq import QuantDescriptor, TensorQuantizer
from qdq.analysis.fidelity import Fidelity
from qdq.functional import fake_tensor_quant
from qdq.graph.targets import ONNXRUNTIME
from qdq.nn import QuantAdd, QuantConv2d, QuantLinear

# Codes of 7 bits cannot saturate in pairs, on any processor: files then equal their models everywhere.
SEVEN = QuantDescriptor(num_bits=7, axis=0)
IMAGE = randn(4, 3, 8, 8, seed=1)
# Neither this machine's processor nor its kernels decide what is written.
EXACT = dataclasses.replace(ONNXRUNTIME, reduce_range=False)


def quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TensorQuantizer)}


def calibrated(model: nn.Module, *batches: Any) -> nn.Module:
    """The model with amax of these batches, in eval mode."""
    found = quantizers(model).values()
    for quantizer in found:
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        for batch in batches:
            model.eval()(*batch) if isinstance(batch, tuple) else model.eval()(batch)
    for quantizer in found:
        quantizer.disable_calib()
        quantizer.enable_quant()
        quantizer.load_calib_amax()
    return model


def deploy(model: nn.Module, batch: Any, path: Path, **options: Any) -> Fidelity:
    qdq.export_onnx(model, path, example_inputs=batch, **options)
    return qdq.verify(model, path, [batch], progress=False)


def written(path: Path, kind: str) -> list[onnx.NodeProto]:
    return [n for n in onnx.load(path).graph.node if n.op_type == kind]


def codes_of(path: Path, shape: tuple[int, ...], dtype: Any = np.int8) -> tuple[np.ndarray, np.ndarray]:
    """Codes and step sizes of the one constant of a shape."""
    arrays = initializers(path)
    found = [
        (arrays[n.input[0]], arrays[n.input[1]])
        for n in written(path, "DequantizeLinear")
        if n.input[0] in arrays and arrays[n.input[0]].shape == shape and arrays[n.input[0]].dtype == dtype
    ]
    assert len(found) == 1
    return found[0]


class Block(nn.Module):
    """Two convolutions with batch norms around ReLU and max pool, a residual addition in float, a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = QuantConv2d(3, 8, 3, padding=1, bias=False, quant_desc_weight=SEVEN), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = QuantConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = QuantConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool, self.fc = nn.MaxPool2d(2), QuantLinear(8, 10)
        for norm in (self.bn1, self.bn2, self.bn3):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.weight.data[::3] *= -1  # channels change their sign
            norm.running_mean.normal_()  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn2(self.conv2(self.pool(torch.relu(self.bn1(self.conv1(x)))))))
        y = torch.relu(self.bn3(self.conv3(x)))
        return self.fc((x + y).mean((2, 3)))


@pytest.fixture(scope="module")
def block() -> nn.Module:
    return calibrated(Block(), IMAGE)


@pytest.fixture(scope="module")
def stored(block: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    return qdq.export_onnx(block, path, example_inputs=IMAGE, target=EXACT)


def test_a_cnn_runs_in_integer_convolutions_and_equals_its_model(block: nn.Module, stored: Path) -> None:
    other = randn(3, 3, 8, 8, seed=5)
    fidelity = qdq.verify(block, stored, [IMAGE, other], progress=False)
    assert fidelity.sqnr_db > 45 and fidelity.samples == 7
    assert {t.name for t in fidelity.tensors} == {f"{n}.input_quantizer" for n in ("conv1", "conv2", "conv3", "fc")}
    assert max(t.share for t in fidelity.tensors) < 0.01
    executed = operations(optimized_graph(stored))
    assert executed["QLinearConv"] == 1 and executed["QGemm"] == 1
    assert executed["BatchNormalization"] == 0 and operations(onnx.load(stored))["BatchNormalization"] == 0
    assert operations(onnx.load(stored))["Add"] == 1  # the residual addition, in float


def test_a_residual_network_runs_in_integers(tmp_path: Path) -> None:
    entry = ZOO["resnet_basic"]
    model, batch = qdq.nn.quantize_modules(entry.factory()), entry.make_inputs(2, 0)
    calibrated(model, batch)
    for name, quantizer in quantizers(model).items():
        if name.endswith("_weight_quantizer"):
            quantizer.num_bits = 7
    fidelity = deploy(model, batch, tmp_path / "m.onnx")
    assert fidelity.sqnr_db > 40
    executed = operations(optimized_graph(tmp_path / "m.onnx"))
    assert executed["QLinearConv"] == 2 and executed["BatchNormalization"] == 0


def test_signed_activations_are_uint8_with_a_zero_point_that_their_sign_decides(stored: Path) -> None:
    arrays = initializers(stored)
    zero: dict[str, int] = {}
    for node in onnx.load(stored).graph.node:
        names = [p.value for p in node.metadata_props if p.key == "qdq.quantizer"]
        if node.op_type == "DequantizeLinear" and node.input[0] not in arrays:
            zero[names[0]] = int(arrays[node.input[2]])
            assert arrays[node.input[2]].dtype == np.uint8
    assert zero == {
        "conv1.input_quantizer": 128,
        "conv2.input_quantizer": 0,  # behind a ReLU
        "conv3.input_quantizer": 0,
        "fc.input_quantizer": 0,
    }
    limits = {tuple(int(arrays[i]) for i in n.input[1:]) for n in written(stored, "Clip")}
    assert limits == {(0, 127)}  # codes of a signed quantizer go no further


def test_weights_are_the_codes_of_their_quantizers_and_norms_their_step_sizes(block: Any, stored: Path) -> None:
    codes, steps = codes_of(stored, (8, 3, 3, 3))
    amax = block.conv1.weight_quantizer.amax
    expected = qdq.functional.tensor_quant(block.conv1.weight, amax, 7, False, False)[0].detach()
    factor = (block.bn1.weight / (block.bn1.running_var + block.bn1.eps).sqrt()).detach()
    signs = factor.sign().reshape(-1, 1, 1, 1)
    assert (factor < 0).any() and (codes == (expected * signs).numpy()).all()
    np.testing.assert_allclose(steps, (amax.reshape(-1) / 63 * factor.abs()).numpy(), rtol=1e-6)


def test_biases_of_integer_layers_are_int32_of_input_step_times_weight_step(block: Any, stored: Path) -> None:
    arrays = initializers(stored)
    codes, step = codes_of(stored, (10,), np.int32)
    weight_step = codes_of(stored, (10, 8))[1]
    input_step = np.float32(block.fc.input_quantizer.amax / 127)
    np.testing.assert_allclose(step, input_step * weight_step, rtol=1e-6)
    np.testing.assert_array_equal(codes, np.round(block.fc.bias.detach().double().numpy() / step.astype(np.float64)))
    # The outputs of conv2 and conv3 are read by an addition in float: their biases stay float.
    constants = [arrays[n.input[0]] for n in written(stored, "DequantizeLinear") if n.input[0] in arrays]
    assert sorted(a.shape for a in constants if a.dtype == np.int32) == [(8,), (10,)]


def test_the_model_is_neither_changed_nor_left_in_another_mode(block: nn.Module, stored: Path, tmp_path: Path) -> None:
    model: Any = copy.deepcopy(block).train()
    before = copy.deepcopy(model.state_dict())
    qdq.export_onnx(model, tmp_path / "m.onnx", example_inputs=IMAGE, target=EXACT)
    fidelity = qdq.verify(model, tmp_path / "m.onnx", [IMAGE], progress=False)
    assert fidelity.sqnr_db > 45 and model.training and model.bn1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (tmp_path / "m.onnx").read_bytes() == stored.read_bytes()


def test_verify_takes_a_data_function_and_finds_a_file_of_other_weights(block: nn.Module, stored: Path) -> None:
    fidelity = qdq.verify(block, stored, lambda model: model(IMAGE), progress=False)
    assert fidelity.sqnr_db > 45
    other: Any = copy.deepcopy(block)
    with torch.no_grad():
        other.conv2.weight.neg_()
    fidelity = qdq.verify(other, stored, [IMAGE], progress=False)
    largest = {t.name: t.max_difference for t in fidelity.tensors}
    assert fidelity.sqnr_db < 20 and largest["conv2.input_quantizer"] <= 1 < 50 < largest["conv3.input_quantizer"]


# One layer each.


class Chain(nn.Sequential):
    """Modules in a row, with amax of normal values."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        calibrated(self, IMAGE)


def conv(inputs: int = 3, outputs: int = 4, activations: QuantDescriptor | None = None, **weights: Any) -> QuantConv2d:
    torch.manual_seed(inputs + outputs)
    descriptor = QuantDescriptor(**{"num_bits": 7, "axis": 0, **weights})
    return QuantConv2d(
        inputs, outputs, 3, quant_desc_input=activations or QuantDescriptor(), quant_desc_weight=descriptor
    )


def norm(channels: int, **values: float) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    for name, value in values.items():
        getattr(layer, name).data.fill_(value)
    return layer


FOUR = QuantDescriptor(num_bits=4)
NARROW = QuantDescriptor(narrow_range=True)
LEARNED = QuantDescriptor(learn_amax=True, amax=1.5)
ROWS: dict[str, tuple[nn.Module, ...]] = {
    "four_bits": (conv(3, 4, FOUR, num_bits=4), nn.ReLU(), conv(4, 4, FOUR, num_bits=4)),
    "two_bit_weights": (conv(num_bits=2), nn.ReLU(), conv(4, 4, num_bits=2)),
    "narrow": (conv(3, 4, NARROW, narrow_range=True), conv(4, 4, NARROW)),
    "unsigned_behind_relu6": (conv(), nn.ReLU6(), conv(4, 4, QuantDescriptor(unsigned=True))),
    "clip_above_zero_then_pad": (conv(), nn.Hardtanh(0.1, 0.4), nn.ZeroPad2d(1), conv(4, 4)),
    "relu_then_pad": (conv(), nn.ReLU(), nn.ZeroPad2d(1), conv(4, 4)),
    "per_tensor": (conv(axis=None), norm(4, weight=-0.7), nn.ReLU(), conv(4, 4, axis=None)),
    "dead_channels": (conv(), norm(4, weight=0.0, bias=0.5), nn.ReLU(), conv(4, 4)),
    "tiny_channels": (conv(), norm(4, weight=1e-8, bias=0.5), nn.ReLU(), conv(4, 4)),
    "learned": (conv(3, 4, LEARNED), nn.ReLU(), conv(4, 4, LEARNED)),
    "depthwise": (conv(), nn.ReLU(), QuantConv2d(4, 4, 3, groups=4, quant_desc_weight=SEVEN)),
    "pooled": (conv(), nn.ReLU(), nn.MaxPool2d(2), conv(4, 4)),
    "flat_linear": (conv(), nn.ReLU(), nn.Flatten(1), QuantLinear(144, 3, quant_desc_weight=SEVEN)),
}


class Rows(nn.Module):
    """All rows side by side: one export for them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleDict({name: nn.Sequential(*modules) for name, modules in ROWS.items()})
        torch.manual_seed(0)
        for row in ROWS.values():  # the runtime would merge equal layers
            row[0].reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: row(x) for name, row in self.rows.items()}


def test_layers_equal_their_model(tmp_path: Path) -> None:
    model = calibrated(Rows(), IMAGE)
    path = qdq.export_onnx(model, tmp_path / "m.onnx", example_inputs=IMAGE)
    expected = {name: value.detach().numpy() for name, value in model(IMAGE).items()}
    found = dict(zip(expected, run_file(path, [IMAGE]), strict=True))
    # A code that falls to the other side weighs more where there are few.
    least = {"four_bits": 25.0}
    values = {name: sqnr_db([expected[name]], [found[name]]) for name in expected}
    assert all(value > least.get(name, 40) for name, value in values.items()), values
    executed = operations(optimized_graph(path))
    # Each first convolution, but for the one whose clip the padding's zeros lie outside of.
    assert executed["QLinearConv"] == len(ROWS) - 1
    assert executed["BatchNormalization"] == executed["Relu"] == 0


def test_a_code_that_has_no_negative_is_clamped(tmp_path: Path) -> None:
    model = Chain(conv(num_bits=8), norm(4, weight=-1.0))
    model[0].weight_quantizer.amax = (model[0].weight_quantizer.amax / 2).numpy()  # type: ignore[union-attr,operator]
    qdq.export_onnx(model, tmp_path / "m.onnx", example_inputs=IMAGE, target=EXACT)
    codes, _ = codes_of(tmp_path / "m.onnx", (4, 3, 3, 3))
    assert codes.max() == 127 and codes.min() == -127


class Shared(nn.Module):
    """One layer twice, a quantized constant, a weight that is cut in two, a direct call, an embedding."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.wide = QuantLinear(4, 4, quant_desc_weight=SEVEN), nn.Parameter(torch.randn(6, 4))
        self.wide_quantizer = TensorQuantizer(QuantDescriptor(num_bits=7, axis=0))
        self.table_quantizer = TensorQuantizer(QuantDescriptor(axis=0))
        self.words = qdq.nn.QuantEmbedding(7, 4)
        self.register_buffer("table", torch.randn(3, 4))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = self.layer(torch.relu(self.layer(x + self.words(ids))))
        first, second = self.wide_quantizer(torch.cat([self.wide, self.wide * 2], 1)).split(4, 1)
        x = fake_tensor_quant(x, 1.5, 8, False, False)
        return (x @ first.t() + nn.functional.linear(x, second)) @ self.table_quantizer(self.table).sum(0).repeat(6, 1)


def test_shared_cut_and_looked_up_weights_are_stored_as_codes(tmp_path: Path) -> None:
    batch = (randn(5, 4), torch.tensor([0, 6, 2, 3, 1]))
    model = calibrated(Shared(), batch)
    path = tmp_path / "m.onnx"
    fidelity = deploy(model, batch, path)
    assert fidelity.sqnr_db > 45, fidelity
    arrays = initializers(path)
    floats = {a.shape for a in arrays.values() if a.dtype == np.float32 and a.ndim == 2 and a.size > 7}
    assert floats == set()
    codes = [a.shape for a in arrays.values() if a.dtype == np.int8 and a.ndim == 2]
    assert sorted(codes) == [(3, 4), (4, 4), (4, 4), (4, 6), (6, 4), (7, 4)]
    table = next(name for name, a in arrays.items() if a.shape == (7, 4))
    assert [n.op_type for n in onnx.load(path).graph.node if table in n.input] == ["Gather"]


def test_an_lstm_is_unrolled_with_one_weight_and_one_range(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.LSTM(3, 5, batch_first=True)
    model = calibrated(qdq.nn.quantize_modules(nn.ModuleList([model]))[0], randn(2, 2, 3))
    quantizers(model)["_weight_quantizers.0"].num_bits = 7
    fidelity = deploy(model, randn(2, 2, 3), tmp_path / "m.onnx")
    assert fidelity.sqnr_db > 40, fidelity
    assert codes_of(tmp_path / "m.onnx", (20, 8))[0].any()


def test_disabled_quantizers_leave_nothing_and_a_float_weight_stays_float(tmp_path: Path) -> None:
    model = Chain(conv(), conv(4, 4), conv(4, 2))
    path = tmp_path / "m.onnx"
    model[1].weight_quantizer.disable()  # type: ignore[union-attr,operator]
    fidelity = deploy(model, IMAGE, path)
    # ONNX Runtime would quantize the middle weight itself, since both its input and its output are quantized.
    assert fidelity.sqnr_db > 40, fidelity
    assert operations(optimized_graph(path))["QLinearConv"] == 1
    for quantizer in quantizers(model).values():
        quantizer.disable()
    qdq.export_onnx(model, path, example_inputs=IMAGE)
    assert set(operations(onnx.load(path))) == {"Conv"}
    metadata = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert metadata == {"producer": "qdq"}
    assert sqnr_db([model(IMAGE).detach().numpy()], run_file(path, [IMAGE])) > 100


def test_equal_quantizers_of_one_tensor_are_one(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.add = conv(), conv(axis=None), QuantAdd()

        def forward(self, x: Tensor) -> Tensor:
            return self.add(self.one(x), self.two(x))

    model = calibrated(Branches(), IMAGE)
    assert deploy(model, IMAGE, tmp_path / "m.onnx").sqnr_db > 45
    assert operations(onnx.load(tmp_path / "m.onnx"))["QuantizeLinear"] == 3


# Targets.


def test_tensorrt_gets_int8_with_zero_point_0_and_float_biases(tmp_path: Path) -> None:
    model = Chain(conv(), norm(4), nn.ReLU(), conv(4, 4))
    path = tmp_path / "m.onnx"
    fidelity = deploy(model, IMAGE, path, target="tensorrt")
    assert fidelity.sqnr_db > 100 and fidelity.runtime == "onnxruntime"
    arrays = initializers(path)
    assert {arrays[n.input[2]].dtype for n in written(path, "QuantizeLinear")} == {np.dtype(np.int8)}
    assert not any(arrays[n.input[2]].any() for n in written(path, "DequantizeLinear"))
    found = operations(onnx.load(path))
    assert (found["Clip"], found["Relu"], found["BatchNormalization"]) == (0, 1, 0)
    assert not any(a.dtype == np.int32 for a in arrays.values())


def test_tensorrt_gets_e4m3_as_onnx_has_it(tmp_path: Path) -> None:
    e4m3 = QuantDescriptor((4, 3))
    layers = [QuantConv2d(i, 4, 3, quant_desc_input=e4m3, quant_desc_weight=e4m3) for i in (3, 4)]
    model = Chain(layers[0], norm(4, weight=-1.0), nn.ReLU(), layers[1])
    fidelity = deploy(model, IMAGE, tmp_path / "m.onnx", target="tensorrt")
    assert fidelity.sqnr_db > 100
    kinds = {t.name: t.data_type for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert sum(kind == onnx.TensorProto.FLOAT8E4M3FN for kind in kinds.values()) >= 3


BAD: list[tuple[QuantDescriptor, QuantDescriptor, str, str]] = [
    (QuantDescriptor(16), SEVEN, "onnxruntime", "'0._input_quantizer' has 16 bits: activations are exported with 2"),
    (QuantDescriptor((4, 3)), SEVEN, "onnxruntime", "'0._input_quantizer' is E4M3, which onnxruntime does not"),
    (QuantDescriptor(axis=1), SEVEN, "onnxruntime", "'0._input_quantizer' has one amax per channel, and runtimes"),
    (QuantDescriptor(), QuantDescriptor(9), "onnxruntime", "'0._weight_quantizer' has 9 bits: weights are stored"),
    (QuantDescriptor(), QuantDescriptor(axis=(0, 1)), "onnxruntime", r"'0._weight_quantizer' has an amax of shape"),
    (QuantDescriptor(), QuantDescriptor(axis=1), "onnxruntime", r"'0._weight_quantizer' .* along axis 1 .*set axis=0"),
    (QuantDescriptor(4), SEVEN, "tensorrt", "'0._input_quantizer' has 4 bits, and tensorrt takes activations of 8"),
    (QuantDescriptor(narrow_range=True), SEVEN, "openvino", "'0._input_quantizer' has a narrow range, and openvino"),
    (QuantDescriptor(unsigned=True), SEVEN, "tensorrt", "'0._input_quantizer' is unsigned, and tensorrt takes signed"),
    (QuantDescriptor(), QuantDescriptor(unsigned=True), "tensorrt", "'0._weight_quantizer' is unsigned, and tensorrt"),
    (QuantDescriptor(), QuantDescriptor((4, 3), axis=0), "tensorrt", "'0._weight_quantizer' is E4M3 with one amax per"),
]


@pytest.mark.parametrize(("activations", "weights", "target", "message"), BAD, ids=[row[3][:40] for row in BAD])
def test_what_a_target_has_no_codes_for_is_refused_by_name(
    activations: QuantDescriptor, weights: QuantDescriptor, target: str, message: str, tmp_path: Path
) -> None:
    layer = QuantConv2d(3, 4, 3, quant_desc_input=activations, quant_desc_weight=weights)
    nn.init.uniform_(layer.weight, 0, 1)
    with pytest.raises(qdq.ExportError, match=message):
        qdq.export_onnx(Chain(layer), tmp_path / "m.onnx", example_inputs=IMAGE.abs(), target=target)
    assert not list(tmp_path.iterdir())


def test_quantizers_without_a_range_are_named_all(tmp_path: Path) -> None:
    model = nn.Sequential(conv(), conv(4, 4))
    with pytest.raises(qdq.CalibrationError) as caught:
        qdq.export_onnx(model, tmp_path / "m.onnx", example_inputs=IMAGE)
    # That of a weight is as constant as the weight.
    assert "quantizers without amax: 0._input_quantizer, 1._input_quantizer. Calibrate" in str(caught.value)
    calibrated(model, IMAGE)
    model[1].input_quantizer.amax.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(qdq.CalibrationError, match=r"with NaN or infinity as amax: 1._input_quantizer\. Calibrate"):
        qdq.export_onnx(model, tmp_path / "m.onnx", example_inputs=IMAGE)
    for quantizer in (model[0].input_quantizer, model[1].weight_quantizer):  # type: ignore[union-attr]
        quantizer.enable_calib()  # type: ignore[union-attr,operator]
    with pytest.raises(qdq.CalibrationError, match="2 quantizers still collect .*: 0._input_quantizer, 1._weight_q"):
        qdq.export_onnx(model, tmp_path / "m.onnx", example_inputs=IMAGE)


def test_what_the_call_lacks_or_has_too_much_is_said(block: nn.Module, stored: Path, tmp_path: Path) -> None:
    with pytest.raises(qdq.QdqError, match="to write it as Q/DQ ONNX, pass example_inputs"):
        qdq.export_onnx(block, tmp_path / "m.onnx")
    with pytest.raises(qdq.RecipeError, match="unknown target 'tpu'"):
        qdq.export_onnx(block, tmp_path / "m.onnx", example_inputs=IMAGE, target="tpu")
    graph = qdq.quantize(nn.Linear(6, 4).eval(), [randn(8, 6)], progress=False)
    with pytest.raises(qdq.QdqError, match="quantized for 'onnxruntime', not for 'tensorrt'"):
        qdq.export_onnx(graph, tmp_path / "m.onnx", target="tensorrt")
    qdq.export_onnx(graph, tmp_path / "m.onnx", target="onnxruntime")
    with pytest.raises(qdq.ExportError, match="there is no file"):
        qdq.verify(block, tmp_path / "missing.onnx", [IMAGE], progress=False)
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(qdq.ExportError, match="is not an ONNX file"):
        qdq.verify(block, tmp_path / "text.onnx", [IMAGE], progress=False)


def test_weights_that_would_saturate_are_changed_where_the_processor_asks_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Chain(conv(num_bits=8), conv(4, 4, num_bits=8))
    path = tmp_path / "m.onnx"
    for reduce, changed in ((False, False), (True, True)):
        caplog.clear()
        target = dataclasses.replace(ONNXRUNTIME, reduce_range=reduce)
        qdq.export_onnx(model, path, example_inputs=IMAGE, target=target)
        codes, _ = codes_of(path, (4, 3, 3, 3))
        assert ("0.weight_quantizer: this processor adds products of 8 bits in 16" in caplog.text) is changed
        walked = codes.astype(int).transpose(0, 2, 3, 1).reshape(4, -1)
        pairs = np.abs(walked[:, 0:26:2] + walked[:, 1:27:2])
        assert bool(pairs.max() <= 128) is changed
    # The second convolution is computed in float: its output is not quantized.
    assert np.abs(codes_of(path, (4, 4, 3, 3))[0]).max() == 127


def test_static_shapes_and_dynamic_ones_are_passed_on(tmp_path: Path) -> None:
    model = Chain(conv())
    path = qdq.export_onnx(model, tmp_path / "m.onnx", example_inputs=IMAGE, dynamic_shapes="static")
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4
    assert qdq.verify(model, path, [IMAGE], progress=False, dynamic_shapes="static").samples == 4
