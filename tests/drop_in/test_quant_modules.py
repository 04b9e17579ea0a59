"""pytorch_quantization.quant_modules: the global replacement, as code in the field uses it, and always undone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pytorch_quantization import nn as quant_nn
from pytorch_quantization import quant_modules
from pytorch_quantization.quant_modules import QuantModuleReplacementHelper
from qdq.nn import dequantize_modules, quantize_modules

REPLACED = (
    *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    *("Linear", "LSTM", "LSTMCell", "AvgPool1d", "AvgPool2d", "AvgPool3d"),
    *("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"),
)
ORIGINAL = dict(vars(nn))


def replaced() -> dict[str, Any]:
    """What differs from torch.nn as it was."""
    assert vars(nn).keys() == ORIGINAL.keys()
    return {name: value for name, value in vars(nn).items() if value is not ORIGINAL[name]}


def all_but(*names: str) -> dict[str, Any]:
    return {name: getattr(quant_nn, f"Quant{name}") for name in REPLACED if name not in names}


class Net(nn.Module):
    """Written without a thought of quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.pool = nn.MaxPool2d(2)
        self.avg = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.avg(self.pool(torch.relu(self.conv(x)))).flatten(1))


class MyLinear(quant_nn.QuantLinear):
    pass


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    assert replaced() == {}
    try:
        yield
        assert replaced() == {}, "a test left torch.nn changed"
    finally:
        quant_modules.deactivate()


def test_initialize_replaces_15_classes_and_deactivate_puts_them_back() -> None:
    quant_modules.initialize()
    assert replaced() == all_but() and len(REPLACED) == 15
    model = Net()
    quant_modules.deactivate()
    kinds = [type(module) for module in model.children()]
    assert kinds == [quant_nn.QuantConv2d, nn.MaxPool2d, quant_nn.QuantAdaptiveAvgPool2d, quant_nn.QuantLinear]
    assert model(torch.randn(1, 1, 6, 6)).shape == (1, 2)
    assert not any(isinstance(m, quant_nn.TensorQuantizer) for m in Net().modules())


def test_seeded_twins_have_the_same_weights() -> None:
    torch.manual_seed(7)
    plain = Net()
    torch.manual_seed(7)
    with quant_modules.initialize():
        quantized = Net()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), quantized.parameters(), strict=True))
    quantized.load_state_dict(plain.state_dict())


def test_a_model_is_converted_and_taken_back_while_classes_are_replaced() -> None:
    model = nn.ModuleList([Net(), nn.LSTM(3, 4), nn.LSTM(3, 4, proj_size=2)])
    with quant_modules.initialize():
        quantize_modules(model)
        assert [type(m) for m in model[1:]] == [quant_nn.QuantLSTM, ORIGINAL["LSTM"]]
        assert type(model[0].fc) is quant_nn.QuantLinear
        dequantize_modules(model)
        assert type(model[0].fc) is ORIGINAL["Linear"] and type(model[1]) is ORIGINAL["LSTM"]


def test_float_module_list() -> None:
    quant_modules.initialize(float_module_list=["Linear", "Conv2d"])
    assert replaced() == all_but("Linear", "Conv2d")
    quant_modules.deactivate()


def test_custom_quant_modules_win_over_the_list_and_the_default() -> None:
    elsewhere = SimpleNamespace(__name__="elsewhere", Linear=nn.Linear)
    quant_modules.initialize(
        float_module_list=["Linear", "Conv2d"],
        custom_quant_modules=[
            (torch.nn, "Linear", MyLinear),
            (torch.nn, "MaxPool2d", quant_nn.QuantMaxPool2d),
            (torch.nn, "Conv1d", quant_nn.QuantConv2d),
            (elsewhere, "Linear", MyLinear),
        ],
    )
    assert elsewhere.Linear is MyLinear
    assert replaced() == all_but("Conv2d") | {
        "Linear": MyLinear,
        "MaxPool2d": quant_nn.QuantMaxPool2d,
        "Conv1d": quant_nn.QuantConv2d,
    }
    quant_modules.deactivate()
    assert elsewhere.Linear is nn.Linear


def test_defect_state_accumulates() -> None:
    quant_modules.initialize()
    quant_modules.deactivate()
    quant_modules.initialize(float_module_list=["Linear"])
    assert replaced() == all_but("Linear")
    quant_modules.initialize(float_module_list=["Conv2d"])  # and without a deactivate between
    assert replaced() == all_but("Conv2d")
    quant_modules.initialize()
    assert replaced() == all_but()
    quant_modules.initialize(custom_quant_modules=[(nn, "MaxPool2d", quant_nn.QuantMaxPool2d)])
    quant_modules.initialize()
    assert "MaxPool2d" not in replaced()
    quant_modules.deactivate()


def test_once_is_enough_and_too_often_is_harmless() -> None:
    quant_modules.deactivate()
    quant_modules.initialize()
    quant_modules.initialize()
    quant_modules.deactivate()
    assert replaced() == {}
    quant_modules.deactivate()


def test_the_block_form_nests() -> None:
    with quant_modules.initialize(float_module_list=["Conv2d"]):
        assert replaced() == all_but("Conv2d")
        with quant_modules.initialize(float_module_list=["Linear"]):
            assert replaced() == all_but("Linear")
        assert replaced() == all_but("Conv2d")
        quant_modules.initialize()  # an old-style call inside is undone as well
        assert replaced() == all_but()
    assert replaced() == {}


