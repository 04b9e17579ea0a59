"""The published calibrators."""

from __future__ import annotations

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdq.calib import HistogramCalibrator, MaxCalibrator, entropy_amax
from qdq.calib.calibrator import Calibrator, reduce_amax


def test_reduce_amax() -> None:
    x = torch.tensor([[[1.0, -5.0], [2.0, 3.0]], [[-7.0, 0.5], [0.0, -0.0]]], requires_grad=True)
    assert reduce_amax(x) == 7
    assert reduce_amax(x).shape == ()
    assert not reduce_amax(x).requires_grad
    assert reduce_amax(x, (0, 2)).tolist() == [[[7.0], [3.0]]]
    assert reduce_amax(x, [0, -1], keepdims=False).tolist() == [7, 3]
    assert reduce_amax(x, 1, keepdims=False).tolist() == [[2, 5], [7, 0.5]]
    assert torch.equal(reduce_amax(x, ()), x.abs())
    assert reduce_amax(x, (0, 1, 2), keepdims=True).shape == ()
    assert reduce_amax(torch.zeros(0, 3), 0).tolist() == [[0, 0, 0]]
    assert reduce_amax(torch.tensor([1.0, float("nan")])).isnan()
    with pytest.raises(ValueError, match="Cannot reduce more axes"):
        reduce_amax(x, (0, 1, 2, 0))
    with pytest.raises(ValueError, match="axis 3 is out of range for a tensor of 3 dimensions"):
        reduce_amax(x, 3)


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), (-1,)])
def test_max_calibrator_keeps_the_running_maximum(axis: int | tuple[int, ...] | None) -> None:
    batches = [torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    calibrator = MaxCalibrator(8, axis, False, track_amax=True)
    assert calibrator.compute_amax() is None
    for x in batches:
        calibrator.collect(x)
    kept = () if axis is None else tuple(a % 3 for a in ((axis,) if isinstance(axis, int) else axis))
    reduced = tuple(i for i in range(3) if i not in kept)
    stacked = np.abs(np.stack([x.numpy() for x in batches]))
    running = [stacked[: i + 1].max(0).max(reduced, keepdims=bool(kept)) for i in range(3)]
    amax = calibrator.compute_amax()
    assert amax is not None
    np.testing.assert_array_equal(amax.numpy(), running[-1])
    assert len(calibrator.amaxs) == 3
    for tracked, one in zip(calibrator.amaxs, stacked, strict=True):
        np.testing.assert_array_equal(tracked, one.max(reduced, keepdims=bool(kept)))
    calibrator.reset()
    assert calibrator.compute_amax() is None
    assert calibrator.amaxs == []


def test_max_calibrator_other_inputs(caplog: pytest.LogCaptureFixture) -> None:
    calibrator = MaxCalibrator(8, None, True)
    calibrator.collect(torch.zeros(0))
    assert calibrator.compute_amax() is None
    with caplog.at_level(logging.DEBUG, logger="qdq"):
        calibrator.collect(torch.tensor([-3, 2]))
    assert [r.levelno for r in caplog.records] == [logging.DEBUG]
    assert calibrator.compute_amax() == 3
    per_channel = MaxCalibrator(8, 1)
    per_channel.collect(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match=r"amax shape changed from \(1, 3\) to \(1, 4\)"):
        per_channel.collect(torch.ones(2, 4))
    with pytest.raises(ValueError, match="axis 5 is out of range"):
        MaxCalibrator(8, 5).collect(torch.ones(2))
    half = MaxCalibrator(8, None)
    half.collect(torch.ones(3, dtype=torch.bfloat16))
    assert half.compute_amax() == 1


def test_max_calibrator_warns_of_values_that_are_not_finite() -> None:
    calibrator = MaxCalibrator()
    calibrator.collect(torch.tensor([1.0, float("nan")]))
    calibrator.collect(torch.tensor([2.0]))
    with pytest.warns(UserWarning, match="NaN or infinite values: amax is not finite"):
        amax = calibrator.compute_amax()
    assert amax is not None
    assert amax.isnan()


def test_histogram_of_one_batch_is_numpys() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(2))
    for bins in (2048, 100, 7):
        calibrator = HistogramCalibrator(8, None, False, num_bins=bins)
        calibrator.collect(x.reshape(50, 100))
        counts, edges = np.histogram(x.abs().double().numpy(), bins=bins, range=(0, float(x.abs().max())))
        hist, found = calibrator._calib_hist, calibrator._calib_bin_edges
        assert isinstance(hist, torch.Tensor)
        assert isinstance(found, torch.Tensor)
        assert hist.dtype == torch.int64
        np.testing.assert_array_equal(hist.numpy(), counts)
        np.testing.assert_allclose(found.numpy(), edges, rtol=1e-6)


