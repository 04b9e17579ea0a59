"""calib.calibrate_weights: bit for bit what a HistogramCalibrator finds for the same slice; published defects."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qdq
from pytorch_quantization import calib
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from qdq import CalibrationError

MODULES: dict[str, tuple[Any, int]] = {
    "linear": (lambda: quant_nn.QuantLinear(30, 6), 0),
    "conv1d": (lambda: quant_nn.QuantConv1d(4, 6, 3), 0),
    "conv2d": (lambda: quant_nn.QuantConv2d(4, 6, 3), 0),
    "conv3d": (lambda: quant_nn.QuantConv3d(2, 5, 3), 0),
    "grouped": (lambda: quant_nn.QuantConv2d(4, 6, 3, groups=2), 0),
    "transposed1d": (lambda: quant_nn.QuantConvTranspose1d(4, 6, 3), 1),
    "transposed2d": (lambda: quant_nn.QuantConvTranspose2d(4, 6, 3), 1),
    "transposed3d": (lambda: quant_nn.QuantConvTranspose3d(2, 5, 3), 1),
}


def from_calibrator(x: Tensor, method: str, num_bins: int = 2048, **kwargs: Any) -> Tensor:
    """The amax of the published calibrators for `x`."""
    num_bits, unsigned = kwargs.pop("num_bits", 8), kwargs.pop("unsigned", False)
    if method == "max":
        calibrator: Any = calib.MaxCalibrator(num_bits, None, unsigned)
        calibrator.collect(x)
        return calibrator.compute_amax()
    calibrator = calib.HistogramCalibrator(num_bits, None, unsigned, num_bins=num_bins)
    calibrator.collect(x)
    return calibrator.compute_amax(method, **kwargs)


def slices(weight: Tensor, axis: int) -> list[Tensor]:
    return [part.detach() for part in weight.unbind(axis)]


@pytest.mark.parametrize("method", ["max", "mse", "percentile"])
@pytest.mark.parametrize("name", MODULES)
def test_equals_the_calibrator_on_every_channel(name: str, method: str) -> None:
    torch.manual_seed(0)
    build, axis = MODULES[name]
    model = nn.Sequential(build())
    weight = model[0].weight
    with torch.no_grad():
        weight.select(axis, 1).mul_(1e-3)
        weight.select(axis, 2).zero_()
        weight.select(axis, 3).mul_(1e-40)  # subnormal
    calib.calibrate_weights(model, method=method)
    expected = torch.stack([from_calibrator(part, method) for part in slices(weight, axis)])
    amax = model[0].weight_quantizer.amax
    assert amax.shape == tuple(size if i == axis else 1 for i, size in enumerate(weight.shape))
    assert torch.equal(amax.flatten(), expected.flatten())
    model[0].weight_quantizer(weight)


@pytest.mark.parametrize("method", ["mse", "percentile"])
@pytest.mark.parametrize("num_bins", [1, 37, 100, 128, 1000])
@pytest.mark.parametrize("perchannel", [True, False])
def test_num_bins(method: str, num_bins: int, perchannel: bool) -> None:
    torch.manual_seed(1)
    model = quant_nn.QuantConv2d(7, 16, 5)
    calib.calibrate_weights(model, method=method, perchannel=perchannel, num_bins=num_bins)
    parts = slices(model.weight, 0) if perchannel else [model.weight.detach()]
    expected = torch.stack([from_calibrator(part, method, num_bins) for part in parts])
    assert torch.equal(model.weight_quantizer.amax.flatten(), expected)


def test_percentiles() -> None:
    torch.manual_seed(2)
    model = quant_nn.QuantLinear(200, 5)
    found = []
    for percentile in (0.0, 50, 90.0, 99.0, 99.99, 100):
        calib.calibrate_weights(model, percentile=percentile)  # the default method
        expected = [from_calibrator(row, "percentile", percentile=percentile) for row in slices(model.weight, 0)]
        found.append(model.weight_quantizer.amax.flatten().clone())
        assert torch.equal(found[-1], torch.stack(expected))
    assert all(bool((a < b).any()) and bool((a <= b).all()) for a, b in itertools.pairwise(found[:5]))


@pytest.mark.parametrize("bits", [2, 4, 8, 12, (4, 3)])
def test_mse_heeds_the_bits_of_the_quantizer(bits: Any) -> None:
    torch.manual_seed(3)
    model = quant_nn.QuantLinear(64, 3, quant_desc_weight=QuantDescriptor(bits, axis=0))
    calib.calibrate_weights(model, "mse")
    expected = [from_calibrator(row, "mse", num_bits=bits) for row in slices(model.weight, 0)]
    assert torch.equal(model.weight_quantizer.amax.flatten(), torch.stack(expected))


def test_mse_heeds_unsigned() -> None:
    torch.manual_seed(3)
    model = quant_nn.QuantLinear(64, 3, quant_desc_weight=QuantDescriptor(4, axis=0, unsigned=True))
    calib.calibrate_weights(model, "mse")
    expected = [from_calibrator(row, "mse", num_bits=4, unsigned=True) for row in slices(model.weight, 0)]
    assert torch.equal(model.weight_quantizer.amax.flatten(), torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["max", "mse", "percentile"])
def test_dtypes(dtype: torch.dtype, method: str) -> None:
    torch.manual_seed(4)
    model = quant_nn.QuantLinear(40, 3).to(dtype)
    calib.calibrate_weights(model, method)
    expected = torch.stack([from_calibrator(row, method) for row in slices(model.weight, 0)])
    amax = model.weight_quantizer.amax
    assert amax.dtype == torch.float32 and torch.equal(amax.flatten(), expected.to(torch.float32))


def test_defect_max_per_tensor_raises() -> None:
    model = quant_nn.QuantLinear(8, 4)
    calib.calibrate_weights(model, method="max", perchannel=False)
    amax = model.weight_quantizer.amax
    assert amax.shape == () and torch.equal(amax, model.weight.detach().abs().max())


def test_defect_num_bins_ignored_when_not_per_channel() -> None:
    torch.manual_seed(5)
    model = quant_nn.QuantLinear(64, 64)
    found = []
    for num_bins in (10, 2048):
        calib.calibrate_weights(model, perchannel=False, percentile=90, num_bins=num_bins)
        found.append(float(model.weight_quantizer.amax))
    assert found[0] != found[1]


def test_defect_cannot_go_from_per_channel_to_per_tensor() -> None:
    model = quant_nn.QuantConv2d(3, 4, 3)
    shapes = []
    for perchannel in (True, False, False, True):
        calib.calibrate_weights(model, "max", perchannel=perchannel)
        shapes.append(tuple(model.weight_quantizer.amax.shape))
    assert shapes == [(4, 1, 1, 1), (), (), (4, 1, 1, 1)]
    assert "_weight_quantizer._amax" in model.state_dict()


def test_an_amax_of_one_value_keeps_its_shape() -> None:
    one_channel = quant_nn.QuantConv2d(3, 1, 3)
    calib.calibrate_weights(one_channel, "max")
    assert one_channel.weight_quantizer.amax.shape == ()  # as after a calibration with data
    given = quant_nn.QuantLinear(4, 4, quant_desc_weight=QuantDescriptor(amax=[[3.0]]))
    calib.calibrate_weights(given, "max", perchannel=False)
    assert given.weight_quantizer.amax.shape == (1, 1) and float(given.weight_quantizer.amax) < 3.0


def test_the_axes_are_those_of_the_quantizer() -> None:
    torch.manual_seed(6)
    published = quant_nn.QuantConvTranspose2d(3, 4, 2, quant_desc_weight=QuantDescriptor(axis=0))
    both = quant_nn.QuantConv2d(3, 4, 2, quant_desc_weight=QuantDescriptor(axis=(0, -3)))
    none = quant_nn.QuantLinear(5, 4, quant_desc_weight=QuantDescriptor())
    transposed = quant_nn.QuantConvTranspose2d(3, 4, 2, quant_desc_weight=QuantDescriptor())
    calib.calibrate_weights(nn.ModuleList([published, both, none, transposed]), "mse")
    assert published.weight_quantizer.amax.shape == (3, 1, 1, 1)
    assert both.weight_quantizer.amax.shape == (4, 3, 1, 1)
    expected = [from_calibrator(kernel, "mse") for kernel in both.weight.detach().flatten(0, 1)]
    assert torch.equal(both.weight_quantizer.amax.flatten(), torch.stack(expected))
    assert none.weight_quantizer.amax.shape == (4, 1)
    assert transposed.weight_quantizer.amax.shape == (1, 4, 1, 1)


@pytest.mark.parametrize("method", ["max", "mse", "percentile"])
def test_layers_with_joined_weights(method: str) -> None:
    torch.manual_seed(7)
    lstm = qdq.nn.QuantLSTM(3, 4, 2, bidirectional=True)
    cell = qdq.nn.QuantLSTMCell(3, 4)
    gru = qdq.nn.QuantGRU(3, 4, bias=False)
    attention = qdq.nn.QuantMultiheadAttention(8, 2)
    split = qdq.nn.QuantMultiheadAttention(8, 2, kdim=4, vdim=6)
    table = qdq.nn.QuantEmbedding(5, 4)
    calib.calibrate_weights(nn.ModuleList([lstm, cell, gru, attention, split, table]), method)
    pairs = [
        (lstm._weight_quantizers[3], torch.cat([lstm.weight_ih_l1_reverse, lstm.weight_hh_l1_reverse], 1)),
        (cell.weight_quantizer, torch.cat([cell.weight_ih, cell.weight_hh], 1)),
        (gru._weight_quantizers[0], torch.cat([gru.weight_ih_l0, gru.weight_hh_l0], 1)),
        (attention._k_proj_weight_quantizer, attention.in_proj_weight[8:16]),
        (attention._out_proj_weight_quantizer, attention.out_proj.weight),
        (split._v_proj_weight_quantizer, split.v_proj_weight),
        (table.weight_quantizer, table.weight),
    ]
    for quantizer, weight in pairs:
        expected = torch.stack([from_calibrator(row, method) for row in slices(weight, 0)])
        assert torch.equal(quantizer.amax.flatten(), expected)
        quantizer(weight)  # the shape fits
    assert all(q.amax is not None for q in lstm._weight_quantizers)


def test_learned_ranges_start_at_the_amax() -> None:
    model = quant_nn.QuantLinear(8, 4, quant_desc_weight=QuantDescriptor(learn_amax=True))
    calib.calibrate_weights(model, "max", perchannel=False)
    assert torch.equal(model.weight_quantizer.clip.clip_value_max, model.weight.detach().abs().max())


def test_disabled_quantizers_and_shared_modules() -> None:
    shared = quant_nn.QuantLinear(4, 4)
    shared.weight_quantizer.disable()
    calib.calibrate_weights(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 4)), "max")
    assert shared.weight_quantizer.amax.shape == (4, 1) and shared.input_quantizer.amax is None


def test_arguments_out_of_range() -> None:
    model = quant_nn.QuantLinear(4, 4)
    with pytest.raises(TypeError, match="unknown method 'entropy' for weights: choose one of max, mse, percentile"):
        calib.calibrate_weights(model, method="entropy")
    for percentile in (-1, 100.5, np.nan):
        with pytest.raises(ValueError, match="percentile must be in the range 0 to 100"):
            calib.calibrate_weights(model, percentile=percentile)
    with pytest.raises(ValueError, match="num_bins must be an integer of at least 1, got 0"):
        calib.calibrate_weights(model, num_bins=0)
    assert model.weight_quantizer.amax is None


@pytest.mark.parametrize("method", ["max", "mse", "percentile"])
def test_bad_weights_are_named_and_nothing_is_changed(method: str) -> None:
    model = nn.ModuleDict({"good": quant_nn.QuantLinear(4, 4), "bad": quant_nn.QuantLinear(4, 4)})
    for value in (float("nan"), float("inf")):
        model["bad"].weight.data[1, 1] = value
        with pytest.raises(CalibrationError, match="^bad.weight is empty or holds NaN or infinite values$"):
            calib.calibrate_weights(model, method)
        with pytest.raises(CalibrationError, match="^weight is empty"):
            calib.calibrate_weights(model["bad"], method)
    assert model["good"].weight_quantizer.amax is None


def test_a_model_without_weight_quantizers_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qdq"):
        calib.calibrate_weights(nn.Linear(2, 2))
    assert caplog.messages == ["calibrate_weights: the model has no weight quantizers"]


def test_import_paths() -> None:
    from pytorch_quantization.calib import calibrator
    from pytorch_quantization.calib.histogram import HistogramCalibrator
    from pytorch_quantization.calib.max import MaxCalibrator

    assert issubclass(MaxCalibrator, calibrator._Calibrator) and issubclass(HistogramCalibrator, calibrator._Calibrator)
    assert calib.HistogramCalibrator is HistogramCalibrator and calib.MaxCalibrator is MaxCalibrator
    assert calib.calibrate_weights is calib.histogram.calibrate_weights is qdq.calib.calibrate_weights
    assert {"collect", "reset", "compute_amax"} <= set(dir(calibrator._Calibrator))
