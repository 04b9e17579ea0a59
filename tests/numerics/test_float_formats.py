"""Rounding to E4M3, E5M2, E2M1 and E8M0 on every code point and every tie, against `ml_dtypes`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qdq.formats import E2M1, E4M3, E5M2, E8M0, FloatFormat
from qdq.kernels.reference import round_to_e8m0, round_to_float_format

ml_dtypes = pytest.importorskip("ml_dtypes")

FORMATS = [(E4M3, ml_dtypes.float8_e4m3fn), (E5M2, ml_dtypes.float8_e5m2), (E2M1, ml_dtypes.float4_e2m1fn)]
EVERY_FORMAT = pytest.mark.parametrize(("fmt", "kind"), FORMATS, ids=[fmt.name for fmt, _ in FORMATS])
SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def code_points(kind: Any, num_bits: int) -> np.ndarray:
    """The finite values of a format in the order of their codes, the negative ones left out, as float64."""
    codes = np.arange(2**num_bits, dtype=np.uint8).view(kind).astype(np.float64)
    return codes[np.isfinite(codes) & ~np.signbit(codes)]


def with_neighbours(values: np.ndarray, dtype: Any) -> np.ndarray:
    """The values, rounded to ``dtype``, and the next ones of it below and above; all of either sign."""
    values = values.astype(dtype)
    around = np.concatenate([values, np.nextafter(values, dtype(-np.inf)), np.nextafter(values, dtype(np.inf))])
    return np.concatenate([around, -around])


def adversarial(points: np.ndarray, dtype: Any) -> np.ndarray:
    """Code points, ties, their neighbours, zeros, the smallest and largest numbers, infinities, NaN."""
    ties = (points[1:] + points[:-1]) / 2
    beyond = points[-1] + (points[-1] - points[-2]) * np.array([0.25, 0.5, 1, 1.5, 2, 100])
    limits = np.finfo(dtype)
    extreme = np.array([0.0, limits.smallest_subnormal, limits.tiny, limits.max, np.inf, np.nan])
    return np.concatenate([with_neighbours(np.concatenate([points, ties, beyond]), dtype), extreme, -extreme]).astype(
        dtype
    )


def every_sixteen_bit_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def by_ml_dtypes(x: np.ndarray, fmt: FloatFormat, kind: Any) -> np.ndarray:
    """Its cast within the range; where ours differs on purpose: saturation, and NaN, which E2M1 does not have."""
    with np.errstate(all="ignore"):
        cast, wide = x.astype(kind).astype(np.float64), x.astype(np.float64)
    cast = np.where(np.abs(x) > fmt.max_value, np.copysign(fmt.max_value, wide), cast)
    return np.where(np.isnan(x), np.nan, cast)


def assert_same(result: Tensor, expected: np.ndarray) -> None:
    """Equal values, equal signs of zeros, NaN in the same places."""
    got = result.to(torch.float64).numpy()
    np.testing.assert_array_equal(got, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got)[number], np.signbit(expected)[number])


@EVERY_FORMAT
def test_the_constants_are_those_of_ml_dtypes(fmt: FloatFormat, kind: Any) -> None:
    limits = ml_dtypes.finfo(kind)
    assert (fmt.num_bits, fmt.mantissa_bits, fmt.exponent_bits) == (limits.bits, limits.nmant, limits.nexp)
    assert (fmt.max_value, 2.0**fmt.min_exponent) == (float(limits.max), float(limits.smallest_normal))


@EVERY_FORMAT
def test_every_code_point_is_kept(fmt: FloatFormat, kind: Any) -> None:
    points = code_points(kind, fmt.num_bits)
    assert len(points) == {"E4M3": 127, "E5M2": 124, "E2M1": 8}[fmt.name]
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for sign in (1, -1):
            x = torch.from_numpy(sign * points).to(dtype)
            assert_same(round_to_float_format(x, fmt), sign * points)


@EVERY_FORMAT
def test_every_tie_and_its_neighbours_in_float32(fmt: FloatFormat, kind: Any) -> None:
    x = adversarial(code_points(kind, fmt.num_bits), np.float32)
    expected = by_ml_dtypes(x, fmt, kind)
    assert_same(round_to_float_format(torch.from_numpy(x), fmt), expected)
    # A vector loop and its remainder compute the same.
    assert_same(round_to_float_format(torch.from_numpy(x)[::3], fmt), expected[::3])
    assert_same(torch.stack([round_to_float_format(v, fmt) for v in torch.from_numpy(x[:200])]), expected[:200])


@EVERY_FORMAT
def test_random_bits_in_float32(fmt: FloatFormat, kind: Any) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    near = np.random.default_rng(1).normal(0, fmt.max_value / 3, 100_000).astype(np.float32)
    x = np.concatenate([bits.view(np.float32), near, near * np.float32(2.0**fmt.min_exponent / fmt.max_value)])
    assert_same(round_to_float_format(torch.from_numpy(x), fmt), by_ml_dtypes(x, fmt, kind))


@SIXTEEN_BITS
@EVERY_FORMAT
def test_every_value_of_sixteen_bits(fmt: FloatFormat, kind: Any, dtype: torch.dtype) -> None:
    x = every_sixteen_bit_value(dtype)
    result = round_to_float_format(x, fmt)
    assert result.dtype == dtype
    assert_same(result, by_ml_dtypes(x.to(torch.float32).numpy(), fmt, kind))
    assert torch.equal(result.nan_to_num(), round_to_float_format(x.to(torch.float32), fmt).to(dtype).nan_to_num())


@EVERY_FORMAT
def test_float64_is_rounded_once(fmt: FloatFormat, kind: Any) -> None:
    """`ml_dtypes` rounds float64 to float32 first, so that its table judges here: the nearest, of two the even code."""
    points = code_points(kind, fmt.num_bits)
    x = adversarial(points, np.float64)
    size = np.minimum(np.abs(x), fmt.max_value)
    above = np.clip(np.searchsorted(points, np.nan_to_num(size)), 1, len(points) - 1)
    below = above - 1
    tie = (points[above] + points[below]) / 2  # exact, and so is the comparison
    up = (size > tie) | ((size == tie) & (above % 2 == 0))
    expected = np.copysign(np.where(np.isnan(x), np.nan, points[np.where(up, above, below)]), x)
    assert_same(round_to_float_format(torch.from_numpy(x), fmt), expected)
    # Where float32 holds the value, the cast of `ml_dtypes` agrees.
    with np.errstate(over="ignore"):
        narrow = x.astype(np.float32)
    exact = narrow == x
    np.testing.assert_array_equal(expected[exact], by_ml_dtypes(narrow[exact], fmt, kind))
    twice = round_to_float_format(torch.from_numpy(narrow), fmt).double().numpy()
    assert (twice != expected)[~np.isnan(x)].any(), "the data cannot tell one rounding from two"


@EVERY_FORMAT
def test_what_lies_beyond_the_largest_saturates(fmt: FloatFormat, kind: Any) -> None:
    above = np.nextafter(np.float32(fmt.max_value), np.float32(np.inf))
    x = torch.tensor([above, fmt.max_value * 1.2, 1e30, torch.inf])
    assert round_to_float_format(x, fmt).tolist() == [fmt.max_value] * 4
    assert round_to_float_format(-x, fmt).tolist() == [-fmt.max_value] * 4
    with np.errstate(all="ignore"):
        largest = x.numpy().astype(kind).astype(np.float32)
    # What `ml_dtypes` gives for infinity, which the comparisons above leave out.
    assert str(largest[-1]) == {"E4M3": "nan", "E5M2": "inf", "E2M1": "6.0"}[fmt.name]


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"got torch\.int32"):
        round_to_float_format(torch.ones(2, dtype=torch.int32), E4M3)
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        round_to_e8m0(torch.ones(2, dtype=torch.int64))


SCALES = 2.0 ** np.arange(-127, 128, dtype=np.float64)


def expected_scale(x: np.ndarray) -> np.ndarray:
    """The cast of `ml_dtypes` from float32, but for zero, which is NaN there; the cast of PyTorch agrees."""
    with np.errstate(all="ignore"):
        cast = x.astype(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    if float(np.float32(3).astype(ml_dtypes.float8_e8m0fnu)) == 2.0:
        # https://github.com/jax-ml/ml_dtypes/pull/398 proposes that ties round to even; here they round up.
        tie = (np.frexp(x)[0] == 0.75) & (x > E8M0.min_value) & (x < E8M0.max_value)
        cast = np.where(tie, x / np.float32(0.75), cast)
    cast = np.where(x == 0, E8M0.min_value, cast)
    by_torch = torch.from_numpy(x.copy()).to(torch.float8_e8m0fnu).to(torch.float64).numpy()
    np.testing.assert_array_equal(by_torch[~(x < 0)], cast[~(x < 0)])
    return cast


def test_the_constants_of_e8m0_are_those_of_ml_dtypes() -> None:
    limits = ml_dtypes.finfo(ml_dtypes.float8_e8m0fnu)
    assert (E8M0.num_bits, E8M0.min_value, E8M0.max_value) == (limits.bits, float(limits.tiny), float(limits.max))
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal(codes[:255], SCALES)
    assert np.isnan(codes[255])


def test_every_scale_every_tie_and_their_neighbours() -> None:
    x = with_neighbours(np.concatenate([SCALES, SCALES * 1.5, SCALES / 2, SCALES / 1024]), np.float32)
    expected = expected_scale(x)
    assert_same(round_to_e8m0(torch.from_numpy(x)), expected)
    assert_same(round_to_e8m0(torch.from_numpy(x)[::3]), expected[::3])
    assert_same(torch.stack([round_to_e8m0(v) for v in torch.from_numpy(x[:300])]), expected[:300])
    assert_same(round_to_e8m0(torch.from_numpy(SCALES)), SCALES)


def test_e8m0_of_random_bits() -> None:
    x = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    assert_same(round_to_e8m0(torch.from_numpy(x)), expected_scale(x))


@SIXTEEN_BITS
def test_e8m0_of_every_value_of_sixteen_bits(dtype: torch.dtype) -> None:
    x = every_sixteen_bit_value(dtype)
    result = round_to_e8m0(x)
    assert result.dtype == dtype
    expected = torch.from_numpy(expected_scale(x.to(torch.float32).numpy()))
    assert_same(result, expected.to(torch.float32).to(dtype).double().numpy())


def test_e8m0_of_ties_zero_and_what_is_no_scale() -> None:
    x = torch.tensor([1.5, 3.0, 0.75, 1.4999999, 0.0, -0.0, 1e-45])
    assert round_to_e8m0(x).tolist() == [2.0, 4.0, 1.0, 1.0, *[2.0**-127] * 3]
    bad = torch.tensor([-1.0, -1e-45, torch.nan, torch.inf, -torch.inf, 1.5 * 2.0**127])
    assert round_to_e8m0(bad).isnan().all()
    assert round_to_e8m0(torch.tensor(1.4999 * 2.0**127)) == 2.0**127
    smallest = torch.tensor([0.99, 1.0, 1.01, 1.49, 1.99]) * 2.0**-127
    assert (round_to_e8m0(smallest) * 2.0**127).tolist() == [1, 1, 2, 2, 2]


def test_e8m0_rounds_float64_once() -> None:
    below, above = np.nextafter(SCALES * 1.5, 0.0), np.nextafter(SCALES * 1.5, np.inf)
    # Between the two smallest scales everything rounds up.
    assert_same(round_to_e8m0(torch.from_numpy(below)), np.append(SCALES[1], SCALES[1:]))
    assert_same(round_to_e8m0(torch.from_numpy(above))[:-1], SCALES[1:])
    assert round_to_e8m0(torch.from_numpy(above))[-1].isnan()
    tiny = torch.tensor([5e-324, 1e-300, 2.0**-128], dtype=torch.float64)
    assert round_to_e8m0(tiny).tolist() == [2.0**-127] * 3
    assert round_to_e8m0(torch.tensor([2.0**128, 1e300], dtype=torch.float64)).isnan().all()


def test_rounding_can_be_traced() -> None:
    x = torch.from_numpy(adversarial(SCALES[100:150], np.float32))
    for function in (lambda v: round_to_float_format(v, E4M3), round_to_e8m0):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert_same(compiled(x), function(x).double().numpy())
        assert function(x.to("meta")).shape == x.shape
        assert function(torch.empty(0)).shape == (0,)
        assert function(torch.tensor(2.0)) == 2


def test_the_layout_is_kept() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for result in (round_to_float_format(x, E5M2), round_to_e8m0(x.abs())):
        assert result.stride() == x.stride()
