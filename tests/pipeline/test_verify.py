"""`verify` and `benchmark`: what they report, and how they answer wrong files and wrong data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import qdq
from pipeline.helpers import Deployed, deploy, quantize, randn, run_file, run_model, sqnr_db

IMAGE = randn(6, 3, 8, 8, seed=1)


def network(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, classes))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), head).eval()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return deploy(network(), IMAGE.split(2), tmp_path_factory.mktemp("verify") / "m.onnx")


@pytest.fixture(scope="module")
def shifted(deployed: Deployed) -> Path:
    """The same file with the head's weights and thus its outputs changed: what a wrong deployment looks like."""
    model = onnx.load(deployed.path)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.int8 and array.shape in ((5, 8), (8, 5)):
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.flip(array, -1).copy(), tensor.name))
    path = deployed.path.with_name("shifted.onnx")
    onnx.save(model, path)
    return path


def test_sqnr_is_over_all_batches_and_as_defined(deployed: Deployed, shifted: Path) -> None:
    fidelity = qdq.verify(deployed.qmodel, shifted, IMAGE.split(2), progress=False)
    simulated, run = run_model(deployed.qmodel, [IMAGE]), run_file(shifted, [IMAGE])
    assert fidelity.sqnr_db == pytest.approx(sqnr_db(simulated, run), abs=1e-3)
    assert fidelity.agreement == pytest.approx(float((simulated[0].argmax(1) == run[0].argmax(1)).mean()))
    assert fidelity.samples == 6 and fidelity.sqnr_db < 20
    assert fidelity.max_step_difference is None  # the head's output has no quantizer


def test_a_good_file_agrees(deployed: Deployed) -> None:
    fidelity = deployed.fidelity
    assert fidelity.sqnr_db > 60 and fidelity.agreement == 1.0 and fidelity.samples == 6
    text = str(fidelity)
    assert text.startswith("simulation against onnxruntime, 6 samples")
    assert "agreement           100.00 %" in text and "largest difference  -" in text
    assert fidelity.cause in text and "per tensor" not in text
    with pytest.raises(dataclasses.FrozenInstanceError):
        fidelity.sqnr_db = 1.0  # type: ignore[misc]


def test_equal_outputs_have_infinite_sqnr(tmp_path: Path) -> None:
    """Inputs that are codes, weights of 1: every product and sum is exact."""
    layer = nn.Conv2d(1, 1, 1, bias=False).eval()
    nn.init.ones_(layer.weight)
    x = torch.arange(256.0).reshape(4, 1, 8, 8)
    deployed = deploy(layer, [x], tmp_path / "m.onnx", recipe=qdq.Recipe(calibration="max"))
    assert deployed.fidelity.sqnr_db == math.inf
    assert deployed.fidelity.max_step_difference == 0.0
    assert deployed.fidelity.cause == "every output is equal"
    assert all(t.sqnr_db == math.inf and t.share == 0 and t.max_difference == 0 for t in deployed.fidelity.tensors)
    assert "inf dB" in str(deployed.fidelity) and "0.00 steps" in str(deployed.fidelity)


def test_every_quantized_tensor_is_listed_on_request(deployed: Deployed) -> None:
    fidelity = qdq.verify(deployed.qmodel, deployed.path, [IMAGE], per_tensor=True, progress=False)
    names = [t.name for t in fidelity.tensors]
    expected = {e.quantizer for e in qdq.explain(deployed.qmodel) if e.role == "activation" and e.quantized}
    assert set(names) == expected and names[0] == "input_quantizer"
    text = str(fidelity)
    assert "codes that differ, per tensor:" in text
    assert all(f"{n}: " in text for n in names) and "% differ, by" in text
    assert all(0 <= t.share <= 1 and t.max_difference >= 0 for t in fidelity.tensors)


