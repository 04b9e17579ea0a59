"""What torch.onnx.export writes for a TensorQuantizer, and what ONNX Runtime computes with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qdq.descriptor import QuantDescriptor
from qdq.onnx_form import fake_quantize_as_onnx
from qdq.quantizer import TensorQuantizer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# The exporter of PyTorch warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Quantized(nn.Module):
    """A linear layer with quantized input and weight."""

    def __init__(self, input_desc: QuantDescriptor, weight_amax: list[Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.input_quantizer = TensorQuantizer(input_desc)
        self.weight_quantizer = TensorQuantizer(QuantDescriptor(axis=0, amax=weight_amax))

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quantizer(x)
        return nn.functional.linear(x, self.weight_quantizer(self.linear.weight).to(x.dtype), self.linear.bias)


def export(module: nn.Module, x: Tensor, **options: Any) -> Any:
    program = torch.onnx.export(module.eval(), (x,), dynamo=True, verbose=False, **options)
    assert program is not None
    return program.model_proto


@pytest.mark.parametrize(("unsigned", "opset"), [(False, 18), (True, 21)])
def test_exports_qdq_with_constants(unsigned: bool, opset: int) -> None:
    torch.manual_seed(0)
    module = Quantized(QuantDescriptor(amax=1.5, unsigned=unsigned), [[0.1], [0.2], [0.0], [0.4]])
    x = torch.rand(5, 6) * 2
    proto = export(module, x, opset_version=opset, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    nodes = [n for n in proto.graph.node if n.op_type.endswith("Linear")]
    assert [n.op_type for n in nodes] == ["QuantizeLinear", "DequantizeLinear"] * 2
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    activation, weight = nodes[0], nodes[2]
    assert constants[activation.input[1]] == np.float32(1.5) / np.float32(255 if unsigned else 127)
    assert constants[activation.input[2]].dtype == (np.uint8 if unsigned else np.int8)
    np.testing.assert_allclose(
        constants[weight.input[1]], np.float32([0.1 / 127, 0.2 / 127, 1.0, 0.4 / 127]), rtol=1e-6
    )
    assert [a.i for a in weight.attribute if a.name == "axis"] == [0]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": x[:3].numpy()})
    np.testing.assert_allclose(result, module(x[:3]).detach().numpy(), atol=2e-2)


def test_half_precision_is_cast_before_and_back() -> None:
    module = nn.Sequential(TensorQuantizer(QuantDescriptor(amax=1.0)))
    proto = export(module, torch.rand(3, 4).half())
    kinds = [n.op_type for n in proto.graph.node]
    assert kinds == ["Cast", "QuantizeLinear", "DequantizeLinear", "Cast"]


def test_e4m3_becomes_tensorrts_operators() -> None:
    module = nn.Sequential(TensorQuantizer(QuantDescriptor((4, 3), amax=4.48)))
    proto = export(module, torch.rand(3, 4))
    kinds = [(n.domain, n.op_type) for n in proto.graph.node if n.op_type.startswith("TRT")]
    assert kinds == [("trt", "TRT_FP8QuantizeLinear"), ("trt", "TRT_FP8DequantizeLinear")]
    scale = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    assert (scale.shape, float(scale)) == ((), pytest.approx(0.01))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 4, False, False), "only 8 bits can be exported to ONNX, got num_bits=4"),
        ((1.0, 8, False, True), "a signed narrow range cannot be exported"),
        (([[1.0] * 3] * 2, 8, False, False), r"amax of shape \(2, 3\) spans several axes"),
        (([1.0] * 3, (4, 3), False, False), "E4M3 can only be exported to ONNX with one amax per tensor"),
        ((1.0, (5, 2), False, False), r"only E4M3 can be exported to ONNX, got num_bits=\(5, 2\)"),
    ],
)
def test_what_has_no_form_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    amax, *settings = arguments
    with pytest.raises(AssertionError, match=message):
        fake_quantize_as_onnx(torch.ones(2, 3), torch.tensor(amax), *settings)


def test_export_of_what_is_not_ready_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorQuantizer, "_enable_onnx_export", True)
    # The exporter tries two captures; the check holds in both.
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        export(nn.Sequential(TensorQuantizer()), torch.rand(3, 4))
    assert "a quantizer without amax cannot be exported to ONNX: calibrate it first" in causes(caught.value)


def causes(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__
    return "".join(texts)
