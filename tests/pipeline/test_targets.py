"""The three targets, and the layers whose spelling is unusual: every rule seen in the graph or in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qdq
from pipeline.helpers import deploy, initializers, quantize, randn, run_file, run_model, sqnr_db
from qdq.affine_quantizer import AffineQuantizer
from qdq.constant_quantizers import BiasQuantizer, WeightQuantizer
from qdq.graph.targets import TARGETS, find_target, reduces_range

IMAGE = randn(4, 4, 8, 8, seed=1)


class Residual(nn.Module):
    """Convolution, residual addition, concatenation, pool, head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.up, self.fc = nn.ConvTranspose2d(8, 4, 2, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        z = F.relu(self.conv2(F.relu(self.conv1(y))) + y)
        return self.fc(F.adaptive_avg_pool2d(self.up(torch.cat([y, z], 1)), 1).flatten(1))


def modules(qmodel: nn.Module, kind: type) -> dict[str, Any]:
    return {n: m for n, m in qmodel.named_modules() if isinstance(m, kind)}


def test_tensorrt_is_symmetric_int8_with_float_biases(tmp_path: Path) -> None:
    deployed = deploy(Residual().eval(), [IMAGE], tmp_path / "m.onnx", target="tensorrt")
    qmodel = deployed.qmodel
    assert modules(qmodel, BiasQuantizer) == {}
    for quantizer in modules(qmodel, AffineQuantizer).values():
        assert (quantizer.lo, quantizer.hi, int(quantizer.zero_point)) == (-128, 127, 0)
    # Of the residual addition only the skip branch is quantized: the other one stays fused with its convolution.
    explanation = qdq.explain(qmodel)
    assert not explanation.find("conv2d_2").quantized
    assert "add" in str(explanation.find("relu").readers)
    stored = onnx.load(deployed.path)
    arrays = initializers(deployed.path)
    zeros = [arrays[n.input[2]] for n in stored.graph.node if n.op_type == "QuantizeLinear"]
    assert zeros and all(z.dtype == "int8" and not z.any() for z in zeros)
    assert not any(a.dtype == "int32" for a in arrays.values())
    assert deployed.fidelity.sqnr_db > 40 and deployed.fidelity.runtime == "onnxruntime"
    assert {p.key: p.value for p in stored.metadata_props} == {"producer": "qdq", "qdq.target": "tensorrt"}


def test_openvino_is_affine_uint8_with_float_biases(tmp_path: Path) -> None:
    qmodel = quantize(Residual().eval(), [IMAGE], target="openvino")
    assert modules(qmodel, BiasQuantizer) == {}
    assert {(q.lo, q.hi) for q in modules(qmodel, AffineQuantizer).values()} == {(0, 255)}
    assert any(int(q.zero_point) for q in modules(qmodel, AffineQuantizer).values())
    # Its transposed convolutions are integer operations, which ONNX Runtime's are not.
    assert "conv_transpose2d" in qdq.explain(qmodel).find("cat").readers
    assert "conv_transpose2d" not in qdq.explain(quantize(Residual().eval(), [IMAGE])).find("cat").readers
    path = qdq.export_onnx(qmodel, tmp_path / "m.onnx")
    # Any runtime executes the definition of Q/DQ alike.
    assert sqnr_db(run_model(qmodel, [IMAGE]), run_file(path, [IMAGE])) > 40


def test_openvino_runs_its_file_or_says_what_is_missing(tmp_path: Path) -> None:
    qmodel = quantize(Residual().eval(), [IMAGE], target="openvino")
    path = qdq.export_onnx(qmodel, tmp_path / "m.onnx")
    try:
        import openvino  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(
            qdq.RuntimeMissingError, match=r"needs the package 'openvino': pip install 'qdq\[openvino\]'"
        ):
            qdq.verify(qmodel, path, [IMAGE], progress=False)
    else:
        fidelity = qdq.verify(qmodel, path, [IMAGE], progress=False)
        assert fidelity.runtime == "openvino" and fidelity.sqnr_db > 30


@pytest.mark.parametrize("name", ["tensorflow", "", None, 3])
def test_unknown_targets_are_refused(name: Any) -> None:
    message = f"unknown target {name!r}; known targets: onnxruntime, openvino, tensorrt"
    with pytest.raises(qdq.RecipeError, match=message):
        quantize(Residual(), [IMAGE], target=name)


def test_targets_are_values() -> None:
    assert find_target("tensorrt") is find_target(TARGETS["tensorrt"]) is TARGETS["tensorrt"]
    for target in TARGETS.values():
        assert target.reference.startswith("https://")
        assert len({r.kind for r in target.rules}) == len(target.rules)
        assert all(r.role in ("compute", "follow", "weight") and r.note for r in target.rules)


@pytest.mark.parametrize("asked", [True, False])
def test_reduced_range_as_asked(asked: bool) -> None:
    for target in TARGETS.values():
        assert reduces_range(target, asked) is asked
    assert reduces_range(TARGETS["tensorrt"], None) is False
    qmodel = quantize(Residual().eval(), [IMAGE], target="openvino", recipe=qdq.Recipe(reduce_range=asked))
    assert {w.num_bits for w in modules(qmodel, WeightQuantizer).values()} == {7 if asked else 8}
    qmodel = quantize(Residual().eval(), [IMAGE], recipe=qdq.Recipe(reduce_range=asked))
    found = {n: w.pairs_axis is not None for n, w in modules(qmodel, WeightQuantizer).items()}
    # A transposed convolution is computed in float: nothing saturates there.
    assert all(v is (asked and not n.startswith("up.")) for n, v in found.items())


def test_a_recipe_of_another_type_is_refused() -> None:
    with pytest.raises(qdq.RecipeError, match=r"recipe must be a qdq.Recipe, not dict; Recipe.load reads files"):
        quantize(Residual(), [IMAGE], recipe={"calibration": "max"})


# Recipes applied.


def test_excluded_modules_stay_in_float() -> None:
    qmodel = quantize(Residual().eval(), [IMAGE], recipe=qdq.Recipe(exclude=("conv[12]", "*fc")))
    weights = {e.tensor: e for e in qdq.explain(qmodel) if e.role == "weight"}
    assert {n for n, e in weights.items() if e.quantized} == {"stem.weight", "up.weight"}
    assert weights["fc.weight"].reason == "linear: the recipe keeps it in float"
    assert set(modules(qmodel, WeightQuantizer)) == {"stem.weight_quantizer", "up.weight_quantizer"}


def test_overrides_reach_weights_and_activations_by_name() -> None:
    recipe = qdq.Recipe(
        overrides={
            "stem": qdq.Override(weights=qdq.QuantDescriptor(num_bits=4, axis=None), calibration="percentile"),
            "conv?": {"calibration": "max"},
            "fc": float,
            "x": qdq.Override(activations=qdq.QuantDescriptor(amax=2.0)),
        },
        percentile=95.0,
    )
    qmodel = quantize(Residual().eval(), [IMAGE], recipe=recipe)
    weights = modules(qmodel, WeightQuantizer)
    assert (weights["stem.weight_quantizer"].num_bits, weights["stem.weight_quantizer"].axis) == (4, None)
    assert weights["stem.weight_quantizer"].step_size.shape == ()
    assert (weights["conv1.weight_quantizer"].num_bits, weights["conv1.weight_quantizer"].axis) == (8, 0)
    assert "fc.weight_quantizer" not in weights
    inputs = modules(qmodel, AffineQuantizer)["x_quantizer"]
    assert inputs.fixed and float(inputs.step_size) * 255 == pytest.approx(4.0, rel=1e-5)
    codes = weights["stem.weight_quantizer"].codes(qmodel.stem.weight)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) == 7


