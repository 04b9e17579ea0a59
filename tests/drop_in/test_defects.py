"""Published defects of the toolkit and what happens now, one test each, through the old import names.

Those of the layers, of `quant_modules`, `calibrate_weights` and `enable_onnx_export` stand beside the other tests of
these, and are called `test_defect_...` too.
"""

from __future__ import annotations

import io
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pytorch_quantization import calib, tensor_quant
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.nn import Clip, TensorQuantizer
from pytorch_quantization.optim import helper
from pytorch_quantization.tensor_quant import QuantDescriptor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def make(**fields: Any) -> TensorQuantizer:
    return TensorQuantizer(QuantDescriptor(**fields))


@pytest.mark.parametrize("device", DEVICES)
def test_defect_fake_quantization_dropped_narrow_range(device: str) -> None:
    x, amax = torch.tensor([-2.0, 2.0], device=device), torch.tensor(127.0 / 64, device=device)
    functions = (
        tensor_quant.fake_tensor_quant,
        tensor_quant.legacy_fake_tensor_quant,
        tensor_quant.FakeTensorQuantFunction.apply,
    )
    for function in functions:
        assert function(x, amax, 8, False, True).tolist() == [-127 / 64, 127 / 64]
        assert function(x, amax, 8, False, False).tolist() == [-2.0, 127 / 64]
    assert make(amax=127.0 / 64).to(device)(x).tolist() == [-2.0, 127 / 64]
    assert make(amax=127.0 / 64, narrow_range=True).to(device)(x).tolist() == [-127 / 64, 127 / 64]


def test_defect_codes_ignored_narrow_range() -> None:
    x = torch.tensor([-2.0, 2.0])
    assert make(fake_quant=False, amax=1.0)(x).tolist() == [-128, 127]
    assert make(fake_quant=False, amax=1.0, narrow_range=True)(x).tolist() == [-127, 127]


@pytest.mark.parametrize(("negative", "positive"), [(-1, 2), ((-1,), (2,)), ((0, -2), (0, 1)), ((-3, -1), (0, 2))])
def test_defect_dynamic_amax_did_not_normalise_a_negative_axis(negative: Any, positive: Any) -> None:
    x = torch.randn(2, 3, 4)
    found, expected = make(axis=negative), make(axis=positive)
    assert torch.equal(found._get_amax(x), expected._get_amax(x))
    assert found._get_amax(x).numel() > 1
    assert torch.equal(found(x), expected(x))


def test_defect_step_size_of_e4m3() -> None:
    step_size = make(num_bits=(4, 3), amax=4.48).step_size
    assert step_size is not None
    assert step_size.item() == pytest.approx(0.01)


def test_defect_scale_before_the_first_call() -> None:
    for q in (make(fake_quant=False), make()):
        assert q.scale is None


def test_defect_e4m3_ignored_learn_amax() -> None:
    q = make(num_bits=(4, 3), learn_amax=True, amax=2.0)
    x = torch.tensor([-5.0, 0.3, 5.0], requires_grad=True)
    out = q(x)
    assert torch.equal(out, tensor_quant.scaled_e4m3(x.clamp(-2, 2), torch.tensor(2.0)))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 0]
    assert (q.clip.clip_value_min.grad, q.clip.clip_value_max.grad) == (torch.tensor(1.0), torch.tensor(1.0))


def test_defect_e4m3_ignored_fake_quant_false() -> None:
    with pytest.raises(ValueError, match=r"num_bits=\(4, 3\) needs fake_quant=True"):
        make(num_bits=(4, 3), fake_quant=False)


@pytest.mark.parametrize("fields", [{"narrow_range": True}, {"calib_method": "histogram"}, {"num_bits": (4, 3)}])
def test_defect_dict_and_yaml_lost_fields(fields: dict[str, Any]) -> None:
    desc = QuantDescriptor(**fields)
    assert fields.items() <= desc.dict().items()
    assert QuantDescriptor(**desc.dict()) == desc
    assert QuantDescriptor.from_yaml(desc.to_yaml()) == desc


def test_defect_yaml_failed_on_an_integer_axis() -> None:
    per_row = tensor_quant.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
    assert QuantDescriptor.from_yaml(per_row.to_yaml()) == per_row
    assert QuantDescriptor.from_yaml(per_row.to_yaml()).axis == 0


def test_defect_calib_method_was_not_checked() -> None:
    with pytest.raises(ValueError, match="calib_method must be one of max, histogram, got 'histogramm'"):
        QuantDescriptor(calib_method="histogramm")
    for method in ("max", "histogram"):
        assert make(calib_method=method)._calibrator is not None


