"""Ranges of activations and per-channel amax of weights, judged by the error of the real quantization."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qdq.calib import HistogramCollector, RangeCollector, affine_range, channel_mse_amax
from qdq.calib.ranges import METHODS
from qdq.functional import fake_tensor_quant
from qdq.kernels.reference import affine_fake_quantize, affine_parameters

GENERATOR = torch.Generator().manual_seed(11)
NORMAL = torch.randn(50_000, generator=GENERATOR)
TAILED = NORMAL * (torch.rand(50_000, generator=GENERATOR) + 1e-3) ** -0.5
DATA = {
    "normal": NORMAL,
    "relu": NORMAL.relu(),
    "negative": -NORMAL.abs() - 0.5,
    "offset": NORMAL * 0.1 + 3,
    "silu": torch.nn.functional.silu(NORMAL * 2),
    "tailed": TAILED,
    "outliers": torch.cat([NORMAL * 0.01, torch.tensor([40.0, -3.0])]),
}
every_data = pytest.mark.parametrize("x", DATA.values(), ids=DATA.keys())


def collected(x: Tensor, num_bins: int = 4096) -> HistogramCollector:
    collector = HistogramCollector(num_bins)
    collector.collect(x)
    return collector


def squared_error(x: Tensor, low: float, high: float, bits: int) -> float:
    step, zero = affine_parameters(torch.tensor(low), torch.tensor(high), 0, 2**bits - 1)
    return float((affine_fake_quantize(x.double(), step, zero, 0, 2**bits - 1) - x).square().sum())


@every_data
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [3, 8, 16])
def test_ranges_contain_0_and_stay_within_the_data(x: Tensor, symmetric: bool, method: str, bits: int) -> None:
    low, high = affine_range(collected(x), method, bits, symmetric=symmetric)
    assert low <= 0 <= high
    assert low < high
    most = float(x.abs().max())
    if symmetric:
        assert low == -high
        assert high <= most
    else:
        assert low >= min(float(x.min()), 0)
        assert high <= max(float(x.max()), 0)


@every_data
def test_max_is_exact(x: Tensor) -> None:
    collector = RangeCollector()
    collector.collect(x)
    expected = (min(float(x.min()), 0.0), max(float(x.max()), 0.0))
    assert affine_range(collector, "max") == affine_range(collected(x), "max") == expected


@every_data
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_is_never_worse_than_max_and_near_the_best_range(x: Tensor, bits: int) -> None:
    collector = collected(x)
    found = squared_error(x, *affine_range(collector, "mse", bits), bits)
    widest = affine_range(collector, "max")
    # The histogram stands for the data up to the width of its bins.
    assert found <= squared_error(x, *widest, bits) * 1.02
    best = min(
        squared_error(x, widest[0] * a, widest[1] * b, bits)
        for a in np.linspace(1, 0.04, 25)
        for b in np.linspace(1, 0.04, 25)
    )
    assert found <= best * 1.05


@every_data
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_mse_is_near_the_best_amax(x: Tensor, bits: int) -> None:
    _, found = affine_range(collected(x), "mse", bits, symmetric=True)

    def error(amax: float) -> float:
        return float((fake_tensor_quant(x.double(), amax, bits, False, False) - x).square().sum())

    assert error(found) <= min(error(float(x.abs().max()) * f) for f in np.linspace(1, 0.02, 99)) * 1.02


def test_exact_zeros_are_free() -> None:
    # Without their count, a hundred thousand zeros in the middle of bin 0 would ask for finer steps.
    x = torch.cat([torch.zeros(1_000_000), NORMAL.abs()])
    with_zeros, without = collected(x, 64), collected(NORMAL.abs(), 64)
    assert affine_range(with_zeros, "mse", 3) == affine_range(without, "mse", 3)


def test_percentile_cuts_both_tails() -> None:
    x = torch.arange(-1000, 9001).float()  # 10001 values
    low, high = affine_range(collected(x, 1 << 14), "percentile", percentile=99.0)
    assert low == pytest.approx(-950, abs=2)
    assert high == pytest.approx(8950, abs=2)
    assert affine_range(collected(x), "percentile", percentile=100) == (-1000, 9000)
    _, amax = affine_range(collected(x, 1 << 14), "percentile", percentile=99.0, symmetric=True)
    assert amax == pytest.approx(8900, abs=2)
    # Half the values are 0: the lower end stays there.
    assert affine_range(collected(NORMAL.relu()), "percentile")[0] == 0


def test_entropy_clips_outliers() -> None:
    low, high = affine_range(collected(TAILED), "entropy")
    assert -low < -float(TAILED.min())
    assert high < float(TAILED.max())
    assert -low == high
    low, high = affine_range(collected(TAILED.relu()), "entropy")
    assert low == 0
    assert high < float(TAILED.max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 5.0, -2.5, 1e-30])
def test_constant_data(method: str, value: float) -> None:
    low, high = affine_range(collected(torch.full((9,), value)), method)
    stored = float(torch.tensor(value))
    assert (low, high) == (min(stored, 0.0), max(stored, 0.0))


def test_bad_use_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown calibration method 'maxx': choose one of max, percentile, mse, entr"):
        affine_range(collected(NORMAL), "maxx")
    with pytest.raises(ValueError, match="no calibration data seen"):
        affine_range(RangeCollector(), "max")
    with pytest.raises(ValueError, match="percentile must be in the range 0 to 100, got 101"):
        affine_range(collected(NORMAL), "percentile", percentile=101)
    with pytest.raises(ValueError, match="hold 1 NaN or infinite values"):
        affine_range(collected(torch.tensor([1.0, float("nan")])), "max")
    plain = RangeCollector()
    plain.collect(NORMAL)
    with pytest.raises(ValueError, match="'mse' needs a HistogramCollector, got RangeCollector"):
        affine_range(plain, "mse")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channel_amax_is_near_the_best_of_a_fine_grid(bits: int, axis: int) -> None:
    weight = TAILED[:4320].reshape(6, 8, 90) * torch.linspace(0.1, 3, 8)[:, None]
    amax = channel_mse_amax(weight, axis, bits)
    rows = weight.movedim(axis, 0).flatten(1)
    assert amax.shape == (rows.shape[0],)
    assert amax.dtype == torch.float32

    def error(candidates: Tensor) -> Tensor:
        return (fake_tensor_quant(rows, candidates[:, None], bits) - rows).square().sum(1)

    largest = rows.abs().amax(1)
    assert (error(amax) <= error(largest) * (1 + 1e-5)).all()
    best = torch.stack([error(largest * f) for f in np.linspace(1, 0.2, 161)]).amin(0)
    # Channels of 48 values are noisy; their sum is not.
    assert error(amax).sum() <= best.sum() * 1.05


def test_channel_amax_of_blocks_zeros_and_layouts() -> None:
    weight = torch.randn(40, 5000, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    whole = channel_mse_amax(weight, 0, 4)
    assert whole[3] == 0
    for channel in (0, 3, 39):
        assert whole[channel] == channel_mse_amax(weight[channel : channel + 1], 0, 4)
    assert torch.equal(channel_mse_amax(weight.t(), 1, 4), whole)
    assert channel_mse_amax(weight.double(), 0, 4).dtype == torch.float64
    assert channel_mse_amax(weight.half(), 0, 4).dtype == torch.float32
    assert torch.equal(channel_mse_amax(torch.zeros(4, 0), 0), torch.zeros(4))
    assert torch.equal(channel_mse_amax(torch.tensor([1.0, -3.0]), 0), torch.tensor([1.0, 3.0]))


def test_channel_amax_refuses_bad_use() -> None:
    weight = torch.ones(2, 3)
    with pytest.raises(ValueError, match="signed codes need at least 2 bits, got num_bits=1"):
        channel_mse_amax(weight, 0, 1)
    with pytest.raises(ValueError, match="axis 2 is out of range for a weight of 2 dimensions"):
        channel_mse_amax(weight, 2)
    with pytest.raises(ValueError, match="smallest must be above 0 and at most 1, got 0"):
        channel_mse_amax(weight, 0, smallest=0)
    with pytest.raises(ValueError, match="the weight holds NaN or infinite values"):
        channel_mse_amax(weight * float("inf"), 0)
