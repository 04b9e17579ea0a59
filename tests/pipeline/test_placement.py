"""Which tensors are quantized, with whom they share a quantizer, and what `explain` says about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import qdq
from pipeline.helpers import quantize, randn
from qdq.affine_quantizer import AffineQuantizer
from qdq.graph.explanation import Entry

IMAGE = randn(2, 4, 8, 8, seed=1)
ROWS = randn(2, 5, 8, seed=2)


class Function(nn.Module):
    """A network of a few fixed layers around a function of them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.p, self.q, self.r = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.scale = nn.LayerNorm(8), nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def placed(function: Callable[..., Any], x: Tensor = IMAGE, **options: Any) -> fx.GraphModule:
    return quantize(Function(function).eval(), [x], **options)


def quantizers(qmodel: fx.GraphModule) -> dict[str, AffineQuantizer]:
    return {n: m for n, m in qmodel.named_modules() if isinstance(m, AffineQuantizer)}


def entry(qmodel: fx.GraphModule, name: str) -> Entry:
    return qdq.explain(qmodel).find(name)


def activation(qmodel: fx.GraphModule, operation: str) -> list[Entry]:
    return [e for e in qdq.explain(qmodel) if e.role == "activation" and e.operation == operation]


def test_consumers_of_one_tensor_share_its_quantizer() -> None:
    qmodel = placed(lambda m, x: (m.a(x), m.b(x), m.c(x)))
    found = entry(qmodel, "x")
    assert found.quantized and found.quantizer == "x_quantizer"
    assert sorted(found.readers) == ["conv2d", "conv2d_1", "conv2d_2"]
    assert len(quantizers(qmodel)) == 4  # the input and three outputs
    calls = [n for n in qmodel.graph.nodes if n.op == "call_module" and n.target == "x_quantizer"]
    assert len(calls) == 1 and len(calls[0].users) == 3


def test_a_chain_has_one_quantizer_between_two_layers() -> None:
    qmodel = placed(lambda m, x: m.c(m.b(m.a(x))))
    assert sorted(quantizers(qmodel)) == [
        "a.output_quantizer",
        "b.output_quantizer",
        "c.output_quantizer",
        "x_quantizer",
    ]


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "max pool": lambda y: F.max_pool2d(y, 2),
    "reshape": lambda y: y.reshape(-1, 4, 16, 4),
    "permute": lambda y: y.permute(0, 1, 3, 2),
    "transpose": lambda y: y.transpose(2, 3),
    "slice": lambda y: y[:, :, 1:5],
    "flip": lambda y: y.flip(3),
    "nearest": lambda y: F.interpolate(y, scale_factor=2.0),
    "zero padding": lambda y: F.pad(y, (1, 1, 0, 0)),
    "pixel shuffle": lambda y: F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2),
    "squeeze": lambda y: y.unsqueeze(1).squeeze(1),
    "roll": lambda y: y.roll(1, 2),
    "chunk": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
    "dropout": lambda y: F.dropout(y, 0.5, False),
}


@pytest.mark.parametrize("name", MOVES)
def test_operations_that_move_values_do_not_end_a_region(name: str) -> None:
    move = MOVES[name]
    qmodel = placed(lambda m, x: m.b(move(m.a(x))))
    assert sorted(quantizers(qmodel)) == ["a.output_quantizer", "b.output_quantizer", "x_quantizer"]
    assert all(e.quantized for e in qdq.explain(qmodel) if e.role == "activation")
    # The values are on the grid already, so that the simulation does not round them again.
    quantizer = quantizers(qmodel)["a.output_quantizer"]
    with torch.no_grad():
        moved = move(quantizer(randn(2, 4, 8, 8, seed=5)))
        assert torch.equal(quantizer(moved), moved)
        assert quantizer(moved, on_grid=True) is moved


def test_padding_with_another_constant_ends_a_region() -> None:
    qmodel = placed(lambda m, x: m.b(F.pad(m.a(x), (1, 1, 0, 0), value=1.5)))
    assert len(quantizers(qmodel)) == 4
    assert entry(qmodel, "b.output_quantizer").quantized


CLIPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda y: F.hardtanh(y, -0.5, 0.5),
    "clamp": lambda y: y.clamp(-0.25, 1.0),
    "clamp min": lambda y: y.clamp(min=0.0),
}