@pytest.mark.parametrize(("bits", "unsigned"), [(1, False), (0, False), (0, True)])
def test_defect_num_bits_without_a_positive_bound(bits: int, unsigned: bool) -> None:
    x, amax = torch.tensor([0.0, 0.4, 3.0]), torch.tensor(1.0)
    codes, scale = tensor_quant.tensor_quant(x, amax, bits, unsigned)
    assert codes.tolist() == [0, 0, 0]
    assert scale == 1
    for function in (tensor_quant.fake_tensor_quant, tensor_quant.legacy_fake_tensor_quant):
        assert function(x, amax, bits, unsigned).tolist() == [0, 0, 0]
    assert make(num_bits=bits, unsigned=unsigned)(x).tolist() == [0, 0, 0]


def test_defect_num_bits_1_unsigned_has_two_codes() -> None:
    assert tensor_quant.tensor_quant(torch.tensor([0.2, 0.7]), torch.tensor(1.0), 1, True)[0].tolist() == [0, 1]


@pytest.mark.parametrize("torch_hist", [True, False])
def test_defect_entropy_overwrote_the_first_bin(torch_hist: bool) -> None:
    calibrator = calib.HistogramCalibrator(8, None, False, num_bins=256, torch_hist=torch_hist)
    calibrator.collect(torch.randn(1000))
    before = np.asarray(calibrator._calib_hist).copy()
    first = calibrator.compute_amax("entropy")
    np.testing.assert_array_equal(np.asarray(calibrator._calib_hist), before)
    assert calibrator.compute_amax("entropy") == first


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-1.0, 1.0)])
def test_defect_clip_refused_numbers(low: float, high: float, learned: bool) -> None:
    module = Clip(low, high, learn_min=learned, learn_max=learned)
    assert module(torch.tensor([-3.0, 0.5, 3.0])).tolist() == [-1, 0.5, 1]


def test_defect_match_parameters_yielded_once_per_pattern() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert len(list(helper.match_parameters(model, ["0", "weight", "w.*t"]))) == 2
    torch.optim.SGD(helper.group_parameters(model, [["0", "weight"]]), lr=0.1)  # refuses a parameter given twice


def test_defect_match_parameters_took_a_string_for_its_characters() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert [p.shape for p in helper.match_parameters(model, "weight")] == [(2, 2)]
    helper.freeze_parameters(model, "bias")
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (True, False)


def test_defect_max_calibrator_wrote_a_line_per_call(caplog: pytest.LogCaptureFixture) -> None:
    calibrator = calib.MaxCalibrator(8, None, True)
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            calibrator.collect(torch.tensor([-1.0, 1.0]))
    assert {record.levelno for record in caplog.records} <= {logging.DEBUG}
    assert {record.name for record in caplog.records} <= {"qdq.calib.max"}
    caplog.clear()
    with caplog.at_level(logging.INFO):
        calibrator.collect(torch.tensor([-1.0, 1.0]))
        make(unsigned=True, amax=1.0)(torch.tensor([1.0]))
    assert not caplog.records


def test_defect_histogram_counts_stopped_growing_at_2_to_the_24() -> None:
    calibrator = calib.HistogramCalibrator(8, None, False, num_bins=2)
    calibrator.collect(torch.tensor([1.0, 0.1]))
    counts = calibrator._calib_hist
    assert isinstance(counts, torch.Tensor)
    assert counts.dtype == torch.int64
    counts[0] = 2**24
    calibrator.collect(torch.tensor([0.1]))
    assert calibrator._calib_hist is not None
    assert int(calibrator._calib_hist[0]) == 2**24 + 1


@pytest.mark.parametrize("strict", [True, False])
def test_defect_a_calibrated_model_did_not_load_on_a_cpu(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(quant_nn.QuantConv2d(2, 3, 3), quant_nn.QuantLinear(4, 2))

    calibrated = model()
    calibrated[0].input_quantizer.amax = 3.0
    calibrated[0].weight_quantizer.amax = [[[[0.1]]], [[[0.2]]], [[[0.3]]]]
    calibrated[1].input_quantizer.amax = 2.0
    calibrated[1].weight_quantizer.amax = [[0.5], [0.25]]
    stored = io.BytesIO()
    with monkeypatch.context() as patch:  # a file as a GPU writes it
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(calibrated.state_dict(), stored)
    stored.seek(0)
    fresh = model()
    state = torch.load(stored, map_location="cpu", weights_only=True)
    assert fresh.load_state_dict(state, strict=strict) == ([], [])
    keys = [f"{i}._{kind}_quantizer._amax" for i in range(2) for kind in ("input", "weight")]
    assert set(keys) <= set(fresh.state_dict())
    x = torch.randn(1, 2, 6, 6)
    assert torch.equal(fresh(x), calibrated(x))
