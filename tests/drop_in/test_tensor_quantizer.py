"""`pytorch_quantization.nn.TensorQuantizer`, statement by statement of its published contract."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pytorch_quantization import calib, tensor_quant
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.nn.modules.tensor_quantizer import TensorQuantizer as SameQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor, fake_tensor_quant, scaled_e4m3


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(12345))


def make(**fields: Any) -> TensorQuantizer:
    return TensorQuantizer(QuantDescriptor(**fields))


def fake(x: Tensor, amax: Any, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = False) -> Tensor:
    """With the descriptor's default for `narrow_range`, which is not that of the function."""
    return fake_tensor_quant(x, torch.as_tensor(amax), num_bits, unsigned, narrow_range)


# -- forward ---------------------------------------------------------------------------------------


def test_default_construction(x: Tensor) -> None:
    q = TensorQuantizer()
    assert TensorQuantizer is SameQuantizer is quant_nn.TensorQuantizer
    assert torch.equal(q(x), fake(x, x.abs().max()))
    assert torch.equal(TensorQuantizer(tensor_quant.QUANT_DESC_8BIT_PER_TENSOR)(x), q(x))
    keywords = {
        "quant_desc": QuantDescriptor(),
        "disabled": True,
        "if_quant": True,
        "if_clip": False,
        "if_calib": False,
    }
    assert TensorQuantizer(**keywords)(x) is x
    assert TensorQuantizer(QuantDescriptor(), True, True, False, False)._disabled


class Recorder(calib.MaxCalibrator):
    """Keeps what it was given."""

    def collect(self, x: Tensor) -> None:
        self.seen = x.clone()
        super().collect(x)


def test_order_of_the_stages(x: Tensor) -> None:
    q = TensorQuantizer(QuantDescriptor(learn_amax=True, amax=0.5), if_quant=False, if_clip=True, if_calib=True)
    q._calibrator = Recorder(8, None, False)
    q.pre_quant_scale = 2.0
    clipped = torch.clamp(x * 2, -0.5, 0.5)
    assert torch.equal(q(x), clipped)
    assert torch.equal(q._calibrator.seen, x * 2)  # scaled, not yet clipped
    q.enable_quant()
    assert torch.equal(q(x), fake(clipped, 0.5))
    q.disable_clip()
    assert torch.equal(q(x), fake(clipped, 0.5))  # the quantizer of a learned range clips first
    q.disable()
    q._calibrator.reset()
    assert torch.equal(q(x), x * 2)
    assert q._calibrator.compute_amax() is None
    q.enable()
    assert torch.equal(q(x), fake(clipped, 0.5))


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", [8, 5])
def test_fake_and_codes(x: Tensor, bits: int, narrow: bool, unsigned: bool) -> None:
    x = x.abs() if unsigned else x
    fields: dict[str, Any] = {"num_bits": bits, "narrow_range": narrow, "unsigned": unsigned, "amax": 0.7}
    assert torch.equal(make(**fields)(x), fake(x, 0.7, bits, unsigned, narrow))
    q = make(fake_quant=False, **fields)
    codes, scale = tensor_quant.tensor_quant(x, torch.tensor(0.7), bits, unsigned, narrow)
    assert torch.equal(q(x), codes)
    assert q.scale is not None
    assert torch.equal(q.scale, scale)


def test_e4m3(x: Tensor) -> None:
    assert torch.equal(make(num_bits=(4, 3))(x), scaled_e4m3(x, x.abs().max()))
    assert torch.equal(make(num_bits=(4, 3), axis=1)(x), scaled_e4m3(x, x.abs().amax((0, 2), keepdim=True)))


@pytest.mark.parametrize(("axis", "reduced"), [(0, (1, 2)), (1, (0, 2)), ((0, 1), (2,)), (-1, (0, 1)), ((0, 1, 2), ())])
def test_dynamic_amax(x: Tensor, axis: Any, reduced: tuple[int, ...]) -> None:
    amax = x.abs().amax(reduced, keepdim=True) if reduced else x.abs()
    q = make(axis=axis)
    found = q._get_amax(x.requires_grad_())
    assert torch.equal(found, amax)
    assert not found.requires_grad
    assert torch.equal(q(x), fake(x, amax))
    assert q.amax is None
    assert not q.state_dict()


