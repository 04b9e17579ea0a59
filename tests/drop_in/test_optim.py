"""`pytorch_quantization.optim.helper`: parameters by pattern, statement by statement of its published contract."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import qdq.nn
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.optim import helper
from pytorch_quantization.tensor_quant import QuantDescriptor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3)
        self.layer1 = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.fc = nn.Linear(3, 4)

    def names(self, parameters: Any) -> list[str]:
        known = {id(parameter): name for name, parameter in self.named_parameters()}
        return [known[id(parameter)] for parameter in parameters]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["fc"], ["fc.weight", "fc.bias"]),
        (["^conv1.weight$"], ["conv1.weight"]),
        ([r"layer\d.0"], ["layer1.0.weight", "layer1.0.bias"]),
        (["fc.bias", "conv1.bias"], ["conv1.bias", "fc.bias"]),
        (["bias", "fc"], ["conv1.bias", "layer1.0.bias", "layer1.1.bias", "fc.weight", "fc.bias"]),
        (["nothing"], []),
        ([], []),
        ("fc.bias", ["fc.bias"]),
    ],
)
def test_match_parameters(patterns: Any, expected: list[str]) -> None:
    net = Net()
    found = helper.match_parameters(net, patterns)
    assert inspect.isgenerator(found)
    found = list(found)
    assert all(isinstance(parameter, nn.Parameter) for parameter in found)
    assert net.names(found) == expected


def test_a_pattern_must_be_text() -> None:
    with pytest.raises(TypeError, match="patterns must be strings, got int"):
        list(helper.match_parameters(Net(), [1]))  # type: ignore[list-item]


def test_a_shared_parameter_goes_by_all_its_names_and_comes_once() -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    net["head"].weight = net["embedding"].weight
    for patterns in (["head"], ["embedding"], ["weight"]):
        assert [id(p) for p in helper.match_parameters(net, patterns)] == [id(net["head"].weight)]


def test_group_parameters() -> None:
    net = Net()
    groups = helper.group_parameters(net, [["conv", "layer1.0"], ["fc"]], [0.1, 0.2], [0.9, 0.8], [1e-4, 0.0])
    assert [net.names(group["params"]) for group in groups] == [
        ["conv1.weight", "conv1.bias", "layer1.0.weight", "layer1.0.bias"],
        ["fc.weight", "fc.bias"],
    ]
    rest = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    assert rest == [
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
        {"lr": 0.2, "momentum": 0.8, "weight_decay": 0.0},
    ]
    assert [set(group) for group in helper.group_parameters(net, [["fc"]])] == [{"params"}]
    assert set(helper.group_parameters(net, [["fc"]], weight_decays=[0.5])[0]) == {"params", "weight_decay"}
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize("patterns", [["conv", "fc"], [["conv"], "fc"], [("conv",)], "conv", [None]])
def test_groups_must_be_a_list_of_lists(patterns: Any) -> None:
    with pytest.raises(TypeError, match="must be list of list of patterns"):
        helper.group_parameters(Net(), patterns)


@pytest.mark.parametrize("option", ["lrs", "momentums", "weight_decays"])
@pytest.mark.parametrize("values", [[], [0.1], [0.1, 0.2, 0.3]])
def test_options_must_match_the_groups(option: str, values: list[float]) -> None:
    with pytest.raises(TypeError, match=f"{option} must match"):
        helper.group_parameters(Net(), [["conv"], ["fc"]], **{option: values})


def test_freeze_parameters() -> None:
    net = Net()
    helper.freeze_parameters(net, ["conv1", r"fc\.bias"])
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["conv1.weight", "conv1.bias", "fc.bias"]


# -- weights replaced by their quantized values ----------------------------------------------------

LAYERS: dict[str, Any] = {
    "linear": lambda: quant_nn.QuantLinear(5, 3),
    "4 bits": lambda: quant_nn.QuantLinear(5, 3, quant_desc_weight=QuantDescriptor(4, axis=0, narrow_range=True)),
    "conv": lambda: quant_nn.QuantConv2d(2, 3, 3),
    "transposed": lambda: quant_nn.QuantConvTranspose1d(2, 3, 3),
    "lstm": lambda: quant_nn.QuantLSTM(3, 4, num_layers=2, bidirectional=True),
    "cell": lambda: quant_nn.QuantLSTMCell(3, 4),
    "gru": lambda: qdq.nn.QuantGRU(3, 4),
    "attention": lambda: qdq.nn.QuantMultiheadAttention(4, 2),
    "attention of other sizes": lambda: qdq.nn.QuantMultiheadAttention(4, 2, kdim=3, vdim=5),
}
INPUTS: dict[str, Any] = {
    "conv": (1, 2, 5, 5),
    "transposed": (1, 2, 5),
    "lstm": (2, 1, 3),
    "cell": (2, 3),
    "gru": (2, 1, 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_quant_weight_inplace(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    model = nn.Sequential(layer, nn.Linear(2, 2))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    if name == "attention of other sizes":
        x: tuple[Any, ...] = (torch.randn(3, 1, 4), torch.randn(2, 1, 3), torch.randn(2, 1, 5))
    elif name == "attention":
        x = (torch.randn(3, 1, 4),) * 3
    else:
        x = (torch.randn(INPUTS.get(name, (2, 5))),)

    def output() -> torch.Tensor:
        result = layer(*x)
        return result[0] if isinstance(result, tuple) else result

    expected = output()
    assert helper.quant_weight_inplace(model) is None
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed == {key for key in before if key.startswith("0.") and "weight" in key}
    assert all(p.requires_grad for p in model.parameters())
    # The weights now hold what the quantizers gave: they change nothing more, and can be left out.
    torch.testing.assert_close(output(), expected)
    after = {key: p.detach().clone() for key, p in model.named_parameters()}
    helper.quant_weight_inplace(model)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), after[key], rtol=1e-6, atol=0)
    for key, module in layer.named_modules():
        if "weight_quantizer" in key and isinstance(module, quant_nn.TensorQuantizer):
            module.disable()
    torch.testing.assert_close(output(), expected)


def test_quant_weight_inplace_by_value() -> None:
    layer = quant_nn.QuantLinear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.304, -1.0]]))
    layer.weight_quantizer.amax = [[1.27]]
    helper.quant_weight_inplace(layer)
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[0.30, -1.0]]))


def test_quant_weight_inplace_refuses() -> None:
    layer = quant_nn.QuantLinear(2, 2)
    layer._weight_quantizer = quant_nn.TensorQuantizer(QuantDescriptor(fake_quant=False))
    with pytest.raises(ValueError, match="the weight quantizer of '0' gives codes"):
        helper.quant_weight_inplace(nn.Sequential(layer))
    computed = parametrizations.weight_norm(quant_nn.QuantLinear(2, 2))
    with pytest.raises(TypeError, match="the weight of '0' is computed"):
        helper.quant_weight_inplace(nn.Sequential(computed))
    strange = nn.Identity()
    strange._weight_quantizer = quant_nn.TensorQuantizer()
    with pytest.raises(AttributeError, match=r"'0' \(Identity\) has a weight quantizer but no 'weight'"):
        helper.quant_weight_inplace(nn.Sequential(strange))
