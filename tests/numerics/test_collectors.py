"""Collectors: exact counts, whatever the order of the batches, their split and their dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdq.calib import HistogramCollector, RangeCollector

batch = st.builds(
    lambda values, power: torch.tensor(values, dtype=torch.float32) * 10.0**power,
    st.lists(st.one_of(st.floats(-10, 10, width=32), st.just(0.0)), max_size=20),
    st.sampled_from([-40, -6, 0, 1, 5, 30]),
)


def state(c: HistogramCollector) -> tuple[object, ...]:
    return c.counts.tolist(), c.edges.tolist(), c.min, c.max, c.total, c.zeros, c.nonfinite


def fill(batches: list[Tensor], num_bins: int = 32) -> HistogramCollector:
    collector = HistogramCollector(num_bins)
    for x in batches:
        collector.collect(x)
    return collector


@given(st.lists(batch, max_size=5), st.randoms(use_true_random=False))
def test_order_split_and_merge_do_not_matter(batches: list[Tensor], random: object) -> None:
    everything = torch.cat([torch.zeros(0), *batches])
    at_once = fill([everything])
    shuffled = list(everything.split(3))
    random.shuffle(shuffled)  # pyright: ignore[reportAttributeAccessIssue]
    assert state(fill(shuffled)) == state(at_once)
    half, other = fill(shuffled[::2]), fill(shuffled[1::2])
    half.merge(other)
    assert state(half) == state(at_once)


@given(st.lists(batch, min_size=1, max_size=4))
def test_counts_are_exact(batches: list[Tensor]) -> None:
    collector = fill(batches)
    values = torch.cat(batches).double()
    assert collector.total == values.numel() == int(collector.counts.sum())
    if not values.numel():
        assert collector.counts.numel() == 0
        return
    assert (collector.min, collector.max) == (float(values.min()), float(values.max()))
    assert collector.zeros == int((values == 0).sum())
    edges = collector.edges
    assert 0.0 in edges.tolist()
    assert collector.counts.numel() <= collector.num_bins
    assert edges.numel() == collector.counts.numel() + 1
    assert collector.edges[-collector.first] == 0
    index = torch.bucketize(values, edges, right=True) - 1
    assert torch.equal(torch.bincount(index, minlength=collector.counts.numel()), collector.counts)


def test_bins_are_as_fine_as_they_can_be() -> None:
    x = torch.linspace(-1, 3, 1000)
    collector = fill([x], 4096)
    assert collector.width == 2.0**-9  # 4096 of 2**-10 would end at 2.999
    assert collector.counts.numel() == 2049
    assert fill([x.abs() * 0.99 + 0.001], 4096).counts.numel() > 2048


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool]
)
def test_every_dtype_gives_the_same_counts(dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1, 1, 0, 1]) if dtype == torch.bool else torch.tensor([0, 3, 100, 100, 7])
    assert state(fill([x.to(dtype)])) == state(fill([x.float()]))


def test_layouts_chunks_and_gradients() -> None:
    x = torch.randn(600, 1000, generator=torch.Generator().manual_seed(0))
    expected = state(fill([x], 4096))
    assert state(fill([x.t()], 4096)) == expected
    assert state(fill([x[:, None].requires_grad_()], 4096)) == expected
    assert state(fill([x[0, 0], x.flatten()[1:]], 4096)) == expected  # 0-d


def test_values_that_are_not_finite_are_counted_apart() -> None:
    x = torch.tensor([1.0, float("nan"), -2.0, float("inf"), -float("inf"), 0.0])
    for collector in (RangeCollector(), HistogramCollector()):
        collector.collect(x)
        assert (collector.min, collector.max, collector.total, collector.nonfinite) == (-2, 1, 3, 3)
        collector.collect(torch.tensor([float("nan")]))
        collector.collect(torch.zeros(0))
        assert (collector.total, collector.nonfinite) == (3, 4)
        assert "nonfinite=4" in repr(collector)
    histogram = HistogramCollector()
    histogram.collect(x)
    assert histogram.counts.sum() == 3


def test_range_collector_streams_and_merges() -> None:
    a, b = RangeCollector(), RangeCollector()
    assert "no data" in repr(a)
    a.collect(torch.tensor([3, -1]))
    b.collect(torch.tensor([5.5, float("nan")]))
    a.merge(b)
    assert (a.min, a.max, a.total, a.nonfinite) == (-1, 5.5, 3, 1)


def test_counts_are_a_copy() -> None:
    collector = fill([torch.ones(3)])
    collector.counts.zero_()
    assert collector.counts.sum() == 3


def test_bad_use_is_refused() -> None:
    with pytest.raises(ValueError, match="num_bins must be at least 2, got 1"):
        HistogramCollector(1)
    with pytest.raises(TypeError, match=r"real values, got torch\.complex64"):
        RangeCollector().collect(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="only a HistogramCollector can be merged, got RangeCollector"):
        HistogramCollector().merge(RangeCollector())
    with pytest.raises(ValueError, match="num_bins differs: 4096 here, 64"):
        HistogramCollector().merge(HistogramCollector(64))
