"""Maxima, ranges and histograms of the reference engine against numpy in float64, and against the collectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from numerics.strategies import inputs
from qdq.calib import HistogramCalibrator, HistogramCollector
from qdq.kernels.reference import abs_histogram, absmax, histogram, minmax
from qdq.kernels.reference.histogram import bin_index


def as_array(x: Tensor) -> np.ndarray:
    return x.detach().to(torch.float64).numpy()


def reduced(x: Tensor, axis: int | None) -> np.ndarray:
    """What is reduced, in the last axis."""
    values = as_array(x)
    if axis is None:
        return values.reshape(-1)
    moved = np.moveaxis(values, axis, 0)
    return moved.reshape(moved.shape[0], math.prod(moved.shape[1:]))


@given(st.data())
def test_extrema(data: st.DataObject) -> None:
    x = data.draw(inputs())
    axis = data.draw(st.sampled_from([None, *range(-x.dim(), x.dim())]))
    values = reduced(x, axis)
    largest = absmax(x, axis)
    assert largest.dtype == x.dtype
    assert largest.shape == values.shape[:-1]
    if values.shape[-1] == 0:
        assert (largest == 0).all()
        with pytest.raises(ValueError, match=r"has no smallest and largest value \(axis="):
            minmax(x, axis)
        return
    np.testing.assert_array_equal(as_array(largest), np.abs(values).max(axis=-1))
    low, high = minmax(x, axis)
    assert (low.dtype, high.dtype) == (x.dtype, x.dtype)
    np.testing.assert_array_equal(as_array(low), values.min(axis=-1))
    np.testing.assert_array_equal(as_array(high), values.max(axis=-1))


def test_extrema_of_denormals_infinities_and_nan() -> None:
    x = torch.tensor([[1e-45, -3e-45], [-torch.inf, 1.0], [torch.nan, 1.0], [-0.0, 0.0]])
    torch.testing.assert_close(absmax(x, 0), torch.tensor([3e-45, torch.inf, torch.nan, 0.0]), equal_nan=True)
    assert absmax(x).isnan()
    assert not absmax(x[3]).signbit()
    assert [v.isnan().tolist() for v in minmax(x, 0)] == [[False, False, True, False]] * 2
    assert absmax(torch.randn(4, 5, requires_grad=True)).requires_grad is False


def test_extrema_of_empty_slices() -> None:
    assert torch.equal(absmax(torch.empty(3, 0), 0), torch.zeros(3))
    assert absmax(torch.empty(0, 3), 0).shape == (0,)
    assert absmax(torch.empty(0)) == 0
    assert [v.shape for v in minmax(torch.empty(0, 3), 0)] == [(0,), (0,)]
    assert [v.tolist() for v in minmax(torch.tensor([2.0, -1.0]), 0)] == [[2.0, -1.0]] * 2


@pytest.mark.parametrize("function", [absmax, minmax])
def test_an_axis_out_of_range_is_refused(function: object) -> None:
    with pytest.raises(ValueError, match="axis 2 is out of range for a tensor of 2 dimensions"):
        function(torch.zeros(2, 3), 2)  # type: ignore[operator]
    with pytest.raises(ValueError, match="axis -1 is out of range for a tensor of 0 dimensions"):
        function(torch.zeros(()), -1)  # type: ignore[operator]


def test_extrema_can_be_traced() -> None:
    def every(x: Tensor) -> list[Tensor]:
        return [absmax(x), absmax(x, 1), *minmax(x), *minmax(x, -1)]

    x = torch.randn(2, 3, 4)
    compiled = torch.compile(every, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), every(x), rtol=0, atol=0)
    assert [v.shape for v in every(x.to("meta"))] == [v.shape for v in every(x)]


def by_edges(values: np.ndarray, width: float, first: int, num_bins: int, closed: bool) -> tuple[np.ndarray, int, int]:
    """One value after the other between edges that are rounded once."""
    edges = np.arange(first, first + num_bins + 1, dtype=np.float64) * width
    counts, outside = np.zeros(num_bins, np.int64), 0
    for value in values:
        place = int(np.searchsorted(edges, value, side="right")) - 1
        if closed and np.isfinite(value) and edges[-1] <= value <= num_bins * width * (1 + 1e-12):
            place = num_bins - 1
        if np.isfinite(value) and 0 <= place < num_bins:
            counts[place] += 1
        else:
            outside += 1
    return counts, outside, int((values == 0).sum())


def assert_counts(result: tuple[Tensor, Tensor, Tensor], expected: tuple[np.ndarray, int, int]) -> None:
    assert [v.dtype for v in result] == [torch.int64] * 3
    assert [v.dim() for v in result] == [1, 0, 0]
    np.testing.assert_array_equal(result[0].numpy(), expected[0])
    assert (int(result[1]), int(result[2])) == expected[1:]


WIDTHS = st.one_of(st.floats(1e-6, 1e3), st.integers(-140, 10).map(lambda e: 2.0**e), st.just(0.1))


@st.composite
def near_edges(draw: st.DrawFn, width: float, first: int, num_bins: int) -> Tensor:
    """Values at edges, next to edges, anywhere, and those that are no numbers."""
    index = draw(st.lists(st.integers(first - 2, first + num_bins + 2), min_size=1, max_size=20))
    edges = np.array(index, np.float64) * width
    values = np.concatenate([edges, np.nextafter(edges, -np.inf), np.nextafter(edges, np.inf), edges + 0.3 * width])
    values = np.append(values, draw(st.lists(st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf, 1e300, 5e-324]))))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    return torch.from_numpy(values).to(dtype)


@given(st.data(), WIDTHS, st.integers(-20, 20), st.integers(1, 30))
def test_histogram(data: st.DataObject, width: float, first: int, num_bins: int) -> None:
    x = data.draw(near_edges(width, first, num_bins))
    assert_counts(histogram(x, width, first, num_bins), by_edges(as_array(x), width, first, num_bins, False))


@given(st.data(), WIDTHS, st.integers(1, 30))
def test_abs_histogram(data: st.DataObject, width: float, num_bins: int) -> None:
    x = data.draw(near_edges(width, -num_bins, 2 * num_bins))
    assert_counts(abs_histogram(x, width, num_bins), by_edges(np.abs(as_array(x)), width, 0, num_bins, True))


@given(st.data())
def test_any_shape_and_strides(data: st.DataObject) -> None:
    x = data.draw(inputs())
    flat = as_array(x).reshape(-1)
    assert_counts(histogram(x, 0.25, -8, 16), by_edges(flat, 0.25, -8, 16, False))
    assert_counts(abs_histogram(x, 0.25, 8), by_edges(np.abs(flat), 0.25, 0, 8, True))


def test_the_upper_end_lies_in_the_last_bin_of_absolute_values_only() -> None:
    x = torch.tensor([-1.0, 1.0, 1.0 + 1e-13, 1.0 + 1e-11], dtype=torch.float64)
    assert abs_histogram(x, 0.25, 4)[0].tolist() == [0, 0, 0, 3]
    assert abs_histogram(x, 0.25, 4)[1] == 1
    assert histogram(x, 0.25, -4, 8)[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert histogram(x, 0.25, -4, 8)[1] == 3


def test_huge_and_tiny_widths() -> None:
    x = torch.tensor([torch.inf, torch.nan, 1e308, -1e308, 0.0], dtype=torch.float64)
    assert abs_histogram(x, 1e308, 4)[0].tolist() == [1, 2, 0, 0]
    assert abs_histogram(x, 1e308, 4)[1:] == (2, 1)
    assert histogram(x, 1e308, -2, 4)[0].tolist() == [0, 1, 1, 1]
    for counts, outside, zeros in (abs_histogram(x, 5e-324, 2), histogram(x, 5e-324, 0, 2)):
        assert (counts.tolist(), outside, zeros) == ([1, 0], 4, 1)


def test_bin_index_holds_where_the_quotient_rounds() -> None:
    index = torch.arange(1, 20_000)
    for width in (0.1, 1 / 3, 7e-5):
        edges = index.double() * width
        below = torch.from_numpy(np.nextafter(edges.numpy(), 0))
        assert (torch.floor(below / width) != index - 1).any(), "no quotient rounds across an edge"
        assert torch.equal(bin_index(edges, width), index)
        assert torch.equal(bin_index(below, width), index - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_agrees_with_the_histogram_calibrator(dtype: torch.dtype) -> None:
    calibrator = HistogramCalibrator(num_bins=100)
    generator = torch.Generator().manual_seed(3)
    batches = [(torch.randn(500, generator=generator) * s).to(dtype) for s in (10, 10, 25)]
    batches[1][::7] = 0
    expected = torch.zeros(0, dtype=torch.int64)
    for batch in batches:
        calibrator.collect(batch)
        collected = calibrator._calib_hist
        assert isinstance(collected, Tensor)
        counts, outside, zeros = abs_histogram(batch, calibrator._width, collected.numel())
        expected = counts + torch.nn.functional.pad(expected, (0, collected.numel() - expected.numel()))
        assert torch.equal(collected, expected)
        assert (outside, zeros) == (0, (batch == 0).sum())
    assert expected.numel() > 100


@given(st.data())
def test_the_first_batch_of_a_calibrator_lies_inside(data: st.DataObject) -> None:
    x = data.draw(inputs())
    finite = as_array(x)[np.isfinite(as_array(x))]
    num_bins = data.draw(st.integers(1, 300))
    width = float(np.abs(finite).max()) / num_bins if finite.size else 0.0
    if width == 0.0:
        return
    calibrator = HistogramCalibrator(num_bins=num_bins)
    calibrator.collect(torch.from_numpy(finite))
    counts, outside, _ = abs_histogram(torch.from_numpy(finite), width, num_bins)
    assert torch.equal(torch.as_tensor(calibrator._calib_hist), counts)
    assert outside == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("offset", [0.0, 30.0, -30.0])
def test_agrees_with_the_histogram_collector(dtype: torch.dtype, offset: float) -> None:
    collector = HistogramCollector(num_bins=64)
    x = (torch.randn(2000, generator=torch.Generator().manual_seed(4)) * 20 + offset).to(dtype)
    x[::9] = 0
    if dtype.is_floating_point:
        x[1] = -1e-30  # rounds to 0, or towards it, once divided
    collector.collect(x)
    counts, outside, zeros = histogram(x, collector.width, collector.first, collector.counts.numel())
    assert torch.equal(counts, collector.counts)
    assert (outside, zeros) == (collector.nonfinite, collector.zeros)


def test_counts_are_exact_beyond_24_bits() -> None:
    size = 2**25 + 1
    counts, outside, zeros = histogram(torch.full((1,), -0.5).expand(size), 1.0, -1, 2)
    assert (counts.tolist(), outside, zeros) == ([size, 0], 0, 0)


def test_large_tensors_of_any_strides_are_counted_in_pieces() -> None:
    x = torch.arange(3 * 700 * 500, dtype=torch.float32).reshape(3, 700, 500)
    expected = histogram(x, 4096.0, 1, 250)
    for same in (x.permute(2, 0, 1), torch.stack([x, x], dim=-1)[..., 0], x.flip(1)):
        assert all(torch.equal(a, b) for a, b in zip(histogram(same, 4096.0, 1, 250), expected, strict=True))
    tripled = histogram(x[:1].expand(3, -1, -1), 4096.0, 0, 250)
    assert torch.equal(tripled[0], 3 * histogram(x[:1], 4096.0, 0, 250)[0])
    assert tripled[2] == 3


@pytest.mark.parametrize("width", [0.0, -1.0, math.inf, math.nan])
def test_a_width_that_is_not_positive_and_finite_is_refused(width: float) -> None:
    for call in (lambda: histogram(torch.ones(2), width, 0, 4), lambda: abs_histogram(torch.ones(2), width, 4)):
        with pytest.raises(ValueError, match="width must be positive and finite, got"):
            call()


def test_no_bins_and_complex_values_are_refused() -> None:
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        histogram(torch.ones(2), 1.0, 0, 0)
    with pytest.raises(ValueError, match="num_bins must be at least 1, got -1"):
        abs_histogram(torch.ones(2), 1.0, -1)
    with pytest.raises(TypeError, match=r"takes real values, got torch\.complex64"):
        histogram(torch.ones(2, dtype=torch.complex64), 1.0, 0, 4)