def test_a_fixed_unsigned_range_starts_at_zero() -> None:
    recipe = qdq.Recipe(overrides={"x": {"activations": {"amax": 2, "unsigned": True}}})
    found = modules(quantize(Residual().eval(), [IMAGE], recipe=recipe), AffineQuantizer)["x_quantizer"]
    assert int(found.zero_point) == 0 and float(found.step_size) * 255 == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("options", [{"exclude": ("head",)}, {"overrides": {"*.head": float}}])
def test_a_pattern_that_matches_nothing_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(qdq.RecipeError, match=r"head' matches no module of the model; modules are such as"):
        quantize(Residual().eval(), [IMAGE], recipe=qdq.Recipe(**options))


def test_modules_that_compute_nothing_in_eval_mode_may_be_named() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3)).eval()
    plain = quantize(model, [IMAGE])
    named = quantize(model, [IMAGE], recipe=qdq.Recipe(exclude=("1", "2"), overrides={"[12]": {"calibration": "max"}}))
    assert plain.state_dict().keys() == named.state_dict().keys()
    with pytest.raises(
        qdq.RecipeError, match=r"'5' matches no module of the model; modules are such as \['0', '3', '4'"
    ):
        quantize(model, [IMAGE], recipe=qdq.Recipe(exclude=("5",)))


