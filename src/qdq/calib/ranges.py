"""Range solvers of the model pipeline: both ends of an activation's range, and one amax per weight channel."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..formats import IntFormat
from ..kernels.reference import affine_fake_quantize, affine_parameters, symmetric_scale
from .collectors import HistogramCollector, RangeCollector
from .solvers import entropy_amax

METHODS = ("max", "percentile", "mse", "entropy")

_JOINT_SHRINK = 2.0 ** (-torch.arange(128, dtype=torch.float64) / 16)  # 1 down to 1/245
_FINE_SHRINK = torch.linspace(1.1, 0.7, 81, dtype=torch.float64)
_ROUNDS = 2
# Shrink factors of weights: the coarse step, and how many finer ones lie between two coarse ones.
_COARSE, _FINE_STEPS = 0.05, 4
# Elements of a block of weights: it stays in the cache while every candidate passes over it.
_WEIGHT_BLOCK = 1 << 16


def affine_range(
    collector: RangeCollector,
    method: str = "max",
    num_bits: int = 8,
    *,
    percentile: float = 99.99,
    symmetric: bool = False,
    through: Callable[[Tensor], Tensor] | None = None,
) -> tuple[float, float]:
    """The range ``(amin, amax)`` that an activation is clipped to; it contains 0.

    - ``"max"``: the exact smallest and largest value.
    - ``"percentile"``: the middle ``percentile`` per cent of the values, the rest cut half at each end.
    - ``"mse"``: the range with the smallest squared error of fake-quantizing the histogram; never worse than "max".
    - ``"entropy"``: "max", clipped to the amax that :func:`qdq.calib.solvers.entropy_amax` finds for the absolute
      values.

    Args:
        collector: what was seen; all methods but "max" need a :class:`HistogramCollector`.
        method: one of the above.
        num_bits: width of the codes.
        percentile: share of the values kept, in per cent; of absolute values where ``symmetric``.
        symmetric: one amax for both ends: the result is ``(-amax, amax)``.
        through: for "mse": an elementwise function that alone reads the values; the squared error is that of its
            results. (A SiLU makes all values below -5 nearly 0: the range need not hold them.)

    Raises:
        ValueError: unknown method; no data; NaN or infinity among the data; ``percentile`` outside 0..100;
            a method that needs a histogram.
    """
    if method not in METHODS:
        raise ValueError(f"unknown calibration method {method!r}: choose one of {', '.join(METHODS)}")
    if collector.nonfinite:
        raise ValueError(f"the calibration data hold {collector.nonfinite} NaN or infinite values here: remove them")
    if collector.total == 0:
        raise ValueError("no calibration data seen: run the calibration batches first")
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be in the range 0 to 100, got {percentile}")
    low, high = min(collector.min, 0.0), max(collector.max, 0.0)
    if method != "max" and high > low:
        if not isinstance(collector, HistogramCollector):
            raise ValueError(f"method {method!r} needs a HistogramCollector, got {type(collector).__name__}")
        if method == "mse":
            low, high = _mse(collector, low, high, num_bits, symmetric, through)
        else:
            low, high = _CLIPPING[method](collector, low, high, num_bits, percentile, symmetric)
    if symmetric:
        high = max(-low, high)
        low = -high
    return low, high


def _percentile(
    seen: HistogramCollector, low: float, high: float, num_bits: int, percentile: float, symmetric: bool
) -> tuple[float, float]:
    if symmetric:
        share = _shares(_absolute(seen))
        end = _first_reaching(share, percentile / 100)
        amax = min((end + 1) * seen.width, max(-low, high))
        return -amax, amax
    tail = (1 - percentile / 100) / 2
    share, edges = _shares(seen.counts.to(torch.float64)), seen.edges
    first = int(torch.searchsorted(share, torch.tensor(tail, dtype=torch.float64), right=True))
    last = _first_reaching(share, 1 - tail)
    first = min(first, last)
    return min(max(low, float(edges[first])), 0.0), max(min(high, float(edges[last + 1])), 0.0)


def _shares(counts: Tensor) -> Tensor:
    return torch.cumsum(counts, 0) / counts.sum()


def _first_reaching(share: Tensor, level: float) -> int:
    index = int(torch.searchsorted(share, torch.tensor(level, dtype=torch.float64)))
    return min(index, share.numel() - 1)


def _absolute(seen: HistogramCollector) -> Tensor:
    """The histogram of absolute values, float64: bin -1 - k of the signed one covers the same as bin k."""
    counts, first = seen.counts.to(torch.float64), seen.first
    negative, positive = counts[:-first].flip(0) if first < 0 else counts[:0], counts[-first:]
    result = torch.zeros(max(negative.numel(), positive.numel()), dtype=torch.float64)
    result[: negative.numel()] += negative
    result[: positive.numel()] += positive
    return result


def _entropy(
    seen: HistogramCollector, low: float, high: float, num_bits: int, percentile: float, symmetric: bool
) -> tuple[float, float]:
    counts = _absolute(seen)
    edges = torch.arange(counts.numel() + 1, dtype=torch.float64) * seen.width
    one_sided = not symmetric and (low == 0.0 or high == 0.0)
    levels = 2 ** (num_bits - 1 + one_sided)
    amax = entropy_amax(counts, edges, num_bits, one_sided, start_bin=levels)
    return max(low, -amax), min(high, amax)


def _mse(
    seen: HistogramCollector,
    low: float,
    high: float,
    num_bits: int,
    symmetric: bool,
    through: Callable[[Tensor], Tensor] | None,
) -> tuple[float, float]:
    counts, edges = seen.counts.to(torch.float64), seen.edges
    centres = ((edges[1:] + edges[:-1]) / 2).clamp_(seen.min, seen.max)
    if seen.zeros:
        counts[-seen.first] -= seen.zeros
    used = counts > 0
    x, weights = centres[used], counts[used]

    def best(lows: Tensor, highs: Tensor) -> tuple[float, float]:
        lows, highs = torch.broadcast_tensors(lows, highs)
        index = int(torch.argmin(_affine_errors(x, weights, lows, highs, num_bits, symmetric, through)))
        return float(lows[index]), float(highs[index])

    def as_tensor(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64)

    if symmetric:
        amax = max(-low, high)
        _, found = best(-amax * _JOINT_SHRINK, amax * _JOINT_SHRINK)
        grid = torch.cat([as_tensor(found), (found * _FINE_SHRINK).clamp_(max=amax)])
        _, found = best(-grid, grid)
        return -found, found
    # Both ends together first: the best joint range is a good start even where one outlier hides the rest.
    found_low, found_high = best(low * _JOINT_SHRINK, high * _JOINT_SHRINK)
    for _ in range(_ROUNDS):
        before = found_low, found_high
        if high > 0.0:
            grid = torch.cat([as_tensor(found_high), high * _JOINT_SHRINK, found_high * _FINE_SHRINK]).clamp_(max=high)
            found_low, found_high = best(as_tensor(found_low), grid)
        if low < 0.0:
            grid = torch.cat([as_tensor(found_low), low * _JOINT_SHRINK, found_low * _FINE_SHRINK]).clamp_(min=low)
            found_low, found_high = best(grid, as_tensor(found_high))
        if before == (found_low, found_high):
            break
    return found_low, found_high


def _affine_errors(
    x: Tensor,
    weights: Tensor,
    lows: Tensor,
    highs: Tensor,
    num_bits: int,
    symmetric: bool,
    through: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The count-weighted squared error of fake-quantizing ``x`` with each range, codes as deployment has them."""
    if symmetric:
        bound = IntFormat(num_bits).bound
        step, zero, lo, hi = (highs / bound).to(torch.float32), torch.zeros_like(highs), -bound - 1, bound
    else:
        lo, hi = 0, 2**num_bits - 1
        step, zero = affine_parameters(lows, highs, lo, hi)
    fake = affine_fake_quantize(x.expand(lows.numel(), -1), step[:, None], zero[:, None], lo, hi)
    if through is not None:
        fake, x = through(fake), through(x)
    return fake.sub_(x).square_() @ weights


