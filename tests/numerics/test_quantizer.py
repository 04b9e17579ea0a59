"""TensorQuantizer: stages, amax from every source, state, and what it refuses."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qdq.calib import HistogramCalibrator, MaxCalibrator
from qdq.descriptor import QUANT_DESC_8BIT_PER_TENSOR, QuantDescriptor
from qdq.functional import fake_tensor_quant, scaled_e4m3, tensor_quant
from qdq.quantizer import TensorQuantizer


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(5))


def make(**fields: Any) -> TensorQuantizer:
    return TensorQuantizer(QuantDescriptor(**fields))


# -- amax ------------------------------------------------------------------------------------------


def test_default_is_dynamic_8_bits(x: Tensor) -> None:
    q = TensorQuantizer()
    assert q.amax is None
    assert not q.state_dict()
    assert torch.equal(q(x), fake_tensor_quant(x, x.abs().max(), 8, False, False))
    assert torch.equal(TensorQuantizer(QUANT_DESC_8BIT_PER_TENSOR)(x), q(x))
    assert q._get_amax(x).shape == ()


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), (-3, 2)])
def test_dynamic_amax_keeps_its_axes(x: Tensor, axis: int | tuple[int, ...]) -> None:
    kept = {a % 3 for a in (axis if isinstance(axis, tuple) else (axis,))}
    amax = x.abs().amax(tuple({0, 1, 2} - kept), keepdim=True)
    q = make(axis=axis)
    assert torch.equal(q._get_amax(x), amax)
    assert torch.equal(q(x), fake_tensor_quant(x, amax, 8, False, False))


@pytest.mark.parametrize("fields", [{}, {"narrow_range": True}, {"unsigned": True}, {"num_bits": 4}, {"num_bits": 0}])
@pytest.mark.parametrize("fake", [True, False])
def test_every_setting_reaches_the_kernel(x: Tensor, fields: dict[str, Any], fake: bool) -> None:
    x = -x.abs() if not fields.get("unsigned") else x.abs()
    q = make(amax=1.0, fake_quant=fake, **fields)
    arguments = (fields.get("num_bits", 8), fields.get("unsigned", False), fields.get("narrow_range", False))
    codes, scale = tensor_quant(x, 1.0, *arguments)
    assert q.scale is None
    if fake:
        assert torch.equal(q(x), fake_tensor_quant(x, 1.0, *arguments))
        assert q.scale is None
    else:
        assert torch.equal(q(x), codes)
        assert q.scale is not None
        assert torch.equal(q.scale, scale)


def test_e4m3(x: Tensor) -> None:
    q = make(num_bits=(4, 3), amax=2.0)
    assert torch.equal(q(x), scaled_e4m3(x, 2.0))
    assert q.maxbound == 448.0
    assert q.step_size == torch.tensor(2.0 / 448)
    assert torch.equal(make(num_bits=(4, 3), axis=1)(x), scaled_e4m3(x, x.abs().amax((0, 2), keepdim=True)))
    with pytest.raises(ValueError, match="needs fake_quant=True: E4M3 codes are only simulated"):
        make(num_bits=(4, 3), fake_quant=False)


def test_scale_amax_multiplies_on_every_call(x: Tensor) -> None:
    q = make(amax=2.0, scale_amax=0.5)
    assert torch.equal(q(x), fake_tensor_quant(x, 1.0, 8, False, False))
    assert torch.equal(q(x), fake_tensor_quant(x, 1.0, 8, False, False))
    assert q.amax == 2
    assert torch.equal(make(scale_amax=0.5)(x), fake_tensor_quant(x, x.abs().max() * 0.5, 8, False, False))


@pytest.mark.parametrize("value", [1.5, 2, [1.0, 2.0], np.array([[1.0], [2.0]])])
def test_amax_setter(value: Any) -> None:
    q = TensorQuantizer()
    q.amax = value
    assert q.amax is not None
    assert q.amax.dtype == torch.float32
    np.testing.assert_array_equal(q.amax.numpy(), np.array(value, np.float32))
    assert list(q.state_dict()) == ["_amax"]
    buffer = q._amax
    q.amax = np.array(value, np.float64) * 2
    assert q._amax is buffer
    np.testing.assert_array_equal(buffer.numpy(), np.array(value, np.float32) * 2)


def test_amax_setter_refuses(caplog: pytest.LogCaptureFixture) -> None:
    q = TensorQuantizer()
    q.amax = 1.0
    with caplog.at_level(logging.ERROR, logger="qdq"):
        q.amax = None
    assert "amax cannot be set to None" in caplog.text
    assert q.amax == 1
    with pytest.raises(RuntimeError, match=r"amax has shape \(\) and cannot take \(2,\)"):
        q.amax = [1.0, 2.0]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="amax must be finite"):
            q.amax = bad
    with pytest.raises(ValueError, match="Negative values in amax: -1"):
        q.amax = -1.0
    with pytest.raises(ValueError, match="amax must be finite"):
        make(amax=float("nan"))
    assert q.amax == 1
    with pytest.warns(UserWarning, match="amax should be a float, list or array; the tensor is copied"):
        q.amax = torch.tensor(3.0)
    assert q.amax == 3


def test_pre_quant_scale_applies_even_while_disabled(x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    q = make(amax=1.0)
    assert q.pre_quant_scale is None
    q.pre_quant_scale = [0.5, 2.0, -1.0, 1.0, 1.0]
    scaled = x * torch.tensor([0.5, 2.0, -1.0, 1.0, 1.0])
    assert torch.equal(q(x), fake_tensor_quant(scaled, 1.0, 8, False, False))
    assert q(x.half()).dtype == torch.float16
    q.disable()
    assert torch.equal(q(x), scaled)
    with pytest.raises(RuntimeError, match="pre_quant_scale has shape"):
        q.pre_quant_scale = 1.0
    with pytest.raises(ValueError, match="pre_quant_scale must be finite"):
        q.pre_quant_scale = [float("nan")] * 5
    with caplog.at_level(logging.ERROR, logger="qdq"):
        q.pre_quant_scale = None
    assert "pre_quant_scale cannot be set to None" in caplog.text
    assert list(q.state_dict()) == ["_amax", "_pre_quant_scale"]


def test_step_size(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="qdq"):
        assert TensorQuantizer().step_size is None
    assert "step_size is not defined" in caplog.text
    assert make(amax=1.27).step_size == pytest.approx(0.01)
    assert make(amax=1.0, num_bits=1).step_size == 1


def test_settings() -> None:
    q = make(axis=(0, 1), unsigned=True)
    assert (q.num_bits, q.unsigned, q.narrow_range, q.axis, q.fake_quant, q.maxbound) == (
        *(8, True, False, (0, 1)),
        *(True, 255),
    )
    q.num_bits, q.unsigned, q.narrow_range = 4, False, True
    assert (q._num_bits, q._unsigned, q._narrow_range, q._axis, q.maxbound) == (4, False, True, (0, 1), 7)
    for name in ("axis", "fake_quant", "maxbound", "step_size", "scale"):
        with pytest.raises(AttributeError):
            setattr(q, name, 1)


def test_dynamic_amax_that_is_not_finite_warns_once(x: Tensor) -> None:
    q = make(axis=0)
    x[1, 0, 0] = float("nan")
    with pytest.warns(UserWarning, match="dynamic amax: the input holds NaN or infinite values"):
        out = q(x)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()
    q(x)  # warnings are errors here: no second one


def test_empty_and_0d_inputs() -> None:
    q = TensorQuantizer()
    assert q(torch.zeros(0, 3)).shape == (0, 3)
    assert q(torch.tensor(0.7)) == torch.tensor(0.7)
    assert make(axis=1)(torch.zeros(0, 3)).shape == (0, 3)


# -- stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "kind"), [("max", MaxCalibrator), ("histogram", HistogramCalibrator)])
def test_calibration(x: Tensor, method: str, kind: type) -> None:
    q = TensorQuantizer(QuantDescriptor(calib_method=method, num_bits=7, unsigned=True), if_quant=False, if_calib=True)
    assert isinstance(q._calibrator, kind)
    assert (q._calibrator._num_bits, q._calibrator._unsigned) == (7, True)
    x = x.abs()
    assert torch.equal(q(x), x)
    q(x * 2)
    q.disable_calib()
    q(x * 100)
    if method == "max":
        q.load_calib_amax()
        assert q.amax == x.max() * 2
    else:
        values = []
        for name in ("percentile", "mse", "entropy"):
            q.load_calib_amax(name, start_bin=64)
            assert q.amax is not None
            values.append(float(q.amax))
        assert 0 < min(values) < max(values) <= float(x.max() * 2)
        with pytest.raises(TypeError, match="unknown calibration method"):
            q.load_calib_amax("maxx")
    q.enable_quant()
    assert q.amax is not None
    assert torch.equal(q(x), fake_tensor_quant(x, q.amax, 7, True))


def test_calibration_without_data() -> None:
    q = make(axis=0)
    with pytest.raises(RuntimeError, match="Calibrator returned None: no data reached this quantizer"):
        q.load_calib_amax()
    assert q.amax is None
    with pytest.warns(UserWarning, match="Calibrator returned None.*amax is NaN"):
        q.load_calib_amax(strict=False)
    assert q.amax is not None
    assert q.amax.isnan()
    assert q(torch.ones(2, 3)).isnan().all()
    # It may be calibrated later, with its own shape.
    q.enable_calib()
    q(torch.ones(2, 3))
    q.load_calib_amax()
    assert q.amax.shape == (2, 1)


def test_calibration_with_values_that_are_not_finite_is_refused() -> None:
    q = TensorQuantizer(if_calib=True, if_quant=False)
    q(torch.tensor([1.0, float("inf")]))
    with (
        pytest.warns(UserWarning, match="amax is not finite"),
        pytest.raises(ValueError, match="the calibrated amax is NaN or infinite"),
    ):
        q.load_calib_amax()
    assert q.amax is None


def test_a_calibrator_of_ones_own() -> None:
    class Constant(MaxCalibrator):
        def compute_amax(self, value: float = 1.0) -> Tensor:
            return torch.tensor(value)

    q = TensorQuantizer()
    q._calibrator = Constant()
    q.load_calib_amax(value=2.5)
    assert q.amax == 2.5
    with pytest.raises(ValueError, match="Negative values in amax: the calibrator computed"):
        q.load_calib_amax(-1.0)
    q._calibrator = None
    with pytest.raises(RuntimeError, match="the quantizer has no calibrator"):
        q.load_calib_amax()
    with pytest.raises(ValueError, match="calibration cannot be enabled"):
        q.enable_calib()
    q._if_calib = True
    with pytest.raises(RuntimeError, match="calibration is enabled, but the quantizer has no calibrator"):
        q(torch.ones(2))


def test_histogram_with_an_axis_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="axis must be None"):
        make(axis=0, calib_method="histogram")


def test_disable_and_stages(x: Tensor) -> None:
    q = TensorQuantizer(QuantDescriptor(amax=1.0), disabled=True)
    assert q._disabled
    assert q.disabled
    assert q(x) is x
    q.enable()
    assert not torch.equal(q(x), x)
    q.disable_quant()
    assert not q._if_quant
    assert q(x) is x


def test_learned_range(x: Tensor) -> None:
    q = TensorQuantizer(QuantDescriptor(learn_amax=True), if_clip=True, if_quant=False)
    assert [n for n, _ in q.named_parameters()] == ["clip.clip_value_min", "clip.clip_value_max"]
    assert torch.equal(q(x), x.clamp(-1, 1))
    q.disable_clip()
    assert q(x) is x
    q.enable_quant()
    assert torch.equal(q(x), fake_tensor_quant(x.clamp(-1, 1), 1.0, 8, False, False))
    with pytest.raises(RuntimeError, match="init_learn_amax needs an amax"):
        q.init_learn_amax()
    q.amax = 0.5
    q.init_learn_amax()
    assert (q.clip.clip_value_min, q.clip.clip_value_max) == (-0.5, 0.5)
    x.requires_grad_()
    q(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (x.detach().abs() < 0.5).float())
    assert q.clip.clip_value_max.grad == (x >= 0.5).sum()
    assert q.clip.clip_value_min.grad == (x <= -0.5).sum()
    given = make(learn_amax=True, amax=[1.0, 3.0])
    assert (given.clip.clip_value_min, given.clip.clip_value_max) == (-3, 3)


def test_a_learned_range_is_needed_to_clip() -> None:
    with pytest.raises(ValueError, match="clipping cannot be enabled: the descriptor must have learn_amax=True"):
        TensorQuantizer(if_clip=True)
    q = TensorQuantizer()
    with pytest.raises(ValueError, match="clipping cannot be enabled"):
        q.enable_clip()
    q._if_clip = True
    with pytest.raises(RuntimeError, match="clipping is enabled, but the descriptor does not have learn_amax"):
        q(torch.ones(2))
    with pytest.raises(RuntimeError, match="init_learn_amax needs a descriptor with learn_amax=True"):
        q.init_learn_amax()


def test_gradient_is_straight_through(x: Tensor) -> None:
    x.requires_grad_()
    make(amax=1.0)(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (x.detach().abs() <= 1).float())
