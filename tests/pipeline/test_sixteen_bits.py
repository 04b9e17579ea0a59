"""Activations of 16 bits: codes in the file, operations between them in float, and what ONNX Runtime must not do."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import qdq
from fixtures import fashion
from fixtures.classifiers import s1
from fixtures.transformers import FusedBlock
from pipeline.helpers import (
    deploy,
    initializers,
    operations,
    optimized_graph,
    quantize,
    randn,
    run_file,
    run_model,
    sqnr_db,
)
from qdq import Override, QuantDescriptor, Recipe
from qdq.affine_quantizer import AffineQuantizer
from qdq.analysis.codes import TensorFidelity
from qdq.constant_quantizers import BiasQuantizer, WeightQuantizer
from qdq.errors import RecipeError
from qdq.graph.targets import ONNXRUNTIME, TARGETS, TENSORRT
from qdq.integer_operations import IntegerOperation

WIDE = QuantDescriptor(num_bits=16)
# Without algorithms what differs is the activations alone.
EIGHT, SIXTEEN = Recipe(algorithms={}), Recipe(activations=WIDE, algorithms={})
IMAGE, ROWS, VECTORS = randn(3, 4, 8, 8, seed=1), randn(3, 5, 8, seed=2), randn(6, 8, seed=3)


def widened(*patterns: str, **fields: Any) -> Recipe:
    """8 bits, but for what these patterns match."""
    return Recipe(overrides={p: Override(activations=WIDE) for p in patterns}, algorithms={}, **fields)


class Function(nn.Module):
    """A few fixed layers, and a function of them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.p, self.q, self.r = (nn.Linear(8, 8) for _ in range(3))
        self.n, self.up = nn.Linear(8, 8, bias=False), nn.ConvTranspose2d(4, 4, 2, 2)
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def quantizers(qmodel: nn.Module) -> dict[str, AffineQuantizer]:
    return {n: m for n, m in qmodel.named_modules() if isinstance(m, AffineQuantizer)}


def bits(qmodel: nn.Module) -> dict[str, int]:
    return {name: quantizer.num_bits for name, quantizer in quantizers(qmodel).items()}


def stored_codes(path: Path) -> dict[str, str]:
    """By the name of the quantizer, the dtype of the codes that its QuantizeLinear gives."""
    arrays, found = initializers(path), {}
    for node in onnx.load(path).graph.node:
        names = [p.value for p in node.metadata_props if p.key == "qdq.quantizer"]
        if node.op_type == "QuantizeLinear" and names:
            found[names[0]] = str(arrays[node.input[2]].dtype)
    return found


def test_resnet_gains_from_16_bits_and_its_file_is_what_was_simulated(tmp_path: Path) -> None:
    model, images = s1(), fashion.load("train", limit=32)[0]
    reference = run_model(model, [images])
    eight = quantize(model, [images], recipe=EIGHT)
    qmodel, path, fidelity = deploy(model, [images], tmp_path / "m.onnx", recipe=SIXTEEN)
    assert fidelity.sqnr_db > 80 and fidelity.agreement == 1.0
    assert sqnr_db(reference, run_model(qmodel, [images])) > sqnr_db(reference, run_model(eight, [images])) + 2
    assert set(stored_codes(path)) == set(quantizers(qmodel)) and set(stored_codes(path).values()) == {"uint16"}
    for quantizer in quantizers(qmodel).values():
        assert (quantizer.lo, quantizer.hi) == (0, 65535) and "uint16" in repr(quantizer)
    assert not any(isinstance(m, (BiasQuantizer, IntegerOperation)) for m in qmodel.modules())
    executed = operations(optimized_graph(path))
    assert executed["Conv"] == 15 and executed["Gemm"] == 1 and not any(k.startswith("QLinear") for k in executed)
    explanation = qdq.explain(qmodel)
    assert "16 bits" in explanation.find("relu").reason and "computed in float" in explanation.find("relu").reason
    assert "computed in float from a quantized weight" in explanation.find("stem.0.weight").reason
    assert explanation.find("stem.0.bias").reason == "added in float"