def test_deactivate_inside_a_block_puts_everything_back_and_the_ends_do_nothing() -> None:
    with quant_modules.initialize(), quant_modules.initialize(["Linear"]):
        quant_modules.deactivate()
        assert replaced() == {}
    assert replaced() == {}


def test_defect_global_replacement_outlived_an_exception() -> None:
    def build(error: type[BaseException]) -> None:
        with quant_modules.initialize(["Linear"]), quant_modules.initialize():
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            build(error)
        assert replaced() == {}


class Frozen:
    """A module that lets nothing be replaced."""

    Linear = nn.Linear

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("frozen")


def test_all_or_nothing_where_a_replacement_fails() -> None:
    custom = [(nn, "MaxPool2d", quant_nn.QuantMaxPool2d), (Frozen(), "Linear", MyLinear)]
    for outer in ({}, all_but("Conv2d")):
        if outer:
            quant_modules.initialize(["Conv2d"])
        with pytest.raises(AttributeError, match="frozen"):
            quant_modules.initialize(custom_quant_modules=custom)
        assert replaced() == outer
    quant_modules.deactivate()


def test_the_helper_on_its_own() -> None:
    helper = QuantModuleReplacementHelper()
    helper.restore_float_modules()
    helper.prepare_state(["Linear"], [(nn, "MaxPool2d", quant_nn.QuantMaxPool2d)])
    assert replaced() == {}
    helper.apply_quant_modules()
    expected = all_but("Linear") | {"MaxPool2d": quant_nn.QuantMaxPool2d}
    assert replaced() == expected
    helper.apply_quant_modules()
    assert replaced() == expected
    helper.prepare_state()
    helper.apply_quant_modules()
    assert replaced() == all_but()
    helper.restore_float_modules()
    assert replaced() == {}
    helper.restore_float_modules()


def test_two_helpers_and_initialize() -> None:
    first, second = QuantModuleReplacementHelper(), QuantModuleReplacementHelper()
    first.prepare_state(float_module_list=["Linear"], custom_map=None)
    quant_modules.initialize()
    first.apply_quant_modules()
    second.apply_quant_modules()
    first.restore_float_modules()  # with what was nested in it
    assert replaced() == all_but()
    second.restore_float_modules()
    assert replaced() == all_but()
    quant_modules.deactivate()


def in_thread(function: Any, *args: Any) -> BaseException | None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            function(*args)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught[0] if caught else None


def test_a_second_thread_is_refused_while_the_first_has_classes_replaced() -> None:
    helper = quant_modules.initialize()
    for function in (quant_modules.initialize, quant_modules.deactivate, helper.restore_float_modules):
        error = in_thread(function)
        assert isinstance(error, RuntimeError)
        assert str(error) == (
            "classes of torch.nn are replaced by the thread 'MainThread': call deactivate() there first, or convert "
            "models one by one with qdq.nn.quantize_modules, which is safe in threads"
        )
        assert replaced() == all_but()
    quant_modules.deactivate()
    assert in_thread(quant_modules.deactivate) is None


def test_what_a_thread_left_behind_can_be_undone_by_others() -> None:
    assert in_thread(quant_modules.initialize, ["Linear"]) is None
    assert replaced() == all_but("Linear")
    with quant_modules.initialize():
        assert replaced() == all_but()
    quant_modules.deactivate()


def test_unknown_names_warn() -> None:
    message = r"classes that are not replaced anyway: MaxPool2d, Nonsense; those that are: Conv1d, .*AdaptiveAvgPool3d"
    with pytest.warns(UserWarning, match=message) as caught:
        quant_modules.initialize(float_module_list=["Linear", "Nonsense", "MaxPool2d"])
    assert caught[0].filename == __file__
    assert replaced() == all_but("Linear")
    quant_modules.deactivate()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"float_module_list": "Linear"},
            TypeError,
            r"must be a list of class names such as \['Linear'\], got 'Linear'",
        ),
        ({"float_module_list": [nn.Linear]}, TypeError, "must be a list of class names"),
        ({"custom_quant_modules": [(nn, "Linear")]}, TypeError, r"must hold tuples \(module, 'Name', Class\), got"),
        ({"custom_quant_modules": [(nn, nn.Linear, MyLinear)]}, TypeError, "must hold tuples"),
        ({"custom_quant_modules": [nn.Linear]}, TypeError, "must hold tuples"),
        ({"custom_quant_modules": [(nn, "Lineal", MyLinear)]}, ValueError, "'torch.nn' has no 'Lineal' to replace"),
    ],
)
def test_mistakes_are_refused_and_replace_nothing(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quant_modules.initialize(**arguments)
    assert replaced() == {}


def test_names_of_the_module() -> None:
    import qdq.export.readiness
    import qdq.nn.replacement

    assert quant_modules.enable_onnx_export is qdq.export.readiness.enable_onnx_export
    for name in ("initialize", "deactivate", "QuantModuleReplacementHelper"):
        assert getattr(quant_modules, name) is getattr(qdq.nn.replacement, name)