def test_steps_are_those_of_the_outputs_quantizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    deployed = deploy(nn.Conv2d(3, 4, 3).eval(), [IMAGE], tmp_path / "m.onnx")
    assert deployed.fidelity.max_step_difference is not None and deployed.fidelity.max_step_difference <= 1.001
    model = onnx.load(deployed.path)
    output = next(n for n in reversed(model.graph.node) if n.op_type == "DequantizeLinear")
    scale = next(t for t in model.graph.initializer if t.name == output.input[1])
    larger = onnx.numpy_helper.to_array(scale) * np.float32(1.1)
    changed = onnx.helper.make_tensor("larger", onnx.TensorProto.FLOAT, [], [float(larger)])
    model.graph.initializer.append(changed)
    output.input[1] = "larger"
    onnx.save(model, tmp_path / "changed.onnx")
    fidelity = qdq.verify(deployed.qmodel, tmp_path / "changed.onnx", [IMAGE], progress=False)
    name = next(e.quantizer for e in qdq.explain(deployed.qmodel) if e.role == "activation" and e.operation == "conv2d")
    step = deployed.qmodel.state_dict()[f"{name}.step_size"].item()
    (simulated,), (run,) = run_model(deployed.qmodel, [IMAGE]), run_file(tmp_path / "changed.onnx", [IMAGE])
    assert fidelity.max_step_difference == pytest.approx(float(np.abs(simulated - run).max()) / step, rel=1e-4)
    assert fidelity.max_step_difference > 3


def test_the_users_agreement_takes_the_place_of_argmax(deployed: Deployed, shifted: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def close(want: Tensor, got: Tensor) -> float:
        seen.append(tuple(want.shape))
        return 1.0 if len(want) == 2 else 0.25

    parts = [IMAGE[:2], IMAGE[2:4], IMAGE[:4]]
    fidelity = qdq.verify(deployed.qmodel, shifted, parts, agreement=close, progress=False)
    assert seen == [(2, 5), (2, 5), (4, 5)]
    assert fidelity.agreement == pytest.approx((2 + 2 + 4 * 0.25) / 8)  # weighted by samples


@pytest.mark.parametrize("share", [2.5, -0.1, math.nan, "half", None, torch.ones(2)])
def test_agreement_is_a_share(deployed: Deployed, share: Any) -> None:
    with pytest.raises(qdq.QdqError, match="agreement must give one number from 0 to 1, the share .*; it gave"):
        qdq.verify(deployed.qmodel, deployed.path, [IMAGE], agreement=lambda want, got: share, progress=False)
    with pytest.raises(qdq.QdqError, match="agreement must be a callable of two tensors, not str"):
        qdq.verify(deployed.qmodel, deployed.path, [IMAGE], agreement="argmax", progress=False)  # type: ignore[arg-type]


def test_no_agreement_where_the_last_axis_has_one_element(tmp_path: Path) -> None:
    deployed = deploy(network(1), [IMAGE], tmp_path / "m.onnx")
    assert deployed.fidelity.agreement is None
    assert "agreement           -" in str(deployed.fidelity)


def test_callable_data_see_the_simulations_outputs(deployed: Deployed) -> None:
    outputs: list[Tensor] = []
    fidelity = qdq.verify(
        deployed.qmodel,
        deployed.path,
        lambda model: outputs.extend(model(part) for part in IMAGE.split(3)),
        progress=False,
    )
    assert [tuple(o.shape) for o in outputs] == [(3, 5), (3, 5)] and fidelity.samples == 6
    with pytest.raises(qdq.DataError, match="the data function ran the model not once"):
        qdq.verify(deployed.qmodel, deployed.path, lambda model: None, progress=False)


def test_generators_serve(deployed: Deployed) -> None:
    fidelity = qdq.verify(deployed.qmodel, deployed.path, (x for x in IMAGE.split(2)), progress=False)
    assert fidelity.samples == 6


def two_outputs(model: onnx.ModelProto) -> None:
    model.graph.output.append(onnx.helper.make_tensor_value_info(model.graph.node[0].output[0], 2, None))


def another_shape(model: onnx.ModelProto) -> None:
    node = onnx.helper.make_node("Concat", [model.graph.output[0].name] * 2, ["twice"], axis=1)
    model.graph.node.append(node)
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("twice", 1, None))


