"""Statistics, histograms and sums of gradients: the CPU engine, the reference, and numpy in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from numerics.engine_data import (
    DTYPES,
    LEVELS,
    SHAPES,
    SIZES,
    VIEWS,
    adversarial,
    as_tuple,
    assert_same,
    level,
    threads,
)
from qdq.kernels import native, reference

if native.library().functions is None:
    pytest.skip(native.library().reason, allow_module_level=True)
from qdq.kernels import cpu

seeds = st.integers(0, 2**31)
views = st.sampled_from(list(VIEWS))
shapes = st.one_of(st.sampled_from(SHAPES), st.tuples(st.sampled_from(SIZES)))
# Sums of this many are shared by two threads.
MANY = 33001


def every_way(name: str, *arguments: Any) -> list[tuple[Tensor, ...]]:
    """What the CPU engine gives at every level and number of threads."""
    results = []
    for wanted in LEVELS:
        for count in (1, 2):
            with level(wanted), threads(count):
                results.append(as_tuple(getattr(cpu, name)(*arguments)))
    return results


def wide(x: Tensor) -> np.ndarray:
    return x.detach().resolve_neg().double().numpy()


# -- absolute maximum, minimum and maximum ---------------------------------------------------------


@settings(max_examples=100)
@given(st.data(), shapes, st.sampled_from(DTYPES), seeds, views, st.booleans())
def test_extrema(
    data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype, seed: int, view: str, with_nan: bool
) -> None:
    x = adversarial(shape, dtype, seed)
    x = VIEWS[view](x if with_nan else torch.nan_to_num(x, nan=-3.0, posinf=math.inf, neginf=-math.inf))
    axis = data.draw(st.sampled_from((None, *range(-x.dim(), x.dim()))))
    kept = () if axis is None else (x.shape[axis],)
    rows = wide(x).reshape(1, -1) if axis is None else np.moveaxis(wide(x), axis, 0)
    rows = rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))
    largest = np.abs(rows).max(axis=1, initial=0.0).reshape(kept)
    for (found,) in every_way("absmax", x, axis):
        assert_same(found, torch.tensor(largest).to(dtype))
    assert_same(reference.absmax(x, axis), torch.tensor(largest).to(dtype))
    if rows.shape[1] == 0:
        for engine in (cpu, reference):
            with pytest.raises(ValueError, match="has no smallest and largest value"):
                engine.minmax(x, axis)
        return
    # The sign of a zero is not defined; a sum with 0 takes it away.  NaN goes into both.
    low, high = (reduce(rows, axis=1).reshape(kept) + 0.0 for reduce in (np.min, np.max))
    for found in (*every_way("minmax", x, axis), reference.minmax(x, axis)):
        assert_same(found[0] + 0.0, torch.tensor(low).to(dtype))
        assert_same(found[1] + 0.0, torch.tensor(high).to(dtype))


@pytest.mark.parametrize("axis", [2, -3])
def test_an_axis_out_of_range(axis: int) -> None:
    for engine in (cpu, reference):
        for name in ("absmax", "minmax"):
            with pytest.raises(ValueError, match=f"axis {axis} is out of range for a tensor of 2 dimensions"):
                getattr(engine, name)(torch.ones(2, 3), axis)
            with pytest.raises(ValueError, match="axis 0 is out of range for a tensor of 0 dimensions"):
                getattr(engine, name)(torch.ones(()), 0)


def test_one_nan_anywhere_is_seen() -> None:
    for n in (1, 31, 32, 33, 63, 64, 65, 1024, MANY):
        for place in {0, n // 2, n - 1}:
            x = torch.ones(n)
            x[place] = torch.nan
            for result in (*every_way("absmax", x), *every_way("minmax", x), *every_way("minmax", x.view(1, -1), 0)):
                assert all(value.isnan().all() for value in result)


# -- histograms ------------------------------------------------------------------------------------


def counted(x: Tensor, width: float, first: int, num_bins: int, absolute: bool) -> tuple[list[int], int, int]:
    """By a search in the list of edges."""
    values = wide(x).reshape(-1)
    values = np.abs(values) if absolute else values
    with np.errstate(over="ignore"):
        edges = np.arange(first, first + num_bins + 1).astype(np.float64) * width
    place = np.searchsorted(edges, values, side="right") - 1
    end = edges[-1] * (1 + 1e-12) if absolute else edges[-1]
    inside = (place >= 0) & ((values <= end) if absolute else (values < end)) & np.isfinite(values)
    counts = np.bincount(np.minimum(place[inside], num_bins - 1), minlength=num_bins)
    return counts.tolist(), int((~inside).sum()), int((values == 0).sum())


def on_edges(x: Tensor, width: float, first: int, num_bins: int, seed: int) -> Tensor:
    """``x`` with half of its values on edges of bins or next to them."""
    g = torch.Generator().manual_seed(seed)
    edges = (first + torch.randint(-1, num_bins + 2, x.shape, generator=g)).double() * width
    way = torch.randint(-1, 2, x.shape, generator=g)
    edges = edges.to(x.dtype)
    if x.dtype in (torch.float32, torch.float64):
        aside = torch.nextafter(edges, torch.where(way > 0, math.inf, -math.inf).to(x.dtype))
        edges = torch.where(way == 0, edges, aside)
    return torch.where(torch.rand(x.shape, generator=g) < 0.5, x, edges)


WIDTHS = [1 / 3, 0.1, 0.01, 1.0, 0.125, 2.0**-20, 4.0, 3.7, 1e-7, 1e-30, 1e-42, 3e-310, 2.0**-130, 1e30, 3e36, 1e300]


@settings(max_examples=150)
@given(
    *[shapes, st.sampled_from(DTYPES), seeds, views, st.sampled_from(WIDTHS)],
    *[st.sampled_from([1, 2, 7, 64, 333, 2048, 20000]), st.sampled_from([0, 0, -3, -1024, 5, 100000, -(2**30)])],
)
def test_histograms(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, view: str, width: float, num_bins: int, first: int
) -> None:
    for absolute in (True, False):
        start = 0 if absolute else first
        x = VIEWS[view](on_edges(adversarial(shape, dtype, seed), width, start, num_bins, seed))
        name, arguments = ("abs_histogram", (width,)) if absolute else ("histogram", (width, start))
        expected = counted(x, width, start, num_bins, absolute)
        for result in (
            *every_way(name, x, *arguments, num_bins),
            getattr(reference, name)(x, *arguments, num_bins),
        ):
            assert all(value.dtype == torch.int64 for value in result)
            assert tuple(value.tolist() for value in result) == expected
            assert sum(expected[0]) + expected[1] == x.numel()


@settings(max_examples=60)
@given(st.sampled_from(DTYPES), seeds, st.sampled_from([1, 3, 7, 64, 128, 1000, 2048, 5000]), st.floats(-40, 30))
def test_a_width_from_the_largest_value_leaves_nothing_out(
    dtype: torch.dtype, seed: int, num_bins: int, power: float
) -> None:
    x = (torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10.0**power).to(dtype)
    x = x[torch.isfinite(x)]
    largest = float(x.abs().max()) if x.numel() else 0.0
    if largest / num_bins == 0.0:
        return
    for result in (*every_way("abs_histogram", x, largest / num_bins, num_bins),):
        assert int(result[1]) == 0
        assert int(result[0].sum()) == x.numel()
        assert result[0][-1] >= 1


def test_histograms_of_many_values_and_threads() -> None:
    for dtype in DTYPES:
        x = on_edges(adversarial((MANY,), dtype, 4), 0.01, 0, 300, 4)
        expected = counted(x, 0.01, 0, 300, True)
        for result in every_way("abs_histogram", x, 0.01, 300):
            assert tuple(value.tolist() for value in result) == expected


def test_counts_beyond_what_float32_holds() -> None:
    n = 2**24 + 5
    zeros = torch.zeros(1, dtype=torch.float16).expand(n)  # which the engine copies
    for count in (1, 2):
        with threads(count):
            counts, outside, at_zero = cpu.abs_histogram(zeros, 0.5, 4)
            assert (counts.tolist(), int(outside), int(at_zero)) == ([n, 0, 0, 0], 0, n)
            counts, outside, at_zero = cpu.histogram(zeros, 0.5, 1, 4)
            assert (counts.tolist(), int(outside), int(at_zero)) == ([0, 0, 0, 0], n, n)
    ones = torch.ones(1, dtype=torch.float16).expand(n)
    low = torch.tensor(0.5, dtype=torch.float64)
    assert cpu.clip_gradient(ones, ones, -low, low)[1:] == (0, n)


def test_counts_start_anew() -> None:
    """One result must not depend on the call before it."""
    x = torch.rand(100)
    first = cpu.abs_histogram(x, 0.01, 100)[0].clone()
    assert torch.equal(cpu.abs_histogram(x, 0.01, 100)[0], first)


@pytest.mark.parametrize("width", [0.0, -1.0, math.inf, math.nan])
def test_bad_histograms(width: float) -> None:
    x = torch.ones(3)
    for engine in (cpu, reference):
        for call in (lambda e, w, n: e.abs_histogram(x, w, n), lambda e, w, n: e.histogram(x, w, 0, n)):
            with pytest.raises(ValueError, match="width must be positive and finite"):
                call(engine, width, 4)
            with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
                call(engine, 1.0, 0)
        with pytest.raises(TypeError, match="a histogram takes real values"):
            engine.histogram(torch.ones(3, dtype=torch.complex64), 1.0, 0, 4)


def test_integers_are_counted_too() -> None:
    for engine in (cpu, reference):
        counts, outside, zeros = engine.histogram(torch.tensor([0, 1, 1, 3, -2]), 1.0, 0, 3)
        assert (counts.tolist(), int(outside), int(zeros)) == ([1, 2, 0], 2, 1)


@pytest.mark.parametrize("name", ["histogram", "abs_histogram", "clip_gradient", "range_gradient", "absmax", "minmax"])
def test_under_another_default_device(name: str) -> None:
    """Memory that the engine takes for itself is on the CPU, whatever new tensors are by default."""
    x, one = torch.randn(50), torch.tensor(1.0)
    arguments = {"histogram": (x, 0.1, -5, 9), "abs_histogram": (x, 0.1, 9), "absmax": (x,), "minmax": (x,)}
    given = arguments.get(name, (x, x, -one, one))
    expected = as_tuple(getattr(cpu, name)(*given))
    with torch.device("meta"):
        found = as_tuple(getattr(cpu, name)(*given))
    for have, want in zip(found, expected, strict=True):
        assert have.is_cpu
        assert_same(have, want)


# -- sums of gradients -----------------------------------------------------------------------------


def assert_sum(found: Tensor, values: np.ndarray, like: Tensor) -> None:
    assert (found.dtype, found.shape) == (like.dtype, like.shape)
    values = values.reshape(-1).astype(np.float64)
    if np.isfinite(values).all():
        expected = math.fsum(values)
        rounding = 1e-13 * float(np.abs(values).sum()) + torch.finfo(like.dtype).eps * abs(expected) + 1e-45
        largest = torch.finfo(like.dtype).max
        if abs(expected) < largest:
            assert abs(float(found) - expected) <= rounding
        return
    with np.errstate(invalid="ignore"):
        expected = float(values.sum())
    assert math.isnan(expected) == math.isnan(float(found))
    assert math.isnan(expected) or float(found) == expected


@settings(max_examples=100)
@given(
    *[st.sampled_from(["range_gradient", "clip_gradient"]), shapes, st.sampled_from(DTYPES), seeds, views, views],
    *[st.sampled_from([(-1.0, 1.0), (0.0, 0.0), (-0.5, math.inf), (math.nan, 1.0), (-1e-40, 2.0), (1.0, -1.0)])],
    *[st.sampled_from([(), (1,), (1, 1, 1, 1, 1, 1)]), st.booleans()],
)
def test_sums_of_gradients(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    view: str,
    view_of_grad: str,
    ends: tuple[float, float],
    end_shape: tuple[int, ...],
    finite: bool,
) -> None:
    low, high = (torch.full(end_shape, end, dtype=torch.float64 if seed % 2 else torch.float32) for end in ends)
    x = VIEWS[view](adversarial(shape, dtype, seed, torch.tensor(1.0)))
    grad = adversarial(shape, dtype, seed + 1)
    grad = VIEWS[view_of_grad](torch.where(grad.abs() < 1e30, grad, 1.0) if finite else grad)
    values, gradients = wide(x), wide(grad)
    kind = np.float64 if dtype == torch.float64 else np.float32
    first, last = (wide(end).astype(kind).reshape(()) for end in (low, high))
    if name == "range_gradient":
        inside, below, above = (values >= first) & (values <= last), values < first, values > last
    else:
        inside, below, above = (values > first) & (values < last), values <= first, values >= last
    results = every_way(name, grad, x, low, high)
    for passed, sum_low, sum_high in (*results, getattr(reference, name)(grad, x, low, high)):
        assert_same(passed, torch.tensor(np.where(inside, gradients, 0.0)).to(dtype))
        assert_sum(sum_low, gradients[below], low)
        assert_sum(sum_high, gradients[above], high)
    for other in results[1:]:
        for have, want in zip(other, results[0], strict=True):
            assert_same(have, want)


@pytest.mark.parametrize("n", [1023, 1024, 1025, 32768, MANY, 70000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_do_not_depend_on_threads(n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    grad, x = (torch.randn(n, generator=generator).to(dtype) for _ in range(2))
    low = torch.tensor(-0.3, dtype=torch.float64)
    for name in ("range_gradient", "clip_gradient"):
        results = every_way(name, grad, x, low, -low)
        for result in results:
            for have, want in zip(result, results[0], strict=True):
                assert_same(have, want)
            assert_sum(result[1], wide(grad)[wide(x) < np.float32(-0.3)], low)


@pytest.mark.parametrize("name", ["range_gradient", "clip_gradient"])
def test_a_range_of_several_values(name: str) -> None:
    grad, x = torch.ones(2, 3), torch.tensor([[-2.0, 0.0, 2.0], [0.0, 5.0, 2.0]])
    low, high = torch.full((3,), -1.0), torch.ones(3)
    for engine in (cpu, reference):
        if name == "clip_gradient":
            with pytest.raises(ValueError, match="clip values can only be scalar in training"):
                engine.clip_gradient(grad, x, low, high)
        else:
            found = engine.range_gradient(grad, x, low, high)
            assert found[0].tolist() == [[0, 1, 0], [1, 0, 0]]
            assert [value.tolist() for value in found[1:]] == [[1, 0, 0], [0, 1, 2]]