def test_dynamic_amax_of_one_value_is_0d(x: Tensor) -> None:
    assert make()._get_amax(x).shape == ()
    assert make(axis=0)._get_amax(x[:1]).shape == ()


def test_scale_amax(x: Tensor) -> None:
    q = make(scale_amax=0.5, amax=2.0)
    for _ in range(2):
        assert torch.equal(q(x), fake(x, 1.0))
    assert q.amax == 2
    assert torch.equal(make(scale_amax=0.5)(x), fake(x, x.abs().max() * 0.5))


def test_learn_amax(x: Tensor) -> None:
    q = make(learn_amax=True)
    assert isinstance(q.clip, quant_nn.Clip)
    assert {n: p.item() for n, p in q.named_parameters()} == {"clip.clip_value_min": -1, "clip.clip_value_max": 1}
    with torch.no_grad():
        q.clip.clip_value_min.fill_(-0.25)
        q.clip.clip_value_max.fill_(0.75)
    amax = q._get_amax(x)
    assert amax == 0.75
    assert not amax.requires_grad
    assert torch.equal(q(x), fake(torch.clamp(x, -0.25, 0.75), 0.75))
    start = make(learn_amax=True, amax=2.5)
    assert (start.clip.clip_value_min.item(), start.clip.clip_value_max.item()) == (-2.5, 2.5)
    start.amax = 3.0
    start.init_learn_amax()
    assert (start.clip.clip_value_min.item(), start.clip.clip_value_max.item()) == (-3, 3)
    several = make(learn_amax=True)
    several.amax = [1.0, 4.0]
    several.init_learn_amax()
    assert (several.clip.clip_value_min.item(), several.clip.clip_value_max.item()) == (-4, 4)
    with pytest.raises(RuntimeError):
        make(amax=1.0).init_learn_amax()


# -- properties ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["amax", "pre_quant_scale"])
@pytest.mark.parametrize("value", [1.5, [1.0, 2.0], np.array([[1.0], [2.0]])])
def test_setters(name: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    q = TensorQuantizer()
    assert getattr(q, name) is None
    assert not q.state_dict()
    setattr(q, name, value)
    assert list(q.state_dict()) == [f"_{name}"]
    np.testing.assert_array_equal(getattr(q, name).numpy(), np.asarray(value, np.float32))
    setattr(q, name, np.asarray(value) * 2)
    np.testing.assert_array_equal(getattr(q, name).numpy(), np.asarray(value, np.float32) * 2)
    with pytest.warns(UserWarning, match=name):
        setattr(q, name, torch.as_tensor(np.asarray(value, np.float32)))
    np.testing.assert_array_equal(getattr(q, name).numpy(), np.asarray(value, np.float32))
    assert not caplog.records
    setattr(q, name, None)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    np.testing.assert_array_equal(getattr(q, name).numpy(), np.asarray(value, np.float32))
    with pytest.raises(RuntimeError, match="shape"):
        setattr(q, name, [1.0, 2.0, 3.0])


def test_pre_quant_scale_also_while_disabled(x: Tensor) -> None:
    q = make(amax=1.0)
    q.pre_quant_scale = 3.0
    assert torch.equal(q(x), fake(x * 3, 1.0))
    q.disable()
    assert torch.equal(q(x), x * 3)


def test_settable_and_read_only_properties() -> None:
    q = make(axis=(0,))
    q.num_bits, q.unsigned, q.narrow_range = -7, 2, "x"  # type: ignore[assignment]
    assert (q.num_bits, q.unsigned, q.narrow_range) == (-7, 2, "x")
    for name in ("axis", "fake_quant", "maxbound", "step_size", "scale"):
        with pytest.raises(AttributeError):
            setattr(q, name, 1)
    assert (q.axis, q.fake_quant) == ((0,), True)
    assert (q._num_bits, q._axis, q._if_quant, q._disabled) == (-7, (0,), True, False)


def test_a_setting_takes_effect(x: Tensor) -> None:
    q = make(amax=1.0)
    q.num_bits, q.narrow_range = 3, True
    assert torch.equal(q(x), fake(x, 1.0, 3, False, True))
    q.unsigned = True
    assert torch.equal(q(x.abs()), fake(x.abs(), 1.0, 3, True))


@pytest.mark.parametrize(
    ("fields", "bound"), [({}, 127), ({"unsigned": True}, 255), ({"num_bits": (4, 3)}, 448.0), ({"num_bits": 4}, 7)]
)
def test_maxbound_and_step_size(fields: dict[str, Any], bound: float, caplog: pytest.LogCaptureFixture) -> None:
    q = make(amax=3.0, **fields)
    assert q.maxbound == bound
    assert q.step_size is not None
    assert torch.equal(q.step_size, torch.tensor(3.0) / bound)
    assert not caplog.records
    assert make(**fields).step_size is None
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_stages() -> None:
    q = TensorQuantizer(QuantDescriptor(learn_amax=True))
    for stage in ("quant", "clip", "calib"):
        for switch in ("disable", "enable", "disable"):
            getattr(q, f"{switch}_{stage}")()
            assert getattr(q, f"_if_{stage}") is (switch == "enable")
    q.disable()
    assert q._disabled
    q.enable()
    assert not q._disabled


def test_what_the_stages_refuse() -> None:
    q = TensorQuantizer()
    with pytest.raises(ValueError, match="learn_amax"):
        q.enable_clip()
    with pytest.raises(ValueError, match="learn_amax"):
        TensorQuantizer(if_clip=True)
    q._calibrator = None
    with pytest.raises(ValueError, match="calibrator"):
        q.enable_calib()


# -- calibration -----------------------------------------------------------------------------------


def test_load_calib_amax(x: Tensor) -> None:
    q = TensorQuantizer(QuantDescriptor(calib_method="histogram"), if_quant=False, if_calib=True)
    assert isinstance(q._calibrator, calib.HistogramCalibrator)
    with pytest.raises(RuntimeError, match="Calibrator returned None"):
        q.load_calib_amax("entropy")
    assert torch.equal(q(x), x)
    q(x * 0.5)
    found = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        (("percentile",), {"percentile": 90}),
        (("percentile",), {"percentile": 100, "strict": True}),
        (("mse",), {"stride": 2, "start_bin": 64}),
        ((), {"method": "entropy"}),
    ]
    for args, kwargs in calls:
        q.load_calib_amax(*args, **kwargs)
        kwargs.pop("strict", None)
        assert q.amax is not None
        assert torch.equal(q.amax, q._calibrator.compute_amax(*args, **kwargs))
        found.append(q.amax.item())
    assert len(set(found)) > 2
    assert list(q.state_dict()) == ["_amax"]
    q.disable_calib()
    q.enable_quant()
    assert torch.equal(q(x), fake(x, q.amax))


