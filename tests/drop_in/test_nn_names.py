"""The layers under the old import names, as code in the field writes them."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdq.clip
import qdq.nn
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.nn.modules import _utils
from pytorch_quantization.nn.modules._utils import QuantInputMixin, QuantMixin, pop_quant_desc_in_kwargs
from pytorch_quantization.tensor_quant import (
    QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW,
    QuantDescriptor,
)

CONVOLUTIONS = [f"{kind}{d}d" for kind in ("Conv", "ConvTranspose") for d in (1, 2, 3)]
POOLS = [f"{kind}{d}d" for kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool") for d in (1, 2, 3)]
NORMS = [f"InstanceNorm{d}d" for d in (1, 2, 3)]
# module file: (names with the prefix Quant, those that have an alias without it)
FILES = {
    "quant_linear": (["Linear"], True),
    "quant_conv": (CONVOLUTIONS, True),
    "quant_pooling": (POOLS, True),
    "quant_instancenorm": (NORMS, False),
    "quant_rnn": (["LSTM", "LSTMCell"], True),
}


@pytest.mark.parametrize("file", FILES)
def test_layers_are_in_the_package_and_in_their_file(file: str) -> None:
    module = importlib.import_module(f"pytorch_quantization.nn.modules.{file}")
    names, aliases = FILES[file]
    native = importlib.import_module("qdq.nn.lstm") if file == "quant_rnn" else qdq.nn
    for name in names:
        layer = getattr(native, f"Quant{name}")
        assert issubclass(layer, nn.RNNBase if name == "LSTM" else getattr(nn, name))
        for place in (module, quant_nn):
            assert getattr(place, f"Quant{name}") is layer
            assert f"Quant{name}" in place.__all__
            if aliases:
                assert getattr(place, name) is layer
                assert name in place.__all__
            else:
                assert not hasattr(place, name)


def test_other_names() -> None:
    from pytorch_quantization.nn import Clip, functional
    from pytorch_quantization.nn.functional import ClipFunction, clip
    from pytorch_quantization.nn.modules import clip as clip_module
    from pytorch_quantization.nn.modules import tensor_quantizer
    from pytorch_quantization.nn.modules.quant_conv import _QuantConvNd, _QuantConvTransposeNd

    assert Clip is clip_module.Clip is qdq.clip.Clip is qdq.nn.Clip
    assert clip is functional.clip is qdq.clip.clip
    assert ClipFunction is functional.ClipFunction is qdq.clip.ClipFunction
    assert TensorQuantizer is tensor_quantizer.TensorQuantizer is qdq.TensorQuantizer
    assert issubclass(quant_nn.QuantConv2d, _QuantConvNd) and issubclass(_QuantConvNd, QuantMixin)
    assert issubclass(quant_nn.ConvTranspose3d, _QuantConvTransposeNd) and issubclass(_QuantConvTransposeNd, QuantMixin)
    assert QuantMixin is _utils.QuantMixin is qdq.nn.QuantMixin
    assert QuantInputMixin is _utils.QuantInputMixin is qdq.nn.QuantInputMixin
    assert pop_quant_desc_in_kwargs is _utils.pop_quant_desc_in_kwargs


def test_exported_names_exist() -> None:
    files = ["tensor_quantizer", "clip", "_utils", *FILES]
    for path in ["nn", "nn.functional", "nn.modules", *(f"nn.modules.{file}" for file in files)]:
        module = importlib.import_module(f"pytorch_quantization.{path}")
        assert module.__all__ == sorted(set(module.__all__), key=module.__all__.index)
        assert all(hasattr(module, name) for name in module.__all__)


def test_one_import_of_the_package_reaches_every_module() -> None:
    """In a fresh process, where nothing else has imported the files."""
    lines = ["import pytorch_quantization", "modules = pytorch_quantization.nn.modules"]
    lines += [f"modules.{file}" for file in [*FILES, "tensor_quantizer", "clip", "_utils"]]
    lines += ["pytorch_quantization.nn.functional.clip", "pytorch_quantization.nn.QuantConv2d(1, 1, 1)"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True, timeout=120)


def test_a_model_in_the_old_style() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = quant_nn.Conv2d(
                3, 4, 3, padding=1, quant_desc_weight=QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL
            )
            self.pool = quant_nn.MaxPool2d(2)
            self.fc = quant_nn.QuantLinear(16, 5, quant_desc_weight=QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW)
            self.residual_quantizer = quant_nn.TensorQuantizer(quant_nn.QuantConv2d.default_quant_desc_input)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.residual_quantizer(self.pool(self.conv1(x)).flatten(1)))

    model, x = Net(), torch.randn(2, 3, 4, 4)
    # The documented loops find quantizers by the end of their names.
    found = [name for name, _ in model.named_modules() if name.endswith("_quantizer")]
    assert found == [
        *("conv1._input_quantizer", "conv1._weight_quantizer", "pool._input_quantizer"),
        *("fc._input_quantizer", "fc._weight_quantizer", "residual_quantizer"),
    ]
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in modules:
        if name.endswith("_quantizer"):
            module.enable_calib()
            module.disable_quant()
    model(x)
    for name, module in modules:
        if name.endswith("_quantizer"):
            module.load_calib_amax()
            module.disable_calib()
            module.enable_quant()
    keys = {key for key in model.state_dict() if key.endswith("_amax")}
    assert keys == {f"{name}._amax" for name in found}
    expected = model(x)
    restored = Net()
    restored.load_state_dict(model.state_dict())
    assert torch.equal(restored(x), expected)


def test_defaults_set_as_documented() -> None:
    """Histogram calibration for the inputs of convolutions, and back again."""
    before = quant_nn.QuantConv2d.default_quant_desc_input
    try:
        quant_nn.QuantConv2d.set_default_quant_desc_input(QuantDescriptor(calib_method="histogram"))
        assert type(quant_nn.Conv2d(1, 1, 1).input_quantizer._calibrator).__name__ == "HistogramCalibrator"
        assert type(quant_nn.Conv1d(1, 1, 1).input_quantizer._calibrator).__name__ == "MaxCalibrator"
        assert type(quant_nn.QuantLinear(1, 1).input_quantizer._calibrator).__name__ == "MaxCalibrator"
    finally:
        del quant_nn.QuantConv2d.default_quant_desc_input
    assert quant_nn.QuantConv2d.default_quant_desc_input is before
    with pytest.raises(ValueError, match="must be a QuantDescriptor"):
        quant_nn.QuantConv2d.set_default_quant_desc_weight({"num_bits": 8})  # type: ignore[arg-type]


class QuantDense(nn.Linear, _utils.QuantMixin):
    """A custom module after the published recipe."""

    default_quant_desc_input = QuantDescriptor()
    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, bias)
        quant_desc_input, quant_desc_weight = _utils.pop_quant_desc_in_kwargs(self.__class__, **kwargs)
        self.init_quantizer(quant_desc_input, quant_desc_weight)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(self._input_quantizer(input), self._weight_quantizer(self.weight), self.bias)


class QuantSwish(nn.SiLU, _utils.QuantInputMixin):
    """The same for a module without a weight."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        quant_desc_input = _utils.pop_quant_desc_in_kwargs(self.__class__, input_only=True, **kwargs)
        self.init_quantizer(quant_desc_input)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self._input_quantizer(input))