class Tied(nn.Module):
    """A table whose weight is also that of the head; the module that is made last gives the weight its name."""

    def __init__(self, head_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("head", "table") if head_first else ("table", "head"):
            self.add_module(name, nn.Linear(8, 12, bias=False) if name == "head" else nn.Embedding(12, 8))
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).tanh())


@pytest.mark.parametrize("head_first", [True, False])
def test_overrides_of_a_tied_weight_hold_for_it_whichever_reader_they_name(head_first: bool) -> None:
    model, ids = Tied(head_first).eval(), torch.arange(12).reshape(3, 4)
    four, six = ({"weights": {"num_bits": bits}} for bits in (4, 6))
    same = {"table": four, "head": four}
    for overrides in ({"head": four}, {"table": four}, same):
        qmodel = quantize(model, [ids], recipe=qdq.Recipe(overrides=overrides))
        assert [q.num_bits for q in modules(qmodel, WeightQuantizer).values()] == [4], overrides
    for overrides in ({"head": four, "table": six}, {"table": six, "head": four}):
        told = r"overrides: 'table' and 'head' read the same weight '\w+\.weight', but are to have 6 bits and 4 bits"
        with pytest.raises(qdq.RecipeError, match=told):
            quantize(model, [ids], recipe=qdq.Recipe(overrides=overrides))


@pytest.mark.parametrize("sizes", [(4, 0, 3), (4, 5, 0)])
def test_layers_without_weights_stay_in_float(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    first, hidden, last = sizes
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, last)).eval()
    qmodel = quantize(model, [randn(6, 4)])
    assert any("its weight holds no values" in entry.reason for entry in qdq.explain(qmodel))
    assert run_file(qdq.export_onnx(qmodel, tmp_path / "m.onnx"), [randn(6, 4)])[0].shape == (6, last)


@pytest.mark.parametrize("target", [["onnxruntime"], None, 3, "tflite"])
def test_targets_that_there_are_not_are_refused(target: Any) -> None:
    with pytest.raises(qdq.RecipeError, match="unknown target .*; known targets: onnxruntime, openvino, tensorrt"):
        find_target(target)


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "entropy"])
def test_every_calibration_method_gives_a_usable_model(method: str) -> None:
    model = Residual().eval()
    qmodel = quantize(model, [IMAGE], recipe=qdq.Recipe(calibration=method, weight_calibration="mse"))
    floor = {"max": 25, "mse": 25, "percentile": 25, "entropy": 10}[method]
    assert sqnr_db(run_model(model, [IMAGE]), run_model(qmodel, [IMAGE])) > floor