def test_one_stage_of_16_bits_leaves_the_rest_in_integers() -> None:
    model, images = s1(), fashion.load("train", limit=16)[0]
    recipe = Recipe(overrides={"blocks.2.conv*": {"activations": {"num_bits": 16}}}, algorithms={})
    qmodel = quantize(model, [images], recipe=recipe)
    wide = {name for name, width in bits(qmodel).items() if width == 16}
    # What the two convolutions read and give; the sum behind them has 8 bits again.
    assert wide == {"blocks.1.relu_quantizer_1", "blocks.2.relu_quantizer", "blocks.2.conv2.output_quantizer"}
    # In float: the two, the shortcut that reads the same tensor, and the additions that give or read one.
    exact = Counter(type(m).__name__ for m in qmodel.modules() if isinstance(m, IntegerOperation))
    assert exact == {"IntegerConvolution": 12, "IntegerAdd": 4, "IntegerGlobalAverage": 1}
    assert qdq.explain(qmodel).recipe.from_yaml(recipe.to_yaml()) == recipe
    found = qdq.sensitivity(qmodel, [images[:8]], kinds=["activation"], bits=[8, 16], progress=False)
    assert found.find("blocks.2.relu_quantizer").bits == 16
    assert found.find("blocks.2.relu_quantizer", 8).alone_on < found.find("blocks.2.relu_quantizer").alone_on


def test_transformer_block_of_16_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = FusedBlock(32, 4).eval(), randn(3, 5, 32)
    reference = run_model(model, [x])
    eight = quantize(model, [x], recipe=EIGHT)
    qmodel, path, fidelity = deploy(model, [x], tmp_path / "m.onnx", recipe=SIXTEEN)
    assert fidelity.sqnr_db > 80
    assert sqnr_db(reference, run_model(qmodel, [x])) > sqnr_db(reference, run_model(eight, [x])) + 2
    executed = operations(optimized_graph(path))
    # MatMulNBits would round what it reads to int8.
    assert executed["MatMulNBits"] == executed["MatMulIntegerToFloat"] == executed["QGemm"] == 0
    assert executed["MatMul"] >= 4 and executed["QuantizeLinear"] == 4