def divided_by_zero(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.helper.make_tensor("zero", 1, [], [0.0]))
    model.graph.node.append(onnx.helper.make_node("Div", [model.graph.output[0].name, "zero"], ["infinite"]))
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("infinite", 1, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (two_outputs, "the file gives 2 outputs and the simulation 1: it is another model's"),
        (
            another_shape,
            r"output 0 has shape \[6, 10\] in the file and \[6, 5\] in the simulation: it is another model's",
        ),
        (divided_by_zero, "output 0 has NaN or infinite values in one of file and simulation, not in the other"),
    ],
)
def test_a_file_of_another_model_is_refused(
    deployed: Deployed, tmp_path: Path, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    model = onnx.load(deployed.path)
    change(model)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(qdq.DataError, match=message):
        qdq.verify(deployed.qmodel, tmp_path / "other.onnx", [IMAGE], progress=False)


def test_a_file_with_other_inputs_is_refused(deployed: Deployed, tmp_path: Path) -> None:
    model = onnx.load(deployed.path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(qdq.DataError, match=r"ONNX Runtime refuses inputs of shapes \{'input': \[6, 3, 8, 8\]\}"):
        qdq.verify(deployed.qmodel, tmp_path / "other.onnx", [IMAGE], progress=False)


def test_missing_and_broken_files_are_refused(deployed: Deployed, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(deployed.path.read_bytes()[:500])
    for call in (lambda p: qdq.verify(deployed.qmodel, p, [IMAGE], progress=False), lambda p: qdq.benchmark(p)):
        with pytest.raises(qdq.ExportError, match="there is no file '.*missing.onnx'"):
            call(tmp_path / "missing.onnx")
        with pytest.raises(qdq.ExportError, match="ONNX Runtime cannot load '.*broken.onnx'"):
            call(broken)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "batches holds no batch"),
        (IMAGE, "batches is one array"),
        ([IMAGE[:, :2]], r"input 'input' has shape \[6, 2, 8, 8\], the model was captured for \[any, 3, 8, 8\]"),
        ([IMAGE.double()], "input 'input' has dtype torch.float64"),
        ([IMAGE * float("nan")], "input 'input' holds NaN"),
    ],
)
def test_data_that_do_not_fit_are_refused(deployed: Deployed, data: Any, message: str) -> None:
    with pytest.raises(qdq.DataError, match=message):
        qdq.verify(deployed.qmodel, deployed.path, data, progress=False)


def test_codes_that_differ_are_explained(deployed: Deployed) -> None:
    """A simulation whose ranges differ from the file's, the input's first of all."""
    other = quantize(network(), IMAGE.split(2), recipe=qdq.Recipe(calibration="percentile", percentile=90.0))
    fidelity = qdq.verify(other, deployed.path, [IMAGE], progress=False)
    assert fidelity.sqnr_db < 60
    assert "codes of input_quantizer differ by up to" in fidelity.cause and "export it again" in fidelity.cause


# benchmark


def test_benchmark_of_two_files(deployed: Deployed, tmp_path: Path) -> None:
    fp32 = qdq.export_onnx(network(), tmp_path / "fp32.onnx", example_inputs=IMAGE)
    speed = qdq.benchmark(deployed.path, fp32, batch_size=3, threads=1, rounds=2, progress=False)
    assert (speed.rounds, speed.batch_size, speed.threads) == (2, 3, 1)
    assert speed.path == str(deployed.path) and speed.against == str(fp32)
    assert speed.median_ms > 0 and speed.against_ms is not None and speed.against_ms > 0
    assert speed.ratio_low is not None and speed.ratio is not None and speed.ratio_high is not None
    assert 0 < speed.ratio_low <= speed.ratio <= speed.ratio_high
    first, second, third = str(speed).splitlines()
    assert first.startswith("m.onnx: ") and first.endswith("(batch 3, 1 threads, 2 rounds)")
    assert second.startswith("fp32.onnx: ") and third.startswith("speed-up: ") and "10th to 90th percentile" in third


@pytest.mark.parametrize("inputs", [IMAGE, IMAGE.numpy(), [IMAGE], {"input": IMAGE}])
def test_benchmark_takes_inputs_in_several_forms(deployed: Deployed, inputs: Any) -> None:
    speed = qdq.benchmark(deployed.path, inputs=inputs, rounds=1, progress=False)
    assert speed.batch_size == 6 and speed.against is None and speed.ratio is None
    assert len(str(speed).splitlines()) == 1 and "default threads" in str(speed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be an integer of at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"inputs": [IMAGE, IMAGE]}, "inputs holds 2 arrays, the model takes 1"),
        ({"inputs": IMAGE[:, :2]}, "ONNX Runtime refuses inputs of shapes"),
    ],
)
def test_benchmark_refuses_what_does_not_fit(deployed: Deployed, options: dict[str, Any], message: str) -> None:
    with pytest.raises(qdq.DataError, match=message):
        qdq.benchmark(deployed.path, progress=False, **options)


def test_benchmark_says_when_inputs_cannot_be_made_up(tmp_path: Path) -> None:
    model = nn.Embedding(5, 3).eval()
    path = qdq.export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.arange(4))
    with pytest.raises(
        qdq.DataError, match=r"input 'input' \(tensor\(int64\), shape .*\) cannot be made up: pass inputs="
    ):
        qdq.benchmark(path, progress=False)