def test_custom_modules_after_the_published_recipe() -> None:
    torch.manual_seed(1)
    dense = QuantDense(3, 2, quant_desc_input=QuantDescriptor(6))
    torch.manual_seed(1)
    x = torch.randn(4, 3)
    twin = quant_nn.QuantLinear(3, 2, quant_desc_input=QuantDescriptor(6))
    twin.load_state_dict(dense.state_dict())
    assert torch.equal(dense(x), twin(x))
    assert torch.equal(pickle.loads(pickle.dumps(dense))(x), twin(x))
    QuantDense.set_default_quant_desc_weight(QuantDescriptor(5))
    assert QuantDense(3, 2).weight_quantizer.num_bits == 5
    assert quant_nn.QuantLinear(3, 2).weight_quantizer.num_bits == 8
    swish = QuantSwish(quant_desc_input=QuantDescriptor(amax=1.0))
    assert torch.equal(swish(x), nn.functional.silu(swish.input_quantizer(x)))
    with pytest.raises(TypeError, match="Unused keys: quant_desc_weight"):
        QuantSwish(quant_desc_weight=QuantDescriptor())
    with pytest.raises(TypeError, match="must be called from the __init__"):
        swish.init_quantizer(QuantDescriptor())
    with pytest.raises(ValueError, match="Only fake quantization is supported"):
        QuantDense(3, 2, quant_desc_weight=QuantDescriptor(fake_quant=False))


def test_clip_function_by_its_old_names() -> None:
    from pytorch_quantization.nn.functional import ClipFunction, clip

    x = torch.tensor([-2.0, -1.0, 0.5, 3.0], requires_grad=True)
    low, high = torch.tensor(-1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    for function in (clip, ClipFunction.apply, quant_nn.functional.clip):
        x.grad = low.grad = high.grad = None
        output = function(x, low, high)
        assert output.tolist() == [-1.0, -1.0, 0.5, 2.0]
        (output * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
        assert x.grad is not None and low.grad is not None and high.grad is not None
        assert x.grad.tolist() == [0.0, 0.0, 100.0, 0.0]
        assert (low.grad.item(), high.grad.item()) == (11.0, 1000.0)
    per_channel = clip(x, torch.full((4,), -1.0, requires_grad=True), torch.tensor(2.0))
    with pytest.raises(ValueError, match="can only be scalar"):
        per_channel.sum().backward()