def on_images(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    a, c = m.a(x), m.c(x)
    return (
        m.b(torch.cat([a, x], 1)[:, 2:6]),
        m.b(F.relu(a + c)),
        m.b(F.avg_pool2d(a, 2) * F.adaptive_avg_pool2d(c, 1)),
        m.b(F.max_pool2d(F.pad(a.permute(0, 1, 3, 2), (1, 1)), 2)),
        m.b(m.up(a)),
    )


def on_rows(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    p = m.p(x)
    return (
        m.q(F.gelu(p)),
        m.n(m.n(x)).sum(1) + m.n(x[:, 0]),  # one weight, as MatMul and as Gemm
        torch.tanh(x @ m.matrix) @ m.matrix,
        torch.softmax(p @ m.q(x).transpose(1, 2), -1) @ m.r(x),
    )


def three_linears(m: Any, x: Tensor) -> Tensor:
    return m.r(m.q(m.p(x).relu()).relu())


NETWORKS: dict[str, tuple[Callable[..., Any], Tensor, Recipe, set[str]]] = {
    "images": (
        on_images,
        IMAGE,
        SIXTEEN,
        {"Conv", "Concat", "Add", "AveragePool", "GlobalAveragePool", "Mul", "MaxPool", "Transpose", "ConvTranspose"},
    ),
    "rows": (on_rows, ROWS, dataclasses.replace(SIXTEEN, attention=True), {"MatMul", "Gemm"}),
    "vectors between 8 bits": (three_linears, VECTORS, widened("q"), {"Gemm"}),
    "integer product that gives 16 bits": (three_linears, ROWS, widened("q"), {"MatMulIntegerToFloat", "MatMul"}),
    "weights of 4 bits": (
        lambda m, x: m.q(F.gelu(m.p(x))),
        ROWS,
        dataclasses.replace(SIXTEEN, weights=QuantDescriptor(4, axis=0, narrow_range=True)),
        {"MatMul"},
    ),
    "residual in part": (
        lambda m, x: m.b(F.relu(m.b(m.a(x)) + m.c(x))),
        IMAGE,
        widened("c"),
        {"Conv", "QLinearConv", "Add"},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_run_as_simulated(name: str, tmp_path: Path) -> None:
    function, x, recipe, expected = NETWORKS[name]
    qmodel, path, fidelity = deploy(Function(function).eval(), [x], tmp_path / "m.onnx", recipe=recipe)
    assert fidelity.sqnr_db > 85
    executed = operations(optimized_graph(path))
    assert expected <= set(executed) and not {"MatMulNBits", "QGemm"} & set(executed)
    assert 16 in bits(qmodel).values()


def test_a_linear_of_one_vector(tmp_path: Path) -> None:
    qmodel = quantize(Function(lambda m, x: m.q(m.p(x))).eval(), [VECTORS[0]], recipe=SIXTEEN, dynamic_shapes="static")
    path = qdq.export_onnx(qmodel, tmp_path / "m.onnx")
    assert sqnr_db(run_model(qmodel, [VECTORS[0]]), run_file(path, [VECTORS[0]])) > 85
    assert operations(optimized_graph(path))["MatMul"] == 2


def shared(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.cat([m.a(x), m.c(x)], 1)[:, 2:6])


def test_a_shared_range_has_the_widest_of_the_widths_asked_for(tmp_path: Path) -> None:
    qmodel, _, fidelity = deploy(Function(shared).eval(), [IMAGE], tmp_path / "m.onnx", recipe=widened("a"))
    concat = qdq.explain(qmodel).find("cat")
    assert {"conv2d", "conv2d_1"} <= set(concat.shared_with) and concat.reason.endswith("; 16 bits")
    assert bits(qmodel)[str(concat.quantizer)] == bits(qmodel)["x_quantizer"] == 16
    assert fidelity.sqnr_db > 85
    narrow = quantize(
        Function(shared).eval(),
        [IMAGE],
        recipe=dataclasses.replace(SIXTEEN, overrides={"a": Override(activations=QuantDescriptor(8))}),
    )
    assert set(bits(narrow).values()) == {16}


def chain(m: Any, x: Tensor) -> Tensor:
    return m.c(F.relu(m.b(F.relu(m.a(x)))))


def test_what_an_operation_reads_and_gives_has_its_width() -> None:
    def wide(recipe: Recipe) -> set[str]:
        found = bits(quantize(Function(chain).eval(), [IMAGE], recipe=recipe))
        assert set(found) == {"x_quantizer", "relu_quantizer", "relu_quantizer_1", "c.output_quantizer"}
        return {name for name, width in found.items() if width == 16}

    assert wide(widened("b")) == {"relu_quantizer", "relu_quantizer_1"}
    # An input by its name; the first convolution reads 16 bits, and gives 8.
    assert wide(widened("x")) == {"x_quantizer"}
    eight = Override(activations=QuantDescriptor(8))
    assert wide(dataclasses.replace(SIXTEEN, overrides={"b": eight, "c": eight})) == {"x_quantizer", "relu_quantizer"}


class Biased(nn.Module):
    """The first layer has a channel of tiny weights and a large bias, whose code of step x step would not fit int32."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        with torch.no_grad():
            first.weight[1] *= 1e-5  # type: ignore[operator,index]
            first.bias.copy_(torch.tensor([0.0, 30.0, 123.456789, -1e-30]))  # type: ignore[operator,union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("first", "second", "x", "recipe"),
    [
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), IMAGE, SIXTEEN),
        (nn.Linear(8, 4), nn.Linear(4, 4), VECTORS, widened("second")),
    ],
    ids=["conv", "linear from 8 bits"],
)
def test_biases_stay_exact(first: nn.Module, second: nn.Module, x: Tensor, recipe: Recipe, tmp_path: Path) -> None:
    """ONNX Runtime rounds float biases between quantizers to int32, and lets them saturate."""
    model = Biased(first, second).eval()
    _, path, fidelity = deploy(model, [x], tmp_path / "m.onnx", recipe=recipe)
    assert fidelity.sqnr_db > 80
    arrays = initializers(path)
    stored = [n for n in onnx.load(path).graph.node if arrays.get(n.input[0], x.numpy()).dtype == "int32"]
    values = [arrays[n.input[0]].astype("float32") * arrays[n.input[1]] for n in stored]
    assert any((v == model.first.bias.detach().numpy()).all() for v in values)  # type: ignore[operator,union-attr]


def weights_of(recipe: Recipe, function: Callable[..., Tensor], x: Tensor) -> dict[str, WeightQuantizer]:
    qmodel = quantize(Function(function).eval(), [x], recipe=dataclasses.replace(recipe, reduce_range=True))
    return {name: m for name, m in qmodel.named_modules() if isinstance(m, WeightQuantizer)}


def test_weights_that_no_integer_kernel_reads_keep_their_range() -> None:
    guarded = weights_of(widened("c"), chain, IMAGE)
    # The second convolution gives what the third reads in 16 bits.
    assert [q.pairs_axis for q in guarded.values()] == [0, None, None]
    rows = weights_of(widened("q"), lambda m, x: m.q(m.p(x).relu()), ROWS)
    # MatMulIntegerToFloat reads uint8 and gives floats, which have 16 bits only then.
    assert [q.pairs_axis for q in rows.values()] == [0, None]


def test_16_bits_clip_nothing_by_default() -> None:
    x = randn(64, 8, seed=4)
    x[0, 0] = 50.0
    found = {}
    for name, recipe in {
        "auto": SIXTEEN,
        "max": dataclasses.replace(SIXTEEN, calibration="max"),
        "mse": dataclasses.replace(SIXTEEN, calibration="mse"),
        "entropy": dataclasses.replace(SIXTEEN, calibration="entropy"),
        "percentile": dataclasses.replace(SIXTEEN, calibration="percentile", percentile=99.0),
    }.items():
        qmodel = quantize(nn.Sequential(nn.Linear(8, 4)).eval(), [x], recipe=recipe)
        (quantizer,) = quantizers(qmodel).values()
        found[name] = (quantizer.hi - int(quantizer.zero_point)) * float(quantizer.step_size)
    assert found["auto"] == found["max"] == pytest.approx(50.0, rel=1e-4)
    assert found["mse"] == pytest.approx(50.0, rel=0.05) and found["entropy"] == pytest.approx(50.0, rel=0.05)
    assert found["percentile"] < 5


@pytest.mark.parametrize("symmetric", [True, False])
def test_signed_codes_of_16_bits(symmetric: bool, tmp_path: Path) -> None:
    target = dataclasses.replace(TENSORRT, name="signed", symmetric=symmetric, activation_bits=(8, 16))
    model = Function(lambda m, x: m.b(F.relu(m.a(x)))).eval()
    qmodel, path, fidelity = deploy(model, [IMAGE], tmp_path / "m.onnx", recipe=SIXTEEN, target=target)
    assert set(stored_codes(path).values()) == {"int16"} and fidelity.sqnr_db > 80
    for quantizer in quantizers(qmodel).values():
        assert (quantizer.lo, quantizer.hi) == (-32768, 32767) and repr(quantizer).startswith("AffineQuantizer(int16")
        assert not symmetric or int(quantizer.zero_point) == 0
    given = quantizers(qmodel)["x_quantizer"]
    largest = float(IMAGE.abs().max())
    assert not symmetric or float(given.step_size) == pytest.approx(largest / 32767, rel=1e-6)


def test_a_given_range_holds_with_16_bits() -> None:
    recipe = dataclasses.replace(SIXTEEN, activations=QuantDescriptor(16, amax=4.0))
    for quantizer in quantizers(quantize(Function(chain).eval(), [IMAGE], recipe=recipe)).values():
        assert float(quantizer.step_size) == pytest.approx(8 / 65535, rel=1e-6)


REFUSED: list[tuple[str, Recipe, str]] = [
    (
        "tensorrt",
        SIXTEEN,
        "^activations.num_bits=16: target 'tensorrt' takes activations of 8 bits, or in float .* 16 bits are for "
        "'onnxruntime'. See https://docs.nvidia.com",
    ),
    (
        "openvino",
        widened("a"),
        r"^overrides\['a'\].activations.num_bits=16: target 'openvino' takes activations of 8 bits, or in float",
    ),
    *(
        ("onnxruntime", Recipe(activations=QuantDescriptor(n)), f"^activations.num_bits must be 8 or 16, not {n}: ")
        for n in (2, 7, 9, 15)
    ),
]


@pytest.mark.parametrize(("target", "recipe", "message"), REFUSED)
def test_widths_that_a_target_does_not_take_are_refused(target: str, recipe: Recipe, message: str) -> None:
    model = Function(chain).eval()
    with pytest.raises(RecipeError, match=message):
        quantize(model, [IMAGE], recipe=recipe, target=target)
    with pytest.raises(RecipeError, match=message):
        qdq.recover(model, [IMAGE], lambda m: 1.0, recipe=recipe, deploy_target=target, progress=False)


def test_codes_are_far_apart_by_their_width() -> None:
    assert TensorFidelity("q", 0.1, 4, 50.0).far_apart and not TensorFidelity("q", 0.1, 3, 50.0).far_apart
    assert TensorFidelity("q", 0.1, 769, 50.0, 16).far_apart
    assert not TensorFidelity("q", 0.1, 768, 50.0, 16).far_apart


def test_onnxruntime_alone_takes_16_bits() -> None:
    assert [t.name for t in TARGETS.values() if 16 in t.activation_bits] == [ONNXRUNTIME.name]
    assert ONNXRUNTIME.activation_codes(16) == (0, 65535) and TENSORRT.activation_codes() == (-128, 127)


def test_module_replaced_operations_are_those_of_8_bits() -> None:
    qmodel: fx.GraphModule = quantize(Function(chain).eval(), [IMAGE], recipe=widened("c"))
    exact = [m for m in qmodel.modules() if isinstance(m, IntegerOperation)]
    assert len(exact) == 1 and [m.name for m in qmodel.modules() if isinstance(m, BiasQuantizer)] == [
        "a.bias_quantizer"
    ]
