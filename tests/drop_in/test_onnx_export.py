"""`enable_onnx_export` and `torch.onnx.export` as code in the field writes them, with both exporters."""

from __future__ import annotations

import copy
import io
from collections import Counter
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import pytorch_quantization
from pytorch_quantization import nn as quant_nn
from pytorch_quantization import quant_modules
from pytorch_quantization.tensor_quant import QuantDescriptor, fake_tensor_quant, scaled_e4m3, tensor_quant

# What PyTorch says of its own exporters. Everything else is an error, TracerWarning among it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Saving ONNX model to a BytesIO object is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Exporting to ONNX opset version 21 is not supported"),
]
EXPORTERS = pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])


def export(module: nn.Module, *inputs: Tensor, dynamo: bool, **options: Any) -> onnx.ModelProto:
    """The model in a file in memory, exported inside `enable_onnx_export`."""
    target = cast(Any, io.BytesIO())  # PyTorch's signature does not name it
    with pytorch_quantization.enable_onnx_export():
        torch.onnx.export(module.eval(), inputs, target, dynamo=dynamo, verbose=False, **options)
    return onnx.load_from_string(target.getvalue())


def kinds(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def constants(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    found = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def run(proto: onnx.ModelProto, *inputs: Tensor) -> list[np.ndarray]:
    """What the file's nodes compute, each by itself."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [np.asarray(value) for value in session.run(None, feed)]


class Network(nn.Module):
    """A quantized convolution and linear, unsigned in the middle, and a direct call with an amax of the model."""

    bound: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = quant_nn.QuantConv2d(3, 4, 3)
        self.fc = quant_nn.QuantLinear(4, 5, quant_desc_input=QuantDescriptor(unsigned=True))
        self.register_buffer("bound", torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(self.conv(x).relu().amax((2, 3)))
        return fake_tensor_quant(fake_tensor_quant(y, 1.5, 8, False, False), self.bound, 8, False, False)


def calibrated(module: nn.Module, *inputs: Tensor) -> nn.Module:
    quantizers = [m for m in module.modules() if isinstance(m, quant_nn.TensorQuantizer)]
    for quantizer in quantizers:
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        module(*inputs)
    for quantizer in quantizers:
        quantizer.load_calib_amax()
        quantizer.disable_calib()
        quantizer.enable_quant()
    return module.eval()


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return calibrated(Network(), X)


@pytest.mark.parametrize(
    ("dynamo", "asked", "written"),
    [(False, 13, 13), (False, 17, 17), (False, 21, 21), (True, 18, 18), (True, 21, 21)],
)
def test_a_network_exports_as_qdq_around_its_layers(
    network: nn.Module, dynamo: bool, asked: int, written: int
) -> None:  # fmt: skip
    proto = export(network, X, dynamo=dynamo, opset_version=asked)
    assert {o.domain: o.version for o in proto.opset_import}[""] == written
    found = kinds(proto)
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 6
    assert set(found) <= {"QuantizeLinear", "DequantizeLinear", "Conv", "Relu", "ReduceMax", "Gemm", "Constant"}
    np.testing.assert_allclose(run(proto, X)[0], network(X).detach().numpy(), atol=1e-6)


@EXPORTERS
def test_scales_and_zero_points_are_constants(network: nn.Module, dynamo: bool) -> None:
    proto = export(network, X, dynamo=dynamo)
    values = constants(proto)
    quantizers = [n for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    steps = [values[n.input[1]] for n in quantizers]
    zeros = [values[n.input[2]] for n in quantizers]
    axes = [[a.i for a in n.attribute if a.name == "axis"] for n in quantizers]
    found = [(n, m) for n, m in network.named_modules() if isinstance(m, quant_nn.TensorQuantizer)]
    amax = {name: cast(Tensor, m.amax).numpy() for name, m in found}
    per_tensor = [np.float32(amax["conv._input_quantizer"]) / np.float32(127), np.float32(1.5) / np.float32(127)]
    assert sum(s.shape == () and s in per_tensor for s in steps) == 2
    assert any(np.array_equal(s, amax["conv._weight_quantizer"].reshape(-1) / np.float32(127)) for s in steps)
    (unsigned,) = (i for i, z in enumerate(zeros) if z.dtype == np.uint8)
    assert steps[unsigned] == np.float32(amax["fc._input_quantizer"]) / np.float32(255)
    assert all(not z.any() and z.shape == s.shape for z, s in zip(zeros, steps, strict=True))
    # The axis is given where there are channels only.
    assert [axis for axis, s in zip(axes, steps, strict=True) if s.ndim] == [[0], [0]]


@EXPORTERS
def test_a_zero_amax_gets_scale_one(dynamo: bool) -> None:
    module = quant_nn.TensorQuantizer(QuantDescriptor(axis=0, amax=[[0.0], [2.54]]))
    proto = export(module, torch.rand(2, 3), dynamo=dynamo)
    steps = [v for v in constants(proto).values() if v.dtype == np.float32]
    np.testing.assert_array_equal(steps[0], np.array([1.0, 2.54], np.float32) / np.array([1, 127], np.float32))


@EXPORTERS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_cast_to_float_and_back(network: nn.Module, dynamo: bool, dtype: torch.dtype) -> None:
    module = nn.Sequential(quant_nn.TensorQuantizer(QuantDescriptor(amax=1.0)))
    proto = export(module, torch.rand(3, 4).to(dtype), dynamo=dynamo)
    assert [n.op_type for n in proto.graph.node if n.op_type != "Constant"] == [
        "Cast",
        "QuantizeLinear",
        "DequantizeLinear",
        "Cast",
    ]
    if dtype == torch.float16:
        half = copy.deepcopy(network).half()
        np.testing.assert_array_equal(
            run(export(half, X.half(), dynamo=dynamo), X.half())[0], half(X.half()).detach().numpy()
        )


@EXPORTERS
def test_e4m3_becomes_tensorrts_nodes_with_one_scalar_scale(dynamo: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = quant_nn.TensorQuantizer(QuantDescriptor((4, 3), amax=4.48))

        def forward(self, x: Tensor) -> Tensor:
            return self.quantizer(x) + scaled_e4m3(x)

    target = cast(Any, io.BytesIO())  # PyTorch's signature does not name it
    options: dict[str, Any] = {"dynamo": dynamo, "verbose": False}
    with pytorch_quantization.enable_onnx_export():
        torch.onnx.export(Both().eval(), (torch.rand(3, 4),), target, **options)
    proto = onnx.load_from_string(target.getvalue())
    found = [(n.domain, n.op_type) for n in proto.graph.node if n.op_type.startswith("TRT")]
    assert found == [("trt", "TRT_FP8QuantizeLinear"), ("trt", "TRT_FP8DequantizeLinear")] * 2
    values = constants(proto)
    scales = [values[n.input[1]] for n in proto.graph.node if n.op_type == "TRT_FP8QuantizeLinear"]
    assert [s.shape for s in scales] == [(), ()]
    assert sorted(map(float, scales)) == [pytest.approx(0.01), 1.0]


@EXPORTERS
def test_tensor_quant_exports_codes_and_scale(dynamo: bool) -> None:
    class Codes(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return tensor_quant(x, 2.0, 8, False, False)

    x = torch.tensor([[-3.0, 0.1, 0.7, 2.5]])
    codes, scale = run(export(Codes(), x, dynamo=dynamo), x)
    assert codes.tolist() == [[-128.0, 6.0, 44.0, 127.0]]
    assert scale == np.float32(63.5)


@EXPORTERS
def test_an_amax_that_the_model_computes_stays_computed(dynamo: bool) -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fake_tensor_quant(x, x.abs().max(), 8, False, False)

    proto = export(Dynamic(), torch.rand(2, 3), dynamo=dynamo)
    x = torch.tensor([[0.0, 5.0, -12.7], [0.1, 0.14, 3.0]])
    np.testing.assert_allclose(run(proto, x)[0], [[0.0, 5.0, -12.7], [0.1, 0.1, 3.0]], atol=1e-6)


# Readiness and refusals.


REFUSED: list[tuple[QuantDescriptor, str]] = [
    (QuantDescriptor(num_bits=4, amax=1.0), "only 8 bits can be exported to ONNX, got num_bits=4"),
    (QuantDescriptor(narrow_range=True, amax=1.0), "a signed narrow range cannot be exported to ONNX"),
    (QuantDescriptor(axis=(0, 1), amax=[[1.0] * 4] * 3), r"amax of shape \(3, 4\) spans several axes"),
    (QuantDescriptor((4, 3), axis=0, amax=[[1.0]] * 3), "E4M3 can only be exported to ONNX with one amax per tensor"),
    (QuantDescriptor(), "a quantizer without amax cannot be exported to ONNX: calibrate it first"),
    (QuantDescriptor(learn_amax=True, amax=1.0), "with learn_amax cannot be exported to ONNX: its range is learned"),
]


# The new exporter tries two captures before it fails, so it is asked twice only.
@pytest.mark.parametrize(
    ("descriptor", "message", "dynamo"),
    [(*row, False) for row in REFUSED] + [(*row, True) for row in (REFUSED[0], REFUSED[5])],
)
def test_what_has_no_form_is_refused_by_name(descriptor: QuantDescriptor, message: str, dynamo: bool) -> None:
    module = nn.Sequential(nn.ReLU(), quant_nn.TensorQuantizer(descriptor))
    with pytest.raises(AssertionError, match=f"{message}.*: 1$"):
        export(module, torch.rand(3, 4), dynamo=dynamo)
    assert not quant_nn.TensorQuantizer._enable_onnx_export


@pytest.mark.parametrize(
    ("descriptor", "dynamo"),
    [
        (QuantDescriptor(), False),
        (QuantDescriptor(), True),
        (QuantDescriptor(learn_amax=True), False),
        (QuantDescriptor(4), False),
    ],
)
def test_outside_of_the_block_no_wrong_file_is_written_either(descriptor: QuantDescriptor, dynamo: bool) -> None:
    module, target = nn.Sequential(quant_nn.TensorQuantizer(descriptor)), cast(Any, io.BytesIO())
    with pytest.raises((AssertionError, torch.onnx.OnnxExporterError)):
        torch.onnx.export(module.eval(), (torch.rand(3, 4),), target, dynamo=dynamo, verbose=False)


def test_outside_of_the_block_the_nodes_are_the_same(network: nn.Module) -> None:
    target = cast(Any, io.BytesIO())  # PyTorch's signature does not name it
    torch.onnx.export(network, (X,), target, dynamo=False)
    assert kinds(onnx.load_from_string(target.getvalue()))["QuantizeLinear"] == 6


@EXPORTERS
def test_all_quantizers_without_amax_are_named_also_disabled_ones(dynamo: bool) -> None:
    module = Network().eval()
    for name in ("conv", "fc"):
        getattr(module, name).weight_quantizer.disable()
    module.conv.input_quantizer.amax = 1.0
    names = "conv._weight_quantizer, fc._input_quantizer, fc._weight_quantizer"
    with pytest.raises(AssertionError, match=f"calibrate it first: {names}$"):
        export(module, X, dynamo=dynamo)


def test_readiness_is_asked_in_the_block_only() -> None:
    quantizer = quant_nn.TensorQuantizer(QuantDescriptor(), disabled=True)
    x = torch.rand(3)
    with pytorch_quantization.enable_onnx_export():
        with pytest.raises(AssertionError, match="a quantizer without amax"):
            quantizer(x)
        with quant_modules.enable_onnx_export():
            pass
        assert quant_nn.TensorQuantizer._enable_onnx_export  # the inner block does not end the outer one
        quantizer.amax = 1.0
        quantizer(x)
        e4m3 = quant_nn.TensorQuantizer(QuantDescriptor((4, 3), axis=0, amax=[1.0, 2.0, 3.0]), disabled=True)
        with pytest.raises(AssertionError, match="E4M3"):
            e4m3(x)
    e4m3(x)


def test_defect_enable_onnx_export_outlived_an_exception() -> None:
    for error in (KeyError("foreign"), AssertionError("foreign"), torch.onnx.OnnxExporterError("foreign")):
        with pytest.raises(type(error), match="foreign"), pytorch_quantization.enable_onnx_export():
            raise error
        assert not quant_nn.TensorQuantizer._enable_onnx_export


def test_an_operator_set_without_the_operator_or_its_axis_is_refused() -> None:
    per_tensor = nn.Sequential(quant_nn.TensorQuantizer(QuantDescriptor(amax=1.0)))
    per_row = nn.Sequential(quant_nn.TensorQuantizer(QuantDescriptor(axis=0, amax=[[1.0]] * 3)))
    assert kinds(export(per_tensor, torch.rand(3, 4), dynamo=False, opset_version=10))["QuantizeLinear"] == 1
    with pytest.raises(AssertionError, match="QuantizeLinear from opset 10 on, asked for 9"):
        export(per_tensor, torch.rand(3, 4), dynamo=False, opset_version=9)
    with pytest.raises(AssertionError, match="one amax per channel from opset 13 on, asked for 12"):
        export(per_row, torch.rand(3, 4), dynamo=False, opset_version=12)


def test_opset_13_of_the_new_exporter_is_18(network: nn.Module) -> None:
    """PyTorch's own doing: it cannot convert its graph down, says so on the log, and writes 18."""
    proto = export(network, X, dynamo=True, opset_version=13)
    assert {o.domain: o.version for o in proto.opset_import}[""] == 18
