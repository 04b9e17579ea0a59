"""`pytorch_quantization.calib`: the calibrators, statement by statement of their published contract."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pytorch_quantization import calib
from pytorch_quantization.calib.calibrator import _Calibrator
from pytorch_quantization.tensor_quant import fake_tensor_quant, scaled_e4m3


def randn(*shape: int, seed: int = 12345) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_base_class() -> None:
    class Half(_Calibrator):
        def __init__(self) -> None:
            super().__init__(8, None, False)
            self.reset()

        def collect(self, x: Tensor) -> None:
            self.amax = x.abs().max() / 2

        def reset(self) -> None:
            self.amax = None

        def compute_amax(self, *args: Any, **kwargs: Any) -> Tensor | None:
            return self.amax

    for kind in (calib.MaxCalibrator, calib.HistogramCalibrator, Half):
        assert issubclass(kind, _Calibrator)
    half = Half()
    assert (half._num_bits, half._axis, half._unsigned) == (8, None, False)
    half.collect(torch.tensor([-4.0]))
    assert half.compute_amax() == 2
    assert "Half" in repr(half)
    base = _Calibrator(8, None, False)
    for call in (lambda: base.collect(torch.ones(1)), base.reset, base.compute_amax):
        with pytest.raises(NotImplementedError):
            call()


# -- max -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), (0, -1)])
def test_running_maximum(axis: Any) -> None:
    batches = [randn(3, 4, 5, seed=i) for i in range(3)]
    kept = () if axis is None else tuple(a % 3 for a in np.atleast_1d(axis))
    reduced = tuple(i for i in range(3) if i not in kept)
    calibrator = calib.MaxCalibrator(8, axis, False, track_amax=True)
    assert calibrator.compute_amax() is None
    running = []
    for i, x in enumerate(batches):
        calibrator.collect(x.requires_grad_())
        amax = torch.stack(batches[: i + 1]).abs().amax(0).amax(reduced, keepdim=True).detach()
        running.append((amax if kept else amax.reshape(())).numpy())
    amax = calibrator.compute_amax()
    assert amax is not None
    assert not amax.requires_grad
    np.testing.assert_array_equal(amax.numpy(), running[-1])
    assert all(isinstance(a, np.ndarray) for a in calibrator.amaxs)
    assert len(calibrator.amaxs) == 3
    for found, x in zip(calibrator.amaxs, batches, strict=True):
        np.testing.assert_array_equal(found, x.detach().abs().amax(reduced, keepdim=bool(kept)).numpy())
    calibrator.reset()
    assert calibrator.compute_amax() is None


def test_amax_of_another_shape() -> None:
    calibrator = calib.MaxCalibrator(8, 0, False)
    calibrator.collect(randn(3, 4))
    with pytest.raises(RuntimeError, match="shape changed"):
        calibrator.collect(randn(4, 4))


# -- histogram -------------------------------------------------------------------------------------


def make(**keywords: Any) -> calib.HistogramCalibrator:
    return calib.HistogramCalibrator(8, None, False, **keywords)


def test_arguments() -> None:
    with pytest.raises(NotImplementedError):
        calib.HistogramCalibrator(8, 0, False)
    with pytest.warns(UserWarning, match="grow_method"):
        make(grow_method="stretch")
    positional = calib.HistogramCalibrator(8, None, False, 16, None, True, False)
    positional.collect(torch.tensor([0.0, 1.0]))
    assert len(positional._calib_hist) == 16
    assert isinstance(positional._calib_hist, np.ndarray)
    assert positional._calib_hist.sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_histogram_of_absolute_values_from_zero(dtype: torch.dtype) -> None:
    x = (randn(40, 30) * 20).to(dtype)
    calibrator = make(num_bins=64)
    calibrator.collect(x)
    values = x.double().abs().numpy()
    counts, edges = np.histogram(values, bins=64, range=(0, values.max()))
    np.testing.assert_array_equal(np.asarray(calibrator._calib_hist), counts)
    np.testing.assert_allclose(np.asarray(calibrator._calib_bin_edges), edges, rtol=1e-6)
    assert make()._num_bins == 2048


def test_histogram_grows_by_whole_bins_of_the_first_width() -> None:
    both = [make(num_bins=10, torch_hist=torch_hist) for torch_hist in (True, False)]
    for calibrator in both:
        for x in ([1.0, 0.55], [-2.31], [0.05]):
            calibrator.collect(torch.tensor(x))
        hist, edges = np.asarray(calibrator._calib_hist), np.asarray(calibrator._calib_bin_edges)
        assert len(edges) == len(hist) + 1 == 25
        np.testing.assert_allclose(edges, np.arange(25) * 0.1, rtol=1e-6)
        assert {i: n for i, n in enumerate(hist) if n} == {0: 1, 5: 1, 9: 1, 23: 1}
    assert isinstance(both[0]._calib_hist, Tensor)
    assert isinstance(both[1]._calib_hist, np.ndarray)


def test_skip_zeros() -> None:
    x = torch.tensor([0.0, 0.0, 0.01, 1.0])
    for skip, first in ((False, 3), (True, 1)):
        calibrator = make(num_bins=4, skip_zeros=skip)
        calibrator.collect(x)
        assert np.asarray(calibrator._calib_hist).tolist() == [first, 0, 0, 1]


def test_reset() -> None:
    calibrator = make()
    calibrator.collect(randn(10))
    calibrator.reset()
    assert calibrator._calib_hist is None
    assert calibrator._calib_bin_edges is None
    assert calibrator.compute_amax("mse") is None
    calibrator.collect(torch.tensor([5.0]))
    assert float(calibrator._calib_bin_edges[-1]) == 5


def test_compute_amax_refuses() -> None:
    calibrator = make()
    for method in ("entropy", "mse", "percentile"):
        assert calibrator.compute_amax(method) is None
    calibrator.collect(randn(100))
    for method in ("max", "minmax", ""):
        with pytest.raises(TypeError):
            calibrator.compute_amax(method)
    for percentile in (-0.1, 100.1, 200):
        with pytest.raises(ValueError, match="range"):
            calibrator.compute_amax("percentile", percentile=percentile)
    with pytest.raises(TypeError):
        calibrator.compute_amax("mse", 2)  # type: ignore[misc]  # stride is a keyword


@pytest.mark.parametrize("kind", [calib.MaxCalibrator, calib.HistogramCalibrator])
def test_repr_and_str(kind: Any) -> None:
    calibrator = kind(8, None, False)
    assert kind.__name__ in repr(calibrator)
    assert kind.__name__ in str(calibrator)
    calibrator.collect(randn(10))
    assert kind.__name__ in repr(calibrator)
    assert kind.__name__ in str(calibrator)


# -- how amax is searched: the definitions, written as loops ---------------------------------------


@pytest.fixture(params=[False, True], ids=["signed", "unsigned"])
def seen(request: pytest.FixtureRequest) -> tuple[calib.HistogramCalibrator, np.ndarray, np.ndarray, bool]:
    calibrator = calib.HistogramCalibrator(4, None, request.param, num_bins=40)
    x = randn(600)
    calibrator.collect(x)
    calibrator.collect(x * 1.5)
    return calibrator, np.asarray(calibrator._calib_hist), np.asarray(calibrator._edges()), request.param


@pytest.mark.parametrize("percentile", [0.0, 50.0, 90.0, 99.99, 100.0])
def test_percentile_by_its_definition(seen: Any, percentile: float) -> None:
    calibrator, hist, edges, _ = seen
    share = np.cumsum(hist) / hist.sum()
    first = next(i for i in range(len(hist)) if share[i] >= percentile / 100)
    assert calibrator.compute_amax("percentile", percentile=percentile) == np.float32(edges[first])
    if percentile == 99.99:
        assert calibrator.compute_amax("percentile") == np.float32(edges[first])


@pytest.mark.parametrize(("start_bin", "stride"), [(8, 1), (5, 3)])
def test_mse_by_its_definition(seen: Any, start_bin: int, stride: int) -> None:
    calibrator, hist, edges, unsigned = seen
    centres = torch.as_tensor((edges[1:] + edges[:-1]) / 2)
    weights = torch.as_tensor(hist, dtype=torch.float64)
    errors = {
        i: float(((fake_tensor_quant(centres, centres[i], 4, unsigned) - centres) ** 2 * weights).sum())
        for i in range(start_bin, len(hist), stride)
    }
    best = min(errors, key=errors.__getitem__)
    assert calibrator.compute_amax("mse", start_bin=start_bin, stride=stride) == centres[best].float()


def test_mse_for_e4m3() -> None:
    calibrator = calib.HistogramCalibrator((4, 3), None, False, num_bins=30)
    calibrator.collect(randn(300))
    edges = np.asarray(calibrator._edges())
    centres = torch.as_tensor((edges[1:] + edges[:-1]) / 2)
    weights = torch.as_tensor(np.asarray(calibrator._calib_hist), dtype=torch.float64)
    errors = [float(((scaled_e4m3(centres, centres[i]) - centres) ** 2 * weights).sum()) for i in range(4, 30)]
    assert calibrator.compute_amax("mse", start_bin=4) == centres[4 + int(np.argmin(errors))].float()


@pytest.mark.parametrize(("start_bin", "stride"), [(16, 1), (20, 3)])
def test_entropy_by_its_definition(seen: Any, start_bin: int, stride: int) -> None:
    calibrator, hist, edges, unsigned = seen
    h = hist.astype(np.float64)
    h[0] = h[1]
    levels = 2 ** (4 - 1 + unsigned)
    divergences = {}
    for i in range(start_bin, len(h) + 1, stride):
        reference = h[:i].copy()
        reference[-1] += h[i:].sum()
        # The levels have equal width over [0, i].
        level = np.minimum(np.floor(np.arange(i) * levels / i + 1e-12).astype(int), levels - 1)
        quantized = np.zeros(i)
        for k in range(levels):
            used = (level == k) & (h[:i] > 0)
            if used.any():
                quantized[used] = h[:i][level == k].sum() / used.sum()
        p, q = reference / reference.sum(), quantized / quantized.sum()
        with np.errstate(divide="ignore"):
            divergences[i] = float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))
    lowest = min(divergences.values())
    best = max(i for i, value in divergences.items() if value <= lowest + 1e-12)
    assert calibrator.compute_amax("entropy", start_bin=start_bin, stride=stride) == np.float32(edges[best])


def test_the_last_of_equals_wins_entropy() -> None:
    calibrator = make(num_bins=8)
    calibrator.collect(torch.arange(8) + 0.5)  # uniform: no candidate loses anything
    calibrator.collect(torch.tensor([0.1]))
    found = calibrator.compute_amax("entropy", start_bin=4)
    assert found is not None
    assert float(found) == pytest.approx(7.5)


def test_nothing_is_logged_above_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for calibrator in (calib.MaxCalibrator(8, None, True), calib.HistogramCalibrator(8, None, True)):
            calibrator.collect(randn(10))
    assert not caplog.records


def test_a_planted_histogram_is_solved() -> None:
    counts = np.array([1, 2, 3, 2, 1, 0, 0, 1])
    for kind in (np.asarray, torch.tensor):
        calibrator = calib.HistogramCalibrator(8, None, False, num_bins=8)
        calibrator._calib_hist = kind(counts)
        calibrator._calib_bin_edges = kind(np.linspace(0, 4, 9))
        assert calibrator.compute_amax("percentile", percentile=80) == 1.5
        calibrator.collect(torch.tensor([3.9, 4.2]))
        np.testing.assert_array_equal(calibrator._calib_hist, [1, 2, 3, 2, 1, 0, 0, 2, 1])


@pytest.mark.parametrize("num_bins", [7, 100, 1000, 2048])
def test_the_first_batch_gets_num_bins(num_bins: int) -> None:
    for seed in range(50):
        calibrator = calib.HistogramCalibrator(8, None, False, num_bins=num_bins)
        x = torch.rand(50, generator=torch.Generator().manual_seed(seed))
        calibrator.collect(x)
        assert len(calibrator._calib_hist) == num_bins
        assert int(calibrator._calib_hist.sum()) == 50 and int(calibrator._calib_hist[-1]) >= 1


def test_entropy_takes_a_candidate_also_where_all_are_equally_bad() -> None:
    calibrator = calib.HistogramCalibrator(8, None, False, num_bins=1000)
    calibrator.collect(torch.cat([torch.rand(1000, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0])]))
    amax = calibrator.compute_amax("entropy", stride=3)
    assert any(abs(float(amax) - 0.1 * i) < 1e-4 for i in range(128, 1001, 3))
