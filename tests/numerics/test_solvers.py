"""The searches for amax against slow loops written from their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from numerics import float64_reference as reference
from qdq.calib import HistogramCalibrator, entropy_amax, mse_amax, percentile_amax
from qdq.functional import scaled_e4m3


def samples() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(20_000, generator=generator)
    uniform = torch.rand(500, generator=generator)
    return {
        "normal": normal,
        "lognormal": normal[:5000].exp(),
        "few": uniform[:40],
        "uniform": uniform,
        "sparse": normal.relu() ** 3,
        "outlier": torch.cat([normal[:1000] * 0.1, torch.tensor([30.0])]),
        "gap": torch.cat([uniform * 0.2, uniform + 5]),
        "two values": torch.tensor([1.0, 7.0] * 50),
    }


def histogram(x: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    counts, edges = np.histogram(x.abs().double().numpy(), bins=bins, range=(0, float(x.abs().max())))
    return torch.from_numpy(counts), torch.from_numpy(edges)


CASES = [(8, False, 1, 20), (4, False, 1, 8), (3, True, 3, 8), (2, False, 2, 5), (5, True, 1, 40)]


@pytest.mark.parametrize("name", samples().keys())
@pytest.mark.parametrize(("bits", "unsigned", "stride", "start"), CASES)
def test_searches_equal_the_definitions(name: str, bits: int, unsigned: bool, stride: int, start: int) -> None:
    counts, edges = histogram(samples()[name], 72)
    h, e = counts.numpy(), edges.numpy()
    expected = reference.entropy_amax(h, e, bits, unsigned, stride, start)
    assert entropy_amax(counts, edges, bits, unsigned, stride=stride, start_bin=start) == expected
    found = mse_amax(counts, edges, bits, unsigned, stride=stride, start_bin=start)
    slow = reference.mse_amax(h, e, bits, unsigned, stride, start)
    # Two candidates may be equally good but for rounding.
    assert reference.mse_of(h, e, found, bits, unsigned) == pytest.approx(
        reference.mse_of(h, e, slow, bits, unsigned), rel=1e-12
    )
    assert found in list((e[1:] + e[:-1])[start::stride] / 2)
    for percentile in (0.0, 33.3, 90.0, 99.9, 100.0):
        assert percentile_amax(counts, edges, percentile) == reference.percentile_amax(h, e, percentile)


@pytest.mark.parametrize("bits", [11, 16])
def test_mse_with_more_levels_than_bins_equals_the_definition(bits: int) -> None:
    counts, edges = histogram(samples()["normal"], 64)
    found = mse_amax(counts, edges, bits, start_bin=4)
    slow = reference.mse_amax(counts.numpy(), edges.numpy(), bits, False, 1, 4)
    error = reference.mse_of(counts.numpy(), edges.numpy(), found, bits, False)
    assert error <= reference.mse_of(counts.numpy(), edges.numpy(), slow, bits, False) * (1 + 1e-9)


def test_mse_for_e4m3_equals_a_loop() -> None:
    counts, edges = histogram(samples()["lognormal"], 300)
    centres = (edges[1:] + edges[:-1]) / 2
    errors = [float((scaled_e4m3(centres, a) - centres) ** 2 @ counts.double()) for a in centres[128:]]
    assert mse_amax(counts, edges, (4, 3)) == centres[128:][int(np.argmin(errors))]


def test_entropy_takes_the_last_of_equals() -> None:
    # Every bin is a level of its own, so every candidate up to the data's end that cuts nothing off is perfect.
    counts = torch.tensor([3, 3, 2, 0, 0, 0])
    edges = torch.arange(7, dtype=torch.float64)
    assert reference.entropy_amax(counts.numpy(), edges.numpy(), 8, False, 1, 1) == 6
    assert entropy_amax(counts, edges, 8, start_bin=1) == 6


def test_the_counts_are_not_changed() -> None:
    counts, edges = histogram(samples()["normal"], 256)
    counts = counts.double()
    before = counts.clone()
    entropy_amax(counts, edges)
    mse_amax(counts, edges)
    percentile_amax(counts, edges)
    assert torch.equal(counts, before)


def test_a_histogram_shorter_than_start_bin_has_one_candidate() -> None:
    counts, edges = histogram(samples()["uniform"], 50)
    assert entropy_amax(counts, edges) == edges[50]
    assert mse_amax(counts, edges) == (edges[49] + edges[50]) / 2


@pytest.mark.parametrize("bins", [1, 2, 300])
def test_nothing_beyond_bin_0(bins: int) -> None:
    counts = torch.zeros(bins, dtype=torch.int64)
    counts[0] = 5
    edges = torch.arange(bins + 1, dtype=torch.float64)
    assert entropy_amax(counts, edges) == 1
    assert percentile_amax(counts, edges, 100) == 0


def test_bad_histograms_and_arguments_are_refused() -> None:
    counts, edges = histogram(samples()["normal"], 256)
    for solver in (entropy_amax, mse_amax, percentile_amax):
        with pytest.raises(ValueError, match="the histogram holds no data"):
            solver(torch.zeros_like(counts), edges)
        with pytest.raises(ValueError, match=r"edges have one value more, got shapes \(256,\) and \(256,\)"):
            solver(counts, edges[1:])
        with pytest.raises(ValueError, match="edges must be finite and ascending"):
            solver(counts, edges.flip(0))
        with pytest.raises(ValueError, match="counts must not be negative"):
            solver(-counts, edges)
        with pytest.raises(ValueError, match="edges must be finite"):
            solver(counts, edges * float("nan"))
    for solver in (entropy_amax, mse_amax):
        with pytest.raises(ValueError, match="stride at least 1, got 128 and 0"):
            solver(counts, edges, stride=0)
    with pytest.raises(ValueError, match="start_bin must be at least 0"):
        mse_amax(counts, edges, start_bin=-1)
    for percentile in (-0.1, 100.1, float("nan")):
        with pytest.raises(ValueError, match="percentile must be in the range 0 to 100"):
            percentile_amax(counts, edges, percentile)
    with pytest.raises(TypeError, match="num_bits must be an integer"):
        entropy_amax(counts, edges, (4, 3))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bits", [2, 8, 12, 16])
def test_the_published_size_at_every_width(bits: int) -> None:
    calibrator = HistogramCalibrator(bits)
    calibrator.collect(samples()["normal"])
    for method in ("entropy", "mse", "percentile"):
        amax = calibrator.compute_amax(method)
        assert amax is not None
        assert 0 < amax <= samples()["normal"].abs().max()
