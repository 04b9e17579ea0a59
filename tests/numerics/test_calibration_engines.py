"""Calibration on the compiled kernels and on the reference engine: the same figures, those of the definition."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from numerics.strategies import inputs
from qdq import nn
from qdq.calib import HistogramCalibrator, HistogramCollector, MaxCalibrator, RangeCollector, calibrate_weights
from qdq.calib.calibrator import reduce_amax, reduce_keeping
from qdq.kernels import engine, native, reference

ENGINES = ["reference"] if native.library().functions is None else ["reference", "cpu"]
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)

pytestmark = pytest.mark.filterwarnings("ignore:the calibration data hold NaN")


@pytest.fixture(params=ENGINES)
def forced(request: pytest.FixtureRequest) -> Iterator[str]:
    with engine.forced(request.param):
        yield request.param


def on_every_engine(compute: Callable[[], Any]) -> Any:
    """What ``compute`` gives, once all engines have agreed."""
    results: list[Any] = []
    for name in ENGINES:
        with engine.forced(name):
            results.append(compute())
    assert all(repr(result) == repr(results[0]) for result in results)
    return results[0]


@st.composite
def batches(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS) -> list[Tensor]:
    """Some tensors: of several magnitudes and layouts, after a ReLU, clipped, with special values."""
    dtype = draw(st.sampled_from(dtypes))
    result = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            x = draw(inputs((dtype,)))
        else:
            shape = draw(st.sampled_from([(2, 3, 4, 5), (70, 9), (1, 6, 1, 2)]))
            x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
            x = (x.double() * 10.0 ** draw(st.integers(-2, 2))).to(dtype)
            x = draw(
                st.sampled_from([x, x.transpose(0, -1), x[..., ::2], x[1:], x.swapaxes(1, -1).clone().swapaxes(1, -1)])
            )
        change = draw(st.sampled_from(["none", "relu", "clip", "round", "zeros"]))
        if change == "relu":
            x = x.relu()
        elif change == "clip":
            x = x.clamp(-6, 6)
        elif change == "round":
            x = x.round()
        elif change == "zeros":
            x = x * 0
        result.append(x)
    return result


def finite_values(x: Tensor) -> np.ndarray:
    values = x.detach().double().numpy().reshape(-1)
    return values[np.isfinite(values)]


def counted_by_edges(data: list[Tensor], num_bins: int, skip_zeros: bool) -> tuple[list[int] | None, float]:
    """The counts and the width of a HistogramCalibrator, from its documentation."""
    counts, width, zeros = None, 0.0, 0
    for x in data:
        values = np.abs(finite_values(x))
        values = values[values != 0] if skip_zeros else values
        if not values.size:
            continue
        counts = np.zeros(num_bins, np.int64) if counts is None else counts
        width = width or float(values.max()) / num_bins
        if width == 0:
            zeros += values.size
            continue
        needed = math.ceil(values.max() / width * (1 - 1e-12))
        counts = np.pad(counts, (0, max(0, needed - counts.size)))
        edges = np.arange(counts.size + 1) * width
        place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, counts.size - 1)
        counts += np.bincount(place, minlength=counts.size)
    if counts is None:
        return None, width
    counts[0] += zeros
    return counts.tolist(), width


def calibrated(data: list[Tensor], num_bins: int, skip_zeros: bool) -> tuple[list[int] | None, float]:
    calibrator = HistogramCalibrator(num_bins=num_bins, skip_zeros=skip_zeros)
    for x in data:
        calibrator.collect(x)
    counts = calibrator._counts
    return None if counts is None else counts.tolist(), calibrator._width


@given(batches(), st.sampled_from([1, 3, 16, 100]), st.booleans())
def test_histogram_calibrator(data: list[Tensor], num_bins: int, skip_zeros: bool) -> None:
    largest = [values.max() for x in data if (values := np.abs(finite_values(x))).any()]
    assume(not largest or max(largest) / largest[0] * num_bins < 200_000)
    expected = counted_by_edges(data, num_bins, skip_zeros)
    assert on_every_engine(lambda: calibrated(data, num_bins, skip_zeros)) == expected


@given(st.data(), st.sampled_from([1, 7, 64]), st.sampled_from([torch.float32, torch.float64]), st.floats(1e-3, 1e3))
def test_histogram_calibrator_at_edges(data: st.DataObject, num_bins: int, dtype: torch.dtype, largest: float) -> None:
    first = torch.tensor([largest], dtype=dtype)
    width = float(first) / num_bins
    index = np.array(data.draw(st.lists(st.integers(0, 2 * num_bins + 2), min_size=1, max_size=20)), np.float64)
    edges = index * width
    near = np.concatenate([edges, np.nextafter(edges, 0), np.nextafter(edges, np.inf), edges * (1 + 3e-13)])
    second = torch.from_numpy(near).to(dtype)
    stream = [first, second, -second, first]
    assert on_every_engine(lambda: calibrated(stream, num_bins, False)) == counted_by_edges(stream, num_bins, False)


def test_upper_end_of_the_last_bin(forced: str) -> None:
    calibrator = HistogramCalibrator(num_bins=3)
    calibrator.collect(torch.tensor([0.3], dtype=torch.float64))
    calibrator.collect(torch.tensor([0.3 * (1 + 5e-13), -0.3], dtype=torch.float64))
    assert calibrator._counts is not None
    assert calibrator._counts.tolist() == [0, 0, 3]
    calibrator.collect(torch.tensor([0.3 * (1 + 1e-11)], dtype=torch.float64))
    assert calibrator._counts.tolist() == [0, 0, 3, 1]
    # What is so near the end that rounding decides is counted once, in whichever bin.
    near = 0.1 * (1 + 1e-12)
    for steps in range(-8, 9):
        value = torch.tensor([near + steps * math.ulp(near)], dtype=torch.float64)
        counts, _ = calibrated([torch.tensor([0.1], dtype=torch.float64), value], 2, False)
        assert sum(counts or []) == 2


@pytest.mark.parametrize("dtype", FLOATS[:2])
@pytest.mark.parametrize("skip_zeros", [False, True])
def test_denormal_numbers(dtype: torch.dtype, skip_zeros: bool) -> None:
    step = 2.0 ** (-149 if dtype is torch.float32 else -1074)
    # Half the smallest float64 is 0: the first batch fixes no width, the second one that is 1 unit.
    stream = [torch.tensor(v, dtype=dtype) * step for v in ([0.0, 1.0], [-8.0, 5.0, 0.0], [-9.0])]
    expected = counted_by_edges(stream, 8, skip_zeros)
    assert on_every_engine(lambda: calibrated(stream, 8, skip_zeros)) == expected
    assert sum(expected[0] or []) == (4 if skip_zeros else 6)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_count_as_floats(dtype: torch.dtype, forced: str) -> None:
    values = [0, 1, 1, 0, 1] if dtype is torch.bool else [0, 3, 100, 7, 100]
    x = torch.tensor(values)
    assert calibrated([x.to(dtype)] * 2, 8, True) == calibrated([x.float()] * 2, 8, True)
    assert collected([x.to(dtype)] * 2, 8) == collected([x.float()] * 2, 8)
    calibrator = MaxCalibrator()
    calibrator.collect(x.to(dtype))
    assert calibrator.compute_amax() == max(values)


def test_the_smallest_integer_has_an_absolute_value(forced: str) -> None:
    # abs(-128) is -128 in int8.
    assert calibrated([torch.tensor([-128, 1], dtype=torch.int8)], 4, False) == ([1, 0, 0, 1], 32.0)


def test_a_range_already_seen_is_read_once(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrator = HistogramCalibrator(num_bins=4)
    calibrator.collect(torch.tensor([0.0, 4.0]))
    compute = engine.for_tensor(torch.zeros(1))
    monkeypatch.delattr(compute, "absmax")
    calibrator.collect(torch.tensor([[-4.0, 0.0, 1.5]]))
    assert calibrator._counts is not None
    assert calibrator._counts.tolist() == [2, 1, 0, 2]
    calibrator.collect(torch.zeros(0))
    with pytest.raises(AttributeError, match="absmax"):
        calibrator.collect(torch.tensor([4.1]))
    assert calibrator._counts.tolist() == [2, 1, 0, 2]


def test_a_refused_batch_changes_nothing(forced: str) -> None:
    calibrator = HistogramCalibrator(num_bins=4)
    calibrator.collect(torch.tensor([1e-9]))
    with pytest.raises(RuntimeError, match=r"a value of 1 needs 4\d+ bins of the width 2.5e-10"):
        calibrator.collect(torch.tensor([1e-9, 1.0]))
    assert calibrator._counts is not None
    assert calibrator._counts.tolist() == [0, 0, 0, 1]


def test_only_values_that_are_not_finite(forced: str) -> None:
    nothing = torch.tensor([math.nan, math.inf])
    for skip_zeros in (False, True):
        calibrator = HistogramCalibrator(num_bins=2, skip_zeros=skip_zeros)
        with pytest.warns(UserWarning, match="NaN or infinite values: they are left out") as warned:
            calibrator.collect(nothing)
        assert warned[0].filename.endswith(("_contextlib.py", "test_calibration_engines.py"))
        assert calibrator._counts is None
        calibrator.collect(torch.tensor([math.nan, 0.0, -2.0]))
        assert calibrator._counts is not None
        assert calibrator._counts.tolist() == [1 - skip_zeros, 1]


def test_large_tensors_and_threads() -> None:
    x = torch.randn(5, 7, 43, 47, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for y in (x, x.to(memory_format=torch.channels_last), x[:, 1:], x.half()):
            stream = [y, y * 0.999, y.relu(), y * 1.7]
            counts, _ = calibrated(stream, 2048, True)
            assert sum(counts or []) == sum(int((v != 0).sum()) for v in stream)
            with engine.forced("reference"):
                assert calibrated(stream, 2048, True)[0] == counts
            kept = collected(stream, 4096)
            with engine.forced("reference"):
                assert collected(stream, 4096) == kept
    finally:
        torch.set_num_threads(threads)


def collected(data: list[Tensor], num_bins: int) -> tuple[object, ...]:
    collector, ranges = HistogramCollector(num_bins), RangeCollector()
    for x in data:
        collector.collect(x)
        ranges.collect(x)
    seen = [(c.min, c.max, c.total, c.nonfinite) for c in (collector, ranges)]
    assert seen[0] == seen[1]
    return collector.counts.tolist(), collector.first, collector.width, collector.zeros, *seen[0]


def check_collected(data: list[Tensor], num_bins: int) -> None:
    counts, first, width, zeros, low, high, total, nonfinite = on_every_engine(lambda: collected(data, num_bins))
    values = np.concatenate([np.zeros(0), *[finite_values(x) for x in data]])
    assert total == values.size
    assert total + nonfinite == sum(x.numel() for x in data)
    if not values.size:
        assert counts == []
        return
    assert (low, high, zeros) == (values.min(), values.max(), int((values == 0).sum()))
    assert len(counts) <= num_bins
    edges = np.arange(first, first + len(counts) + 1, dtype=np.float64) * width
    place = np.searchsorted(edges, values, side="right") - 1
    np.testing.assert_array_equal(np.bincount(place, minlength=len(counts)), counts)


@given(batches(), st.sampled_from([2, 3, 32, 4096]))
def test_collectors(data: list[Tensor], num_bins: int) -> None:
    check_collected(data, num_bins)


@given(st.data(), st.sampled_from(FLOATS), st.integers(-20, 12))
def test_histogram_collector_at_edges(data: st.DataObject, dtype: torch.dtype, exponent: int) -> None:
    index = np.array(data.draw(st.lists(st.integers(-20, 20), min_size=1, max_size=20)), np.float64)
    edges = index * 2.0**exponent
    values = np.concatenate([edges, np.nextafter(edges, -np.inf), np.nextafter(edges, np.inf)])
    check_collected([torch.from_numpy(v).to(dtype) for v in (edges, values)], 32)


@pytest.mark.parametrize("dtype", FLOATS[:2])
@pytest.mark.parametrize("largest", [0.75, 6.0, 3e38])
def test_tiny_negative_values_lie_below_zero(dtype: torch.dtype, largest: float) -> None:
    # Their quotient by the width is 0.
    tiny = -5e-324 if dtype is torch.float64 else -1e-45
    batch = torch.tensor([tiny, 0.0, -0.0, -tiny, tiny], dtype=dtype)
    for stream in ([batch, torch.tensor([largest], dtype=dtype)], [torch.tensor([largest], dtype=dtype), batch]):
        for num_bins in (2, 32):
            check_collected(stream, num_bins)
            half, other = HistogramCollector(num_bins), HistogramCollector(num_bins)
            half.collect(stream[0])
            other.collect(stream[1])
            half.merge(other)
            assert half.counts.tolist() == collected(stream, num_bins)[0]


def amax_by_numpy(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> np.ndarray:
    values = np.abs(x.detach().double().numpy())
    result = values.max(axes, keepdims=keepdims, initial=0) if axes else values
    return result.reshape(()) if result.size == 1 else result


@given(st.data(), st.booleans())
def test_reduce_amax_over_any_axes(data: st.DataObject, keepdims: bool) -> None:
    for x in data.draw(batches()):
        axes = tuple(sorted(data.draw(st.sets(st.integers(0, x.dim() - 1)) if x.dim() else st.just(set()))))
        expected = amax_by_numpy(x, axes, keepdims)
        for name in ENGINES:
            with engine.forced(name):
                found = reduce_amax(x, axes, keepdims)
                assert found.dtype == x.dtype
                assert not found.signbit().logical_and(found == 0).any()
                np.testing.assert_array_equal(found.double().numpy(), expected, strict=True)
                kept = tuple(axis for axis in range(x.dim()) if axis not in axes)
                assert torch.equal(reduce_keeping(x, kept).nan_to_num(-1), reduce_amax(x, axes).nan_to_num(-1))
                everything = amax_by_numpy(x, tuple(range(x.dim())), False)
                np.testing.assert_array_equal(reduce_keeping(x, None).double(), everything, strict=True)


@given(batches(), st.sampled_from([None, 0, -1]))
def test_max_calibrator(data: list[Tensor], axis: int | None) -> None:
    data = [x for x in data if x.dim() == 2 and x.shape == data[0].shape and x.numel()]

    def amax() -> list[object]:
        calibrator = MaxCalibrator(axis=axis, track_amax=True)
        for x in data:
            calibrator.collect(x)
        seen = calibrator._calib_amax
        return [None if seen is None else (seen.dtype, seen.tolist()), [v.tolist() for v in calibrator.amaxs]]

    on_every_engine(amax)


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
def test_the_amax_can_be_traced(forced: str, axis: int | tuple[int, ...] | None) -> None:
    class Amax(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return reduce_keeping(x, axis)

    model = Amax()
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    expected = model(x * 3)
    assert torch.equal(expected, amax_of_abs(x * 3, axis))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sizes become constants; that newer versions advise against it
        traced: Any = torch.jit.trace(model, (x,))
    assert torch.equal(traced(x * 3), expected)
    assert torch.equal(torch.export.export(model, (x,)).module()(x * 3), expected)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x * 3), expected)
    assert model(x.to("meta")).shape == expected.shape
    assert torch.equal(torch.func.vmap(model)(torch.stack([x, x * 3]))[1], expected)


def amax_of_abs(x: Tensor, axis: int | tuple[int, ...] | None) -> Tensor:
    kept = () if axis is None else (axis,) if isinstance(axis, int) else axis
    return x.abs().amax(tuple(i for i in range(x.dim()) if i not in kept), keepdim=bool(kept))


@pytest.mark.parametrize("make", [HistogramCalibrator, HistogramCollector, RangeCollector, MaxCalibrator])
def test_collecting_inside_a_compiled_function(make: type, forced: str) -> None:
    inside, outside = make(), make()

    def step(x: Tensor) -> Tensor:
        inside.collect(x * 2)
        return x + 1

    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(step, backend="eager")
    for _ in range(2):
        compiled(x)
        outside.collect(x * 2)
    assert str(inside) == str(outside)
    for name in ("_counts", "_calib_amax", "min", "max", "total"):
        torch.testing.assert_close(getattr(inside, name, None), getattr(outside, name, None), rtol=0, atol=0)


def test_every_engine_takes_what_the_kernels_do_not_see(forced: str) -> None:
    class Marked(Tensor):
        pass

    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    marked = x.as_subclass(Marked)
    assert engine.for_tensor(marked) is reference
    assert calibrated([marked, x], 8, False) == calibrated([x, x], 8, False)
    assert collected([marked, x], 8) == collected([x, x], 8)
    assert torch.equal(reduce_keeping(marked, 1), reduce_keeping(x, 1))


@pytest.mark.parametrize("method", ["percentile", "mse"])
@pytest.mark.parametrize("columns", [100, 5000])
def test_weights_of_short_and_long_rows(forced: str, method: str, columns: int) -> None:
    layer = nn.QuantLinear(columns, 3)
    with torch.no_grad():
        layer.weight[1] *= 0
        layer.weight[2, 0] = -9
    for perchannel in (True, False):
        calibrate_weights(layer, method, perchannel=perchannel, percentile=99, num_bins=150)
        found = layer.weight_quantizer.amax
        assert isinstance(found, Tensor)
        rows = layer.weight.detach() if perchannel else layer.weight.detach().reshape(1, -1)
        for row, amax in zip(rows, found.reshape(-1), strict=True):
            calibrator = HistogramCalibrator(num_bins=150)
            calibrator.collect(row)
            assert calibrator.compute_amax(method, percentile=99) == amax
