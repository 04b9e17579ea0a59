"""quantize_modules and dequantize_modules: what changes in a model, what stays, and what is refused."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qdq
from qdq import Override, QdqError, QuantDescriptor, Recipe, RecipeError, TensorQuantizer
from qdq.nn import QuantConv2d, QuantLinear, dequantize_modules, quantize_modules
from qdq.nn.conversion import QUANTIZED_CLASSES

# A module of every class that is converted, with an input that it takes and the number of quantizers it gains.
ZOO: dict[str, tuple[Any, Any, int]] = {
    "Linear": (lambda: nn.Linear(4, 3), lambda: torch.randn(2, 4), 2),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 3), lambda: torch.randn(2, 2, 8), 2),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), lambda: torch.randn(2, 2, 5, 5), 2),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda: torch.randn(1, 2, 4, 4, 4), 2),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 3), lambda: torch.randn(2, 2, 8), 2),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 3), lambda: torch.randn(2, 2, 5, 5), 2),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), lambda: torch.randn(1, 2, 4, 4, 4), 2),
    "LSTM": (lambda: nn.LSTM(4, 3, 2, bidirectional=True), lambda: torch.randn(5, 2, 4), 8),
    "LSTMCell": (lambda: nn.LSTMCell(4, 3), lambda: torch.randn(2, 4), 2),
    "GRU": (lambda: nn.GRU(4, 3), lambda: torch.randn(5, 2, 4), 2),
    "Embedding": (lambda: nn.Embedding(6, 3), lambda: torch.tensor([[0, 5], [2, 2]]), 1),
    "MultiheadAttention": (lambda: SelfAttention(), lambda: torch.randn(2, 5, 8), 12),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), lambda: torch.randn(2, 2, 8), 1),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), lambda: torch.randn(2, 2, 6, 6), 1),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), lambda: torch.randn(1, 2, 4, 4, 4), 1),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(2), lambda: torch.randn(2, 2, 8), 1),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(1), lambda: torch.randn(2, 2, 6, 6), 1),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(1), lambda: torch.randn(1, 2, 4, 4, 4), 1),
}


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.blocks = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.up(torch.relu(self.norm(self.conv(x)))))
        return self.head(self.blocks(x.flatten(1)))


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in tensors(v)]


def quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TensorQuantizer)}


def test_the_zoo_holds_every_class_that_is_converted() -> None:
    assert set(ZOO) == {c.__name__ for c in QUANTIZED_CLASSES}
    assert not {nn.MaxPool2d, nn.InstanceNorm2d, nn.BatchNorm2d} & set(QUANTIZED_CLASSES)
    for float_class, quantized in QUANTIZED_CLASSES.items():
        base = nn.RNNBase if float_class in (nn.LSTM, nn.GRU) else float_class
        assert issubclass(quantized, base) and quantized.__name__ == f"Quant{float_class.__name__}"


@pytest.mark.parametrize("name", ZOO)
def test_there_and_back(name: str) -> None:
    torch.manual_seed(0)
    build, example, count = ZOO[name]
    model, x = build().eval(), example()
    before, expected, keys = copy.deepcopy(model), tensors(model(x)), list(model.state_dict())
    module = model.attention if name == "MultiheadAttention" else model
    parameters = dict(model.named_parameters())

    assert quantize_modules(model) is model
    assert type(module) is QUANTIZED_CLASSES[getattr(nn, name)]
    found = quantizers(model)
    assert len(found) == count
    assert list(model.state_dict()) == keys
    assert all(p is parameters[n] for n, p in model.named_parameters())
    simulated = tensors(model(x))
    assert not all(torch.equal(a, b) for a, b in zip(simulated, expected, strict=True))
    for a, b in zip(simulated, expected, strict=True):
        torch.testing.assert_close(a, b, atol=0.1, rtol=0.1)
    for quantizer in found.values():
        quantizer.disable()
    for a, b in zip(tensors(model(x)), expected, strict=True):
        torch.testing.assert_close(a, b)

    assert dequantize_modules(model) is model
    assert type(module) is getattr(nn, name)
    assert quantizers(model) == {}
    assert vars(module).keys() == vars(before.attention if name == "MultiheadAttention" else before).keys()
    assert list(model.state_dict()) == keys and [n for n, _ in model.named_modules()] == [
        n for n, _ in before.named_modules()
    ]
    assert all(torch.equal(a, b) for a, b in zip(tensors(model(x)), expected, strict=True))


def test_converted_modules_compute_what_constructed_ones_do() -> None:
    torch.manual_seed(1)
    model, x = Net().eval(), torch.randn(2, 2, 6, 6)
    built = QuantConv2d(2, 4, 3, padding=1)
    built.load_state_dict(model.conv.state_dict())
    quantize_modules(model)
    assert torch.equal(model.conv(x), built(x))
    assert str(model.conv) == str(built)


def test_identity_hooks_optimizers_sharing_and_flags_stay() -> None:
    model = Net()
    model.head.eval()
    model.blocks[2] = model.blocks[0]  # registered twice
    model.head.weight = nn.Parameter(model.blocks[0].weight[:3].detach().clone())
    model.blocks[0].weight.requires_grad_(False)
    called: list[str] = []
    model.conv.register_forward_hook(lambda *_: called.append("hook"))
    model.conv.register_forward_pre_hook(lambda *_: called.append("pre"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modules = dict(model.named_modules(remove_duplicate=False))
    quantize_modules(model)
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert model.blocks[0] is model.blocks[2] and not model.blocks[0].weight.requires_grad
    assert model.conv.training and model.conv._input_quantizer.training
    assert not model.head.training and not model.head._input_quantizer.training
    before = model.conv.weight.detach().clone()
    model(torch.randn(4, 2, 6, 6)).sum().backward()
    optimizer.step()
    assert called == ["pre", "hook"]
    assert not torch.equal(model.conv.weight, before)


def test_tied_parameters_stay_tied() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    model["out"].weight = model["table"].weight
    quantize_modules(model)
    assert model["out"].weight is model["table"].weight
    assert model["out"]._weight_quantizer is not model["table"]._weight_quantizer


def test_state_dicts_pass_both_ways_and_copies_are_quantized() -> None:
    torch.manual_seed(2)
    model, x = Net().eval(), torch.randn(2, 2, 6, 6)
    quantize_modules(model)
    with qdq.calibrating(model):
        model(x)
    assert "conv._input_quantizer._amax" in model.state_dict()
    again = quantize_modules(Net().eval())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), model(x))
    assert list(dequantize_modules(model).state_dict()) == list(Net().state_dict())


def test_calling_twice_is_harmless() -> None:
    model = quantize_modules(Net())
    first = quantizers(model)
    first["conv._input_quantizer"].amax = 2.0
    quantize_modules(model)
    assert quantizers(model) == first
    dequantize_modules(dequantize_modules(model))
    assert quantizers(model) == {}


def test_a_root_that_is_itself_a_linear() -> None:
    model = nn.Linear(4, 4)
    assert quantize_modules(model) is model and type(model) is QuantLinear
    assert type(dequantize_modules(model)) is nn.Linear
    assert type(quantize_modules(nn.Linear(4, 4), Recipe(exclude=["weight"]))) is nn.Linear


def test_modules_that_were_built_quantized_become_float() -> None:
    model = dequantize_modules(nn.Sequential(QuantLinear(3, 3), nn.ReLU()))
    assert type(model[0]) is nn.Linear and list(model.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    model = quantize_modules(Net().eval().to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(1, 2, 6, 6, dtype=dtype)).dtype == dtype


def test_quantizers_go_to_the_device_of_the_module_or_of_the_one_around_it() -> None:
    model = quantize_modules(Net().to("meta"))
    # amax would lose its value on meta, so quantizers wait elsewhere until the model has a device.
    assert quantizers(model)["head._input_quantizer"]._device.type == "cpu"
    if torch.cuda.is_available():
        model = quantize_modules(Net().cuda(), Recipe(activations=QuantDescriptor(amax=2.0)))
        assert {q._device.type for q in quantizers(model).values()} == {"cuda"}
        assert model.pool._input_quantizer.amax.device.type == "cuda"


def test_class_defaults_are_what_no_recipe_means() -> None:
    default = QuantConv2d.default_quant_desc_input
    try:
        QuantConv2d.set_default_quant_desc_input(QuantDescriptor(num_bits=5, calib_method="histogram"))
        model = quantize_modules(Net())
    finally:
        QuantConv2d.default_quant_desc_input = default
    assert model.conv._input_quantizer.num_bits == 5 and model.conv._weight_quantizer.num_bits == 8
    assert model.head._input_quantizer.num_bits == 8
    assert model.conv._weight_quantizer.axis == 0 and model.up._weight_quantizer.axis == 1


def test_a_recipe_gives_the_descriptors() -> None:
    recipe = Recipe(
        weights=QuantDescriptor(num_bits=4, axis=0, narrow_range=True),
        activations=QuantDescriptor(num_bits=4, unsigned=True, calib_method="histogram"),
        overrides={
            "blocks": {"weights": {"num_bits": 3, "axis": None}},
            "blocks.2": {"activations": {"num_bits": [4, 3]}},
            "up.weight": Override(activations=QuantDescriptor(num_bits=16)),
        },
        exclude=("he*",),
    )
    model = quantize_modules(Net(), recipe)
    found = quantizers(model)
    assert not any(name.startswith("head") for name in found) and type(model.head) is nn.Linear
    inputs = {name: q for name, q in found.items() if name.endswith("_input_quantizer")}
    assert {n: (q.num_bits, q.unsigned) for n, q in inputs.items()} == {
        "conv._input_quantizer": (4, True),
        "pool._input_quantizer": (4, True),
        "up._input_quantizer": (16, False),
        "blocks.0._input_quantizer": (4, True),
        "blocks.2._input_quantizer": ((4, 3), False),
    }
    assert type(inputs["conv._input_quantizer"]._calibrator).__name__ == "HistogramCalibrator"
    weights = {n: (q.num_bits, q.axis, q.narrow_range) for n, q in found.items() if n not in inputs}
    assert weights == {
        "conv._weight_quantizer": (4, 0, True),
        "up._weight_quantizer": (4, 1, True),  # the output channel of a transposed convolution
        "blocks.0._weight_quantizer": (3, None, True),
        "blocks.2._weight_quantizer": (3, None, True),
    }


def test_a_fixed_amax_is_not_calibrated() -> None:
    model = quantize_modules(Net(), Recipe(overrides={"conv": {"activations": {"amax": 6.0}}}))
    with qdq.calibrating(model):
        model(torch.randn(2, 2, 6, 6))
    assert float(model.conv._input_quantizer.amax) == 6.0
    assert model.conv._weight_quantizer.amax.shape == (4, 1, 1, 1)


def test_attention_is_one_unit_and_its_products_may_stay_in_float() -> None:
    model = quantize_modules(SelfAttention(), Recipe(attention=False))
    disabled = {name.rpartition(".")[2] for name, q in quantizers(model).items() if q.disabled}
    assert disabled == {"_q_quantizer", "_k_quantizer", "_v_quantizer", "_probs_quantizer"}
    assert type(quantize_modules(SelfAttention(), Recipe(exclude=["attention"])).attention) is nn.MultiheadAttention
    with pytest.raises(RecipeError, match="pattern 'attention.out_proj' matches no module"):
        quantize_modules(SelfAttention(), Recipe(exclude=["attention.out_proj"]))


def test_shared_modules_answer_to_all_their_paths() -> None:
    model = Net()
    model.blocks[2] = model.blocks[0]
    quantize_modules(model, Recipe(exclude=["blocks.2"]))
    assert type(model.blocks[0]) is nn.Linear


def encoder() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval(), torch.randn(2, 5, 8), padding


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # what the float model uses
@pytest.mark.parametrize("exclude", [(), ("layers.*.self_attn",), ("layers.1",)])
def test_the_fused_encoder_does_not_walk_around_the_quantizers(exclude: tuple[str, ...]) -> None:
    model, x, padding = encoder()
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
    quantize_modules(model, Recipe(exclude=exclude))
    with qdq.calibrating(model) as progress:  # strict: every quantizer must see data
        model(x, src_key_padding_mask=padding)
    assert progress.unseen == []
    with torch.no_grad():
        simulated = model(x, src_key_padding_mask=padding)
    kept = ~padding
    assert not torch.equal(simulated[kept], expected[kept])
    torch.testing.assert_close(simulated[kept], expected[kept], atol=0.2, rtol=0.2)
    assert model.layers[0].activation_relu_or_gelu == 0 and not model.use_nested_tensor
    dequantize_modules(model)
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [2, 2] and model.use_nested_tensor is True
    assert vars(model.layers[0]).keys() == vars(encoder()[0].layers[0]).keys()
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=padding), expected)


def test_an_encoder_left_in_float_keeps_its_fused_path() -> None:
    model, _, _ = encoder()
    quantize_modules(model, Recipe(exclude=["layers"]))
    assert model.layers[0].activation_relu_or_gelu == 2 and model.use_nested_tensor


class MyLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight + 1, self.bias)


def test_what_is_left_in_float_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict(
        {
            "mine": MyLinear(2, 2),
            "wrapped": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "patched": nn.Linear(2, 2),
            "projected": nn.LSTM(3, 4, proj_size=2),
            "sparse": nn.Embedding(3, 2, sparse=True),
            "excluded": MyLinear(2, 2),
            "plain": nn.Linear(2, 2),
        }
    )
    model["patched"].forward = lambda input: input
    types = {name: type(m) for name, m in model.items()}
    with caplog.at_level(logging.WARNING, "qdq"):
        quantize_modules(model, Recipe(exclude=["excluded"]))
    assert {n for n, m in model.items() if type(m) is not types[n]} == {"plain"}
    (line,) = caplog.messages
    assert line == (
        "left in float: mine (MyLinear is a subclass with a forward that is not known); "
        "wrapped (it is parametrized: use remove_parametrizations first); "
        "patched (its forward was replaced on the instance); "
        "projected (proj_size is not supported); "
        "sparse (sparse gradients cannot pass a quantizer)"
    )


def test_the_old_weight_norm_by_hooks_is_converted() -> None:
    torch.manual_seed(4)
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.utils.weight_norm(nn.Linear(4, 4))
    x = torch.randn(2, 4)
    expected = model(x)
    quantize_modules(model)
    torch.testing.assert_close(model(x), expected, atol=0.1, rtol=0.1)
    assert not torch.equal(model(x), expected)


def test_quantizers_without_a_float_class_remain_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"add": qdq.nn.QuantAdd(), "fc": QuantLinear(2, 2)})
    with caplog.at_level(logging.WARNING, "qdq"):
        dequantize_modules(model)
    (line,) = caplog.messages
    assert line.endswith("without a float class remain: add._input_quantizer, add._other_quantizer")
    assert type(model["fc"]) is nn.Linear


def test_lazy_modules_are_refused_until_they_have_run_or_are_excluded() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2))
    with pytest.raises(QdqError, match="module '1' is a LazyLinear that has not run yet: run the model once"):
        quantize_modules(model)
    assert type(model[0]) is nn.Linear
    quantize_modules(model, Recipe(exclude=["1"]))
    model(torch.randn(1, 3))
    assert type(quantize_modules(model)[1]) is QuantLinear


def test_an_error_half_way_leaves_the_model_in_float() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    default = qdq.nn.QuantMultiheadAttention.default_quant_desc_input
    try:
        qdq.nn.QuantMultiheadAttention.set_default_quant_desc_input(QuantDescriptor(axis=0))
        with pytest.raises(ValueError, match="must be per tensor"):
            quantize_modules(model)
    finally:
        qdq.nn.QuantMultiheadAttention.default_quant_desc_input = default
    assert type(model[0]) is nn.Linear and type(model[1]) is nn.MultiheadAttention and quantizers(model) == {}


def test_arguments_of_other_kinds_are_refused() -> None:
    for convert in (quantize_modules, dequantize_modules):
        with pytest.raises(QdqError, match="model must be a torch.nn.Module, not ndarray"):
            convert(np.zeros(3))  # type: ignore[type-var]
    with pytest.raises(RecipeError, match="recipe must be a qdq.Recipe, not dict; Recipe.load reads files"):
        quantize_modules(Net(), {})  # type: ignore[arg-type]
    model = Net()
    with pytest.raises(RecipeError, match=r"pattern 'haed' matches no module of the model; .*\['conv', 'norm', 'pool'"):
        quantize_modules(model, Recipe(exclude=["haed"]))
    assert quantizers(model) == {}


def test_torchscript_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(QdqError, match="model is TorchScript, whose modules cannot be converted"):
        quantize_modules(scripted)


def test_fields_of_a_recipe_without_meaning_for_modules_are_told(caplog: pytest.LogCaptureFixture) -> None:
    overrides = {"0": {"calibration": "max"}}
    recipe = qdq.Recipe(calibration="mse", weight_calibration="mse", overrides=overrides)
    quantize_modules(nn.Sequential(nn.Linear(2, 2)), recipe)
    assert "does not use these fields of the recipe: calibration, weight_calibration, calibration of ov" in caplog.text
    caplog.clear()
    quantize_modules(nn.Sequential(nn.Linear(2, 2)), qdq.Recipe())
    assert caplog.text == ""


def test_quantizers_that_the_user_added_remain(caplog: pytest.LogCaptureFixture) -> None:
    model = quantize_modules(nn.Sequential(nn.Linear(2, 2)))
    model[0].result = TensorQuantizer()
    dequantize_modules(model)
    assert type(model[0]) is nn.Linear and isinstance(model[0].result, TensorQuantizer)
    assert "0.result" in caplog.text


@pytest.mark.parametrize("fields", [{"exclude": ("",)}, {"overrides": {"": float}}])
def test_empty_patterns_are_refused(fields: Any) -> None:
    with pytest.raises(RecipeError, match="holds an empty pattern"):
        Recipe(**fields)
