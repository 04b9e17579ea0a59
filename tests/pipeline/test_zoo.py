"""Every network of the zoo goes the whole way, and runs in integers where its kind should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import qdq
from fixtures.zoo import ZOO
from pipeline.helpers import Deployed, operations, optimized_graph, quantize, run_file, run_model, sqnr_db
from qdq.graph.few_products import REASON

# Floor between simulation and ONNX Runtime, in dB. Where codes agree, only float rounding is left (about 140); one code
# that differs by one, because a float operation before it was rounded otherwise, leaves such a network 50 to 100.
FLOOR_DB = 40.0

# What the integer form of each network must hold, beside QLinearConv.
HOLDS = {
    "resnet_basic": {"QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "resnet_bottleneck": {"QLinearAdd": 3, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "mobilenet_v2": {"QLinearAdd": 2, "QGemm": 1},
    "mobilenet_v3": {"QLinearAdd": 2, "QLinearMul": 2},
    "efficientnet": {"QLinearAdd": 1, "QLinearMul": 2},
    "densenet": {"QLinearConcat": 2},
    "inception": {"QLinearConcat": 3, "QLinearAveragePool": 2},
    "grouped": {"QLinearAdd": 2},
    "unet": {"QLinearConcat": 2},
    "conv1d": {"QLinearAdd": 1},
    "vit_multihead": {"MatMulIntegerToFloat": 6},
    "vit_fused": {"MatMulIntegerToFloat": 8},
    "masked_encoder": {"MatMulIntegerToFloat": 6},
    "cross_attention": {"MatMulIntegerToFloat": 5},
    "text_encoder": {"MatMulIntegerToFloat": 6},
}
# Convolutions of few products between operations in float: the first one.
IN_FLOAT = {"mobilenet_v3": 1, "efficientnet": 1}


def convolutions(model: nn.Module) -> int:
    """Convolution modules that an integer kernel must run; transposed ones have none in ONNX Runtime."""
    return sum(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in model.modules())


def snapshot(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[bool], list[bool]]:
    """Everything of a model that qdq must leave alone."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def assert_unchanged(before: tuple, model: nn.Module) -> None:
    state, training, gradients = snapshot(model)
    assert list(state) == list(before[0])
    assert all(torch.equal(state[name], before[0][name]) for name in state)
    assert (training, gradients) == before[1:]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ZOO)
def test_network_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    """One test per network, because capture and export take most of the time and everything below shares them."""
    entry = ZOO[name]
    model = entry.factory()
    before = snapshot(model)

    qmodel = quantize(model, entry.batches(2))
    path = qdq.export_onnx(qmodel, tmp_path / "model.onnx")
    held_out = entry.batches(2, first_seed=50)
    fidelity = qdq.verify(qmodel, path, held_out, progress=False)

    assert_unchanged(before, model)
    onnx.checker.check_model(str(path), full_check=True)
    assert fidelity.sqnr_db > FLOOR_DB, str(fidelity)
    assert fidelity.samples == 8 and fidelity.runtime == "onnxruntime"

    # The batch dimension of the file is dynamic, and no batch size changes what a sample gives.
    inputs = entry.make_inputs(batch=7, seed=9)
    whole = run_model(qmodel, inputs)
    for size in (1, 3, 7):
        part = tuple(x[:size] for x in inputs)
        outputs = run_file(path, part)
        assert [o.shape for o in outputs] == [(size, *w.shape[1:]) for w in whole]
        assert sqnr_db([w[:size] for w in whole], outputs) > FLOOR_DB - 5

    assert_integers(name, model, Deployed(qmodel, path, fidelity))
    assert sqnr_db(run_model(model, held_out[0]), run_model(qmodel, held_out[0])) > 15


def assert_integers(name: str, model: nn.Module, deployed: Deployed) -> None:
    executed = operations(optimized_graph(deployed.path))
    left = [entry for entry in qdq.explain(deployed.qmodel) if entry.role == "weight" and not entry.quantized]
    in_float = IN_FLOAT.get(name, 0)
    assert len(left) == in_float and all(REASON in entry.reason for entry in left)
    assert executed["Conv"] + executed["FusedConv"] == in_float, executed
    # A module called twice is two convolutions, so that there may be more of these than modules.
    assert executed["QLinearConv"] >= convolutions(model) - in_float
    for operator, least in HOLDS.get(name, {}).items():
        assert executed[operator] >= least, executed
    stored = operations(onnx.load(deployed.path))
    assert stored["QuantizeLinear"] > 0


def test_train_mode_and_frozen_parameters_of_the_users_model_survive() -> None:
    entry = ZOO["mobilenet_v3"]  # holds dropout and batch norms
    model = entry.factory()
    expected = quantize(model, entry.batches(1))
    model.train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    before = snapshot(model)
    found = quantize(model, entry.batches(1))
    assert_unchanged(before, model)
    # The copy computes as in eval mode all the same.
    x = entry.make_inputs(2, 5)
    assert sqnr_db(run_model(expected, x), run_model(found, x)) == float("inf")


def test_parameter_and_module_names_survive() -> None:
    entry = ZOO["resnet_basic"]
    model = entry.factory()
    qmodel = quantize(model, entry.batches(1))
    weights = {n for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1}
    state = qmodel.state_dict()
    assert weights <= set(state)
    assert {f"{n}_quantizer.step_size" for n in weights} <= set(state)
    assert "4.relu" in str(qdq.explain(qmodel))
    text = str(qmodel)
    assert "conv1" in text and "weight_quantizer" in text and "AffineQuantizer(uint8, range=[" in text


class Wide(nn.Module):
    """Mostly weights, so that the graph around them does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 64, 3), nn.Linear(64, 1024), nn.Linear(1024, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(torch.relu(self.conv(x)).mean((2, 3)))))


def test_int8_file_is_at_most_half_of_the_float_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Wide().eval(), torch.randn(4, 3, 8, 8)
    int8 = qdq.export_onnx(quantize(model, [x]), tmp_path / "int8.onnx")
    fp32 = qdq.export_onnx(model, tmp_path / "fp32.onnx", example_inputs=x)
    assert int8.stat().st_size < 0.3 * fp32.stat().st_size
    # The float file computes what the model computes, for any batch size.
    for size in (1, 5):
        batch = torch.randn(size, 3, 8, 8)
        assert sqnr_db(run_model(model, [batch]), run_file(fp32, [batch])) > 100