@given(
    st.lists(
        st.lists(st.floats(-100, 100, width=32).map(lambda v: round(v, 2)), min_size=1, max_size=30),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([1, 3, 10, 16]),
)
def test_histogram_grows_by_whole_bins_of_the_first_width(batches: list[list[float]], bins: int) -> None:
    calibrator = HistogramCalibrator(num_bins=bins)
    arrays = HistogramCalibrator(num_bins=bins, torch_hist=False)
    for x in batches:
        calibrator.collect(torch.tensor(x))
        arrays.collect(torch.tensor(x))
    values = np.abs(np.concatenate([np.array(x, np.float32) for x in batches])).astype(np.float64)
    first = next((np.abs(np.array(x, np.float32)).max() for x in batches if np.any(x)), np.float32(0))
    width = float(first) / bins
    hist = calibrator._calib_hist
    assert isinstance(hist, torch.Tensor)
    assert int(hist.sum()) == len(values)
    if width > 0:
        edges = np.arange(len(hist) + 1) * width
        np.testing.assert_array_equal(calibrator._edges().numpy(), edges)
        assert len(hist) == max(bins, int(np.ceil(values.max() / width)))
        expected, present = np.zeros(len(hist)), bins
        for x in batches:
            batch = np.abs(np.array(x, np.float32)).astype(np.float64)
            present = max(present, int(np.ceil(batch.max() / width)))
            # A bin holds its lower edge; the last one at that time its upper edge too.
            index = np.clip(np.searchsorted(edges, batch, side="right") - 1, 0, present - 1)
            expected += np.bincount(index, minlength=len(hist))
        np.testing.assert_array_equal(hist.numpy(), expected)
    assert isinstance(arrays._calib_hist, np.ndarray)
    assert isinstance(arrays._calib_bin_edges, np.ndarray)
    np.testing.assert_array_equal(arrays._calib_hist, hist.numpy())
    assert len(arrays._calib_bin_edges) == len(arrays._calib_hist) + 1


def test_counts_grow_beyond_float32() -> None:
    calibrator = HistogramCalibrator(num_bins=2)
    calibrator.collect(torch.tensor([1.0, 0.1]))
    assert isinstance(calibrator._counts, torch.Tensor)
    calibrator._counts[0] = 2**24
    calibrator.collect(torch.tensor([0.1]))
    assert int(calibrator._counts[0]) == 2**24 + 1


def test_histogram_compute_amax() -> None:
    calibrator = HistogramCalibrator(8, None, False)
    for method in ("entropy", "mse", "percentile"):
        assert calibrator.compute_amax(method) is None
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(3))
    calibrator.collect(x)
    calibrator.collect(x * 2)
    hist = calibrator._calib_hist
    assert isinstance(hist, torch.Tensor)
    before = hist.clone()
    for method in ("entropy", "mse", "percentile"):
        amax = calibrator.compute_amax(method, stride=2, start_bin=256, percentile=99)
        assert amax is not None
        assert (amax.dtype, amax.shape) == (torch.float32, ())
    assert torch.equal(hist, before)
    entropy = calibrator.compute_amax("entropy")
    assert entropy == torch.tensor(entropy_amax(before, calibrator._edges()))
    calibrator.reset()
    assert calibrator.compute_amax("mse") is None
    assert calibrator._calib_hist is None
    assert calibrator._calib_bin_edges is None


def test_histogram_other_inputs() -> None:
    calibrator = HistogramCalibrator(num_bins=4)
    calibrator.collect(torch.zeros(0))
    assert calibrator._calib_hist is None
    calibrator.collect(torch.zeros(3))  # fixes no width
    for method in ("entropy", "mse", "percentile"):
        assert calibrator.compute_amax(method) == 0
    calibrator.collect(torch.tensor([-4, 1]))
    assert isinstance(calibrator._calib_hist, torch.Tensor)
    assert calibrator._calib_hist.tolist() == [3, 1, 0, 1]
    skipping = HistogramCalibrator(num_bins=4, skip_zeros=True)
    skipping.collect(torch.zeros(3))
    assert skipping._calib_hist is None
    skipping.collect(torch.tensor([0.0, 4.0], dtype=torch.float16))
    assert isinstance(skipping._calib_hist, torch.Tensor)
    assert skipping._calib_hist.tolist() == [0, 0, 0, 1]


def test_histogram_leaves_out_what_is_not_finite_and_warns_once() -> None:
    calibrator = HistogramCalibrator(num_bins=4)
    with pytest.warns(UserWarning, match="NaN or infinite values: they are left out"):
        calibrator.collect(torch.tensor([float("nan"), 4.0, float("inf")]))
    calibrator.collect(torch.tensor([float("nan")]))
    assert isinstance(calibrator._calib_hist, torch.Tensor)
    assert calibrator._calib_hist.tolist() == [0, 0, 0, 1]


def test_bad_use_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="axis must be None, got 0"):
        HistogramCalibrator(8, 0, False)
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        HistogramCalibrator(num_bins=0)
    with pytest.warns(UserWarning, match="grow_method is ignored"):
        HistogramCalibrator(grow_method="stretch")
    calibrator = HistogramCalibrator()
    calibrator.collect(torch.tensor([1e-9]))
    with pytest.raises(RuntimeError, match=r"needs 2048.* bins of the width .* that the first batch fixed"):
        calibrator.collect(torch.tensor([1.0]))
    with pytest.raises(TypeError, match="unknown calibration method 'max': choose one of entropy, mse, percentile"):
        calibrator.compute_amax("max")
    for percentile in (-1, 100.5):
        with pytest.raises(ValueError, match="range 0 to 100"):
            calibrator.compute_amax("percentile", percentile=percentile)
    floating = HistogramCalibrator((4, 3))
    floating.collect(torch.randn(1000))
    assert floating.compute_amax("mse") is not None
    with pytest.raises(TypeError, match="num_bits must be an integer"):
        floating.compute_amax("entropy")


@pytest.mark.parametrize("make", [MaxCalibrator, HistogramCalibrator])
def test_printing_copying_and_pickling(make: type[Calibrator]) -> None:
    calibrator = make()
    assert "num_bits=8" in repr(calibrator)
    assert str(calibrator)
    calibrator.collect(torch.tensor([1.0, 2.0]))
    assert "num_bits=8" in repr(calibrator)
    assert "2" in str(calibrator)
    arguments = () if make is MaxCalibrator else ("percentile",)
    for again in (copy.deepcopy(calibrator), pickle.loads(pickle.dumps(calibrator))):
        assert again.compute_amax(*arguments) == calibrator.compute_amax(*arguments)