@pytest.mark.parametrize("name", CLIPS)
def test_the_quantizer_sits_behind_a_clip_and_not_before_it(name: str) -> None:
    qmodel = placed(lambda m, x: m.b(CLIPS[name](m.a(x))))
    assert len(quantizers(qmodel)) == 3
    before = activation(qmodel, "conv2d")[0]
    assert not before.quantized
    assert before.reason.startswith("quantized behind ") and before.reason.endswith("which the runtime fuses with it")
    behind = next(q for n, q in quantizers(qmodel).items() if not n.startswith(("x_", "b.")))
    low = (behind.lo - int(behind.zero_point)) * float(behind.step_size)
    assert low >= {"hardtanh": -0.51, "clamp": -0.26}.get(name, 0.0)


def forked(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y.relu()) + m.c(y)


def feed_forward(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return y + m.q(m.p(y).relu())


def test_a_clip_beside_another_reader_leaves_the_quantizer_before_it() -> None:
    qmodel = placed(forked)
    assert activation(qmodel, "conv2d")[0].quantized and activation(qmodel, "relu")[0].quantized


def test_residual_addition_joins_two_ranges_into_a_third() -> None:
    qmodel = placed(lambda m, x: m.b(F.relu(m.a(x) + x)))
    assert activation(qmodel, "relu")[0].reason.startswith("read by conv2d")
    (reader,) = activation(qmodel, "conv2d")[0].readers
    assert reader == activation(qmodel, "add")[0].tensor
    assert len(quantizers(qmodel)) == 4
    assert set(entry(qmodel, "x").readers) == {"conv2d", reader}
    assert activation(qmodel, "add")[0].reason == "quantized behind relu, which the runtime fuses with it"


def test_an_addition_that_nothing_reads_as_codes_stays_in_float() -> None:
    qmodel = placed(lambda m, x: m.a(x) + x)
    assert activation(qmodel, "add")[0].reason.startswith("add in float: no integer operation reads it")


def test_concatenated_tensors_share_where_their_clips_allow() -> None:
    """Equal bounds: one range makes the concatenation a copy."""
    qmodel = placed(lambda m, x: m.c(torch.cat([m.a(x).relu(), m.b(x).relu()], 1)[:, 2:6]))
    joined = activation(qmodel, "cat")[0]
    assert {activation(qmodel, "relu")[i].quantizer for i in (0, 1)} == {joined.quantizer}
    assert {"relu", "relu_1", "slice_1"} <= set(joined.shared_with)
    assert len(quantizers(qmodel)) == 3
    assert joined.quantizer in str(qdq.explain(qmodel)) and "one quantizer with" in str(qdq.explain(qmodel))


def test_a_clip_with_other_bounds_keeps_its_own_quantizer_in_a_concatenation() -> None:
    """A shared range would not imply the clip, and the convolution before it would be computed in float."""
    qmodel = placed(lambda m, x: m.c(torch.cat([m.a(x).relu(), m.b(x)], 1)[:, 2:6]))
    relu, plain = activation(qmodel, "relu")[0], activation(qmodel, "conv2d")[1]
    joined = activation(qmodel, "cat")[0]
    assert relu.quantizer != joined.quantizer and plain.quantizer == joined.quantizer
    found = quantizers(qmodel)[relu.quantizer or ""]
    assert int(found.zero_point) == 0


def test_a_concatenation_with_a_constant_or_of_float_tensors_stays_in_float() -> None:
    qmodel = placed(lambda m, x: torch.cat([m.norm(m.p(x)), m.norm(m.q(x))], 1), ROWS)
    assert not activation(qmodel, "cat")[0].quantized
    assert activation(qmodel, "cat")[0].reason.startswith("concat in float: no integer operation reads it")


def test_the_residual_of_a_layer_norm_is_read_in_float_while_the_linear_reads_codes() -> None:
    """The addition and the norms of a transformer keep the large values that its ranges could not hold."""
    qmodel = placed(feed_forward, ROWS)
    normed = activation(qmodel, "layer_norm")[0]
    assert normed.quantized and normed.readers == ("linear",)
    assert not activation(qmodel, "add")[0].quantized
    addition = next(n for n in qmodel.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    assert [n.op for n in addition.all_input_nodes] == ["call_function", "call_function"]


def attention(m: Any, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(m.p(x), m.q(x), m.r(x))


def test_products_of_attention_are_in_float_by_default() -> None:
    qmodel = placed(attention, ROWS)
    reasons = [e.reason for e in activation(qmodel, "matmul")]
    assert reasons == ["product of two activations: in float unless the recipe sets attention=True"] * 2
    assert list(quantizers(qmodel)) == ["x_quantizer"]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_products_of_attention_are_quantized_on_request(target: str) -> None:
    qmodel = placed(attention, ROWS, target=target, recipe=qdq.Recipe(attention=True))
    first, second = activation(qmodel, "matmul")
    readers = {e.tensor: e.readers for e in qdq.explain(qmodel) if "matmul" in str(e.readers)}
    assert sorted(r for rs in readers.values() for r in rs) == ["matmul", "matmul", "matmul_1", "matmul_1"]
    assert "softmax" in readers
    assert not (first.quantized or second.quantized)


def test_an_unknown_operation_stays_in_float_and_is_explained() -> None:
    qmodel = placed(lambda m, x: m.b(torch.cumsum(m.a(x), 3)))
    found = activation(qmodel, "cumsum")[0]
    # What the next convolution reads is quantized; the operation itself computes in float.
    assert found.quantized and "read by conv2d" in found.reason
    qmodel = placed(lambda m, x: torch.cumsum(m.a(x), 3))
    found = activation(qmodel, "cumsum")[0]
    assert not found.quantized and found.reason == "onnxruntime has no rule for cumsum: it stays in float"
    assert "1 in float: onnxruntime has no rule for cumsum" in qdq.explain(qmodel).summary()


def test_a_weight_computed_from_data_is_explained() -> None:
    qmodel = placed(lambda m, x: F.linear(m.p(x), m.q(x)[0]), ROWS)
    assert entry(qmodel, "linear_2").reason == "its weight is computed from data"


def test_an_addition_of_a_constant_is_pointwise_and_in_float() -> None:
    qmodel = placed(lambda m, x: (m.a(x) + 1.0) * m.scale)
    assert not activation(qmodel, "add")[0].quantized and not activation(qmodel, "mul")[0].quantized
    scale = entry(qmodel, "scale")
    assert scale.role == "parameter" and not scale.quantized
    assert "mul" in scale.reason


def test_explanation_finds_by_tensor_quantizer_and_module() -> None:
    qmodel = placed(lambda m, x: m.b(m.a(x)))
    explanation = qdq.explain(qmodel)
    assert explanation.find("a.weight").role == "weight" and explanation.find("a.bias").role == "bias"
    assert explanation.find("a") is explanation.find("a.output_quantizer") is explanation.find("conv2d")
    assert explanation.find("a.weight").reason == "QLinearConv; needs a quantized output"
    assert explanation.find("a.bias").reason == "int32, of step input step x weight step"
    with pytest.raises(KeyError, match="no tensor or module 'z'"):
        explanation.find("z")
    assert len(explanation) == len(list(explanation)) == 7
    text = str(explanation)
    assert text.startswith("target onnxruntime") and "activations: 3 of 3 quantized" in text
    assert "weights: 2 of 2 quantized" in text and "biases: 2 of 2 quantized" in text


@pytest.mark.parametrize("function", [qdq.explain, lambda m: qdq.verify(m, "x", [IMAGE])])
def test_a_model_that_qdq_did_not_quantize_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(
        qdq.QdqError, match="expected a model that qdq.quantize returned, not a Conv2d: quantize it first"
    ):
        function(nn.Conv2d(4, 4, 3))


def test_the_explanation_holds_the_recipe() -> None:
    recipe = qdq.Recipe(exclude=("b",), algorithms=[])
    qmodel = placed(lambda m, x: m.b(m.a(x)), recipe=recipe)
    assert qdq.explain(qmodel).recipe == recipe
    assert qdq.explain(placed(lambda m, x: m.a(x))).recipe == qdq.Recipe()


def test_explain_of_quantized_modules_points_to_the_modules() -> None:
    model = qdq.nn.quantize_modules(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(qdq.QdqError, match="in this model they are modules: print"):
        qdq.explain(model)
