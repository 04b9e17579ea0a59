"""What quantization should compute, in numpy float64, written from the contract and without qdq or PyTorch.

Plain and slow on purpose. Every function takes and gives float64 arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TINY = 2.0**-24


@dataclass
class Codes:
    """Codes; the scale; and how far each value lay from the nearest rounding tie, in codes."""

    codes: np.ndarray
    scale: np.ndarray
    tie_distance: np.ndarray


def limits(num_bits: int, unsigned: bool, narrow_range: bool) -> tuple[int, int]:
    if unsigned:
        return 0, max(0, 2**num_bits - 1)
    bound = 2**num_bits // 2 - 1
    if bound <= 0:
        return 0, 0
    return (-bound if narrow_range else -bound - 1), bound


def round_half_to_even(values: np.ndarray) -> np.ndarray:
    floor = np.floor(values)
    fraction = values - floor
    odd = np.mod(floor, 2.0) == 1.0
    return floor + ((fraction > 0.5) | ((fraction == 0.5) & odd))


def quantize(x: np.ndarray, amax: np.ndarray, num_bits: int, unsigned: bool, narrow_range: bool) -> Codes:
    lo, bound = limits(num_bits, unsigned, narrow_range)
    x, amax = np.asarray(x, np.float64), np.asarray(amax, np.float64)
    counts_as_zero = (amax <= TINY) | (bound == 0)
    with np.errstate(all="ignore"):
        scale = np.where(counts_as_zero, 1.0, bound / np.where(counts_as_zero, 1.0, amax))
        scaled = x * scale
        codes = np.empty(np.broadcast_shapes(x.shape, amax.shape))
        everywhere = np.broadcast_arrays(x, scaled, counts_as_zero, amax)
        for index in np.ndindex(codes.shape):
            value, product, zero, limit = (float(a[index]) for a in everywhere)
            if np.isnan(value):
                codes[index] = np.nan
            elif zero:
                codes[index] = 0.0
            elif not np.isfinite(limit):
                codes[index] = np.nan
            elif np.isinf(product):
                codes[index] = bound if product > 0 else lo
            else:
                codes[index] = min(max(float(round_half_to_even(np.array(product))), lo), bound)
        tie_distance = np.abs(np.abs(scaled - np.floor(scaled)) - 0.5)
    return Codes(codes, scale, np.where(np.isfinite(tie_distance), tie_distance, 1.0))


def fake_quantize(x: np.ndarray, amax: np.ndarray, num_bits: int, unsigned: bool, narrow_range: bool) -> np.ndarray:
    result = quantize(x, amax, num_bits, unsigned, narrow_range)
    return result.codes / result.scale


def affine_codes(x: np.ndarray, step: np.ndarray, zero_point: np.ndarray, lo: int, hi: int) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.clip(round_half_to_even(np.asarray(x, np.float64) / step) + zero_point, lo, hi)


def affine_fake(x: np.ndarray, step: np.ndarray, zero_point: np.ndarray, lo: int, hi: int) -> np.ndarray:
    return (affine_codes(x, step, zero_point, lo, hi) - zero_point) * step


def published_affine(x: np.ndarray, low: float, high: float, num_bits: int) -> np.ndarray:
    step = (high - low) / (2**num_bits - 1)
    half = 2 ** (num_bits - 1)
    zero = round_half_to_even(np.array(low / step)) + half
    with np.errstate(invalid="ignore"):
        codes = np.clip(round_half_to_even(np.asarray(x, np.float64) / step) - zero, -half, half - 1)
    return (codes + zero) * step


def e4m3_values() -> np.ndarray:
    """Every finite value of E4M3, ascending: exponent bias 7, 3 mantissa bits, the largest 448, no infinity."""
    positive = []
    for exponent in range(16):
        for mantissa in range(8):
            if exponent == 15 and mantissa == 7:  # NaN
                continue
            if exponent == 0:
                positive.append(mantissa / 8 * 2.0**-6)
            else:
                positive.append((1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.array(sorted({-v for v in positive} | set(positive)))


def e4m3_round(x: np.ndarray) -> np.ndarray:
    """The nearest value of E4M3; of two equally near ones that with an even mantissa, the even entry of the table."""
    values = e4m3_values()
    zero = int(np.flatnonzero(values == 0.0)[0])
    result = np.empty(np.shape(x))
    for index, value in np.ndenumerate(np.asarray(x, np.float64)):
        if np.isnan(value):
            result[index] = np.nan
            continue
        distance = np.abs(values - np.clip(value, values[0], values[-1]))
        nearest = np.flatnonzero(distance == distance.min())
        result[index] = values[min(nearest, key=lambda k: (k - zero) % 2)]
    return result


def entropy_amax(
    counts: np.ndarray, edges: np.ndarray, num_bits: int, unsigned: bool, stride: int, start_bin: int
) -> float:
    """One candidate after the other, one level after the other."""
    h = np.asarray(counts, np.float64).copy()
    h[0] = h[1]
    num_levels = 2 ** (num_bits - 1 + unsigned)
    best, best_i = np.inf, len(h)
    for i in range(start_bin, len(h) + 1, stride):
        reference = h[:i].copy()
        reference[-1] += h[i:].sum()
        quantized = np.zeros(i)
        for level in range(num_levels):
            members = [j for j in range(i) if level * i <= j * num_levels < (level + 1) * i]
            filled = [j for j in members if h[j] > 0]
            for j in filled:
                quantized[j] = h[filled].sum() / len(filled)
        if quantized.sum() == 0:
            best_i = i if np.isinf(best) else best_i
            continue
        p, q = reference / reference.sum(), quantized / quantized.sum()
        with np.errstate(divide="ignore"):
            divergence = sum(pj * np.log(pj / qj) for pj, qj in zip(p, q, strict=True) if pj > 0)
        if divergence <= best:  # the last of equals, infinite ones too
            best, best_i = divergence, i
    return float(edges[best_i])


def mse_of(counts: np.ndarray, edges: np.ndarray, amax: float, num_bits: int, unsigned: bool) -> float:
    centres = (np.asarray(edges[1:]) + np.asarray(edges[:-1])) / 2
    error = fake_quantize(centres, np.array(amax), num_bits, unsigned, True) - centres
    return float((np.asarray(counts, np.float64) * error**2).sum())


def mse_amax(
    counts: np.ndarray, edges: np.ndarray, num_bits: int, unsigned: bool, stride: int, start_bin: int
) -> float:
    centres = (np.asarray(edges[1:]) + np.asarray(edges[:-1])) / 2
    candidates = list(centres[start_bin::stride])
    return float(min(candidates, key=lambda amax: mse_of(counts, edges, float(amax), num_bits, unsigned)))


def percentile_amax(counts: np.ndarray, edges: np.ndarray, percentile: float) -> float:
    total, seen = int(np.sum(counts)), 0
    for i, count in enumerate(counts):
        seen += int(count)
        if seen / total >= percentile / 100:
            return float(edges[i])
    raise AssertionError("the shares end at 1")
