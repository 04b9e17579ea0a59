"""State of `pytorch_quantization.nn.TensorQuantizer`: state dicts, checkpoints of other machines, copies, pickles."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(12345))


def make(**fields: Any) -> TensorQuantizer:
    return TensorQuantizer(QuantDescriptor(**fields))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 1)
        self.conv1._input_quantizer = TensorQuantizer()
        self.conv1._weight_quantizer = make(axis=0)

    def calibrated(self) -> Net:
        self.conv1._input_quantizer.amax = 2.0
        self.conv1._weight_quantizer.amax = np.full((3, 1, 1, 1), 0.5)
        self.conv1._input_quantizer.pre_quant_scale = 1.5
        return self


KEYS = ["conv1._input_quantizer._amax", "conv1._input_quantizer._pre_quant_scale", "conv1._weight_quantizer._amax"]


@pytest.mark.parametrize("strict", [True, False])
def test_state_dict_creates_buffers(strict: bool) -> None:
    state = Net().calibrated().state_dict()
    assert list(state) == ["conv1.weight", "conv1.bias", *KEYS]
    net = Net()
    assert net.load_state_dict(state, strict=strict) == ([], [])
    assert {k: v.tolist() for k, v in net.state_dict().items()} == {k: v.tolist() for k, v in state.items()}
    assert net.conv1._weight_quantizer.amax.shape == (3, 1, 1, 1)
    # A checkpoint from before calibration: missing keys, as torch names them.
    old = Net().state_dict()
    if strict:
        with pytest.raises(RuntimeError, match=r"conv1._input_quantizer._amax"):
            net.load_state_dict(old)
    else:
        assert net.load_state_dict(old, strict=False).missing_keys == KEYS


def test_a_state_dict_without_its_metadata_loads() -> None:
    state = dict(Net().calibrated().state_dict())
    assert Net().load_state_dict(state) == ([], [])


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_a_gpu_loads_on_a_cpu(assign: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(Net().calibrated().state_dict(), stored)
    stored.seek(0)
    state = torch.load(stored, map_location="cpu", weights_only=True)
    net = Net()
    net.load_state_dict(state, assign=assign)
    assert net.conv1._input_quantizer.amax.device.type == "cpu"
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(net.conv1._input_quantizer(x), Net().calibrated().conv1._input_quantizer(x))


# PyTorch warns that loading into a meta tensor does nothing.
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")
def test_amax_is_created_on_the_modules_own_device() -> None:
    with torch.device("meta"):
        net = Net()
    net.load_state_dict(Net().calibrated().state_dict())
    assert net.conv1._input_quantizer.amax.device.type == "meta"


def nan_state() -> tuple[nn.Module, dict[str, Tensor]]:
    model = nn.Sequential(Net(), nn.ModuleDict({"inner": make(axis=0)}), TensorQuantizer())
    nan = torch.tensor(float("nan"))
    state = {"0." + key: nan for key in (KEYS[0], KEYS[2])} | {"1.inner._amax": nan, "2._amax": torch.tensor(1.0)}
    return model, state


def test_one_warning_names_all_quantizers_that_were_never_calibrated() -> None:
    model, state = nan_state()
    for _ in range(2):
        with pytest.warns(UserWarning, match="the state dict holds NaN as amax") as caught:
            model.load_state_dict(state, strict=False)
        names = "0.conv1._input_quantizer, 0.conv1._weight_quantizer, 1.inner"
        assert [str(w.message).split(": ")[-1] for w in caught] == [names]
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="never calibrated.*: TensorQuantizer$") as caught:
        model[2].load_state_dict({"_amax": torch.tensor(float("nan"))})
    assert len(caught) == 1


def test_the_warning_where_no_whole_model_is_loaded() -> None:
    model, state = nan_state()
    renamed = {"renamed." + key: value for key, value in state.items()}
    model.register_load_state_dict_pre_hook(
        lambda module, state_dict, prefix, *rest: (
            [state_dict.__setitem__(k.removeprefix("renamed."), state_dict.pop(k)) for k in list(state_dict)] and None
        )
    )
    with pytest.warns(UserWarning, match="1.inner$") as caught:
        model.load_state_dict(renamed, strict=False)
    assert len(caught) == 1
    q = TensorQuantizer()
    with pytest.warns(UserWarning, match="never calibrated.*: part$"):
        q._load_from_state_dict({"part._amax": torch.tensor(float("nan"))}, "part.", {}, True, [], [], [])


STATES: dict[str, Any] = {
    "default": lambda: make(),
    "amax": lambda: make(amax=[[1.0], [2.0], [3.0]]),
    "axis": lambda: make(axis=1, num_bits=4),
    "learned": lambda: TensorQuantizer(QuantDescriptor(learn_amax=True, amax=0.5), if_clip=True),
    "codes": lambda: make(fake_quant=False),
    "e4m3": lambda: make(num_bits=(4, 3)),
    "histogram": lambda: TensorQuantizer(QuantDescriptor(calib_method="histogram"), if_calib=True),
    "max": lambda: TensorQuantizer(if_calib=True),
    "disabled": lambda: TensorQuantizer(disabled=True),
    "off": lambda: TensorQuantizer(if_quant=False),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("used", [False, True])
def test_deepcopy_and_pickle_in_every_state(name: str, used: bool, x: Tensor) -> None:
    q = STATES[name]()
    if used:
        q.pre_quant_scale = 0.5
        out = q(x.requires_grad_())
        if out.requires_grad and name != "disabled":
            out.sum().backward()
    saved = io.BytesIO()
    torch.save(q, saved)
    saved.seek(0)
    copies = [copy.deepcopy(q), pickle.loads(pickle.dumps(q)), torch.load(saved, weights_only=False)]
    expected = q(x)
    for again in copies:
        assert torch.equal(again(x), expected)
        assert repr(again) == repr(q)
        assert again.state_dict().keys() == q.state_dict().keys()
        if again._calibrator is not None and q._if_calib:
            method = ("percentile",) if name == "histogram" else ()
            assert torch.equal(again._calibrator.compute_amax(*method), q._calibrator.compute_amax(*method))