def test_nothing_seen() -> None:
    q = TensorQuantizer()
    with pytest.raises(RuntimeError, match="Calibrator returned None"):
        q.load_calib_amax()
    assert q.amax is None
    with pytest.warns(UserWarning, match="Calibrator returned None"):
        q.load_calib_amax(strict=False)
    assert q.amax is not None
    assert q.amax.isnan()


# -- what it prints, and readiness for ONNX --------------------------------------------------------


def test_repr() -> None:
    for q, words in [
        (make(), ("8bit", "fake", "per-tensor", "amax=dynamic", "calibrator=MaxCalibrator", "quant")),
        (make(amax=1.5, axis=None, num_bits=4), ("4bit", "amax=1.5")),
        (make(axis=0, amax=[[1.0], [2.5]]), ("axis=0", "amax=[1, 2.5](2)")),
        (make(calib_method="histogram"), ("calibrator=HistogramCalibrator",)),
        (TensorQuantizer(QuantDescriptor(learn_amax=True), True, False, True, True), ("disabled",)),
        (TensorQuantizer(QuantDescriptor(learn_amax=True), False, False, True, True), ("clip", "calib")),
    ]:
        assert len(repr(q).splitlines()) == 1
        assert all(word in repr(q) for word in words), repr(q)


def test_readiness_while_the_class_flag_is_set(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TensorQuantizer._enable_onnx_export is False
    monkeypatch.setattr(TensorQuantizer, "_enable_onnx_export", True)
    for q in (TensorQuantizer(), TensorQuantizer(disabled=True)):
        with pytest.raises(AssertionError):
            q(x)
    with pytest.raises(AssertionError):
        make(num_bits=(4, 3), amax=[[[1.0], [2.0], [3.0]]])(x)
    assert torch.equal(make(amax=1.0)(x), fake(x, 1.0))