_CLIPPING = {"percentile": _percentile, "entropy": _entropy}


def channel_mse_amax(
    weight: Tensor, axis: int, num_bits: int = 8, narrow_range: bool = True, *, smallest: float = 0.2
) -> Tensor:
    """Per channel, the amax with the smallest squared quantization error among shrunk maxima.

    Candidates are the channel's largest absolute value times factors from 1 down to ``smallest``: every twentieth
    first, then every hundredth around the best of those. The largest of equals wins, and 1 is a candidate, so that
    the result is never worse than the plain maximum.

    Args:
        weight: floating point, at least 1-d.
        axis: the channel axis; negative counts from the end.
        num_bits: width of the signed codes.
        narrow_range: leave out the code ``-bound - 1``.
        smallest: the smallest factor, in (0, 1].

    Returns:
        A 1-d float32 tensor (float64 for float64 weights) with one amax per channel, on the weight's device.

    Raises:
        ValueError: NaN or infinity in the weight; ``axis`` or ``smallest`` out of range; fewer than 2 bits.
    """
    fmt = IntFormat(num_bits, narrow_range=narrow_range)
    if fmt.degenerate:
        raise ValueError(f"signed codes need at least 2 bits, got num_bits={num_bits}")
    if not -weight.dim() <= axis < weight.dim():
        raise ValueError(f"axis {axis} is out of range for a weight of {weight.dim()} dimensions")
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest must be above 0 and at most 1, got {smallest}")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = weight.detach().to(dtype).movedim(axis, 0)
    rows = rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("the weight holds NaN or infinite values: repair it before quantizing")
    if rows.numel() == 0:
        return rows.new_zeros(rows.shape[0])
    blocks = rows.split(max(1, _WEIGHT_BLOCK // rows.shape[1]))
    return torch.cat([_best_amax(block, smallest, fmt) for block in blocks])


def _best_amax(rows: Tensor, smallest: float, fmt: IntFormat) -> Tensor:
    largest = rows.abs().amax(dim=1)
    factor, lowest = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    scaled, codes = torch.empty_like(rows), torch.empty_like(rows)

    def keep_better(candidate: Tensor) -> None:
        nonlocal factor, lowest
        scale = symmetric_scale(largest * candidate, fmt.bound)
        torch.mul(rows, scale[:, None], out=scaled)
        torch.round(scaled, out=codes)
        error = codes.clamp_(fmt.lo, fmt.hi).sub_(scaled).square_().sum(dim=1) / scale.square()
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        factor = torch.where(better, candidate, factor)

    for k in range(int((1 - smallest) / _COARSE + 1e-6) + 1):
        keep_better(torch.full_like(largest, 1 - k * _COARSE))
    coarse = factor
    for k in range(_FINE_STEPS, -_FINE_STEPS - 1, -1):
        if k:
            keep_better((coarse + k * _COARSE / (_FINE_STEPS + 1)).clamp_(smallest, 1.0))
    return largest * factor
