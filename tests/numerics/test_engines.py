"""The CPU engine equals the reference: every function, value, view, instruction set and number of threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from numerics.engine_data import (
    AMAX,
    DTYPES,
    LEVELS,
    SHAPES,
    SIZES,
    VIEWS,
    adversarial,
    as_tuple,
    assert_same,
    bits,
    generator,
    level,
    threads,
)
from qdq.formats import E2M1, E4M3, E5M2, IntFormat
from qdq.kernels import native, reference

if native.library().functions is None:
    pytest.skip(native.library().reason, allow_module_level=True)
from qdq.kernels import cpu

INT8 = IntFormat(8)
BOTH = (False, True)
FORMATS = [IntFormat(n, u, narrow) for n in (2, 3, 4, 8, 12, 16, 24, 25, 31, 32) for u in BOTH for narrow in BOTH]
FORMATS += [IntFormat(0), IntFormat(1), IntFormat(1, True)]
# Two threads share work from 32768 elements on.
SHARED = (16383, 16385, 32767, 32768, 32769, 40000)


def check(name: str, *arguments: Any) -> None:
    """The function ``name``: bits, strides, no input changed or given back, at every level and number of threads."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    before = [bits(t) for t in tensors]
    expected = as_tuple(getattr(reference, name)(*arguments))
    inputs = tensors[1] if name.endswith("_gradient") else tensors[0]
    for wanted in LEVELS:
        for count in (1, 2) if inputs.numel() >= 16384 and wanted == LEVELS[0] else (1,):
            with level(wanted), threads(count):
                found = as_tuple(getattr(cpu, name)(*arguments))
            what = (name, wanted, count, *(a if not isinstance(a, Tensor) else tuple(a.shape) for a in arguments))
            assert len(found) == len(expected)
            for have, want in zip(found, expected, strict=True):
                assert_same(have, want, what)
            if found[0].shape == inputs.shape and not name.startswith(("absmax", "minmax")):
                assert meaningful(found[0]) == meaningful(torch.empty_like(inputs)), what
            addresses = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
            assert not addresses & {y.untyped_storage().data_ptr() for y in found if y.numel()}, what
    for tensor, was in zip(tensors, before, strict=True):
        assert torch.equal(bits(tensor), was), f"{name} changed its input"


def meaningful(x: Tensor) -> list[int]:
    """The strides of the axes along which one can walk."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel()]


# -- what is drawn ---------------------------------------------------------------------------------

seeds = st.integers(0, 2**31)
views = st.sampled_from(list(VIEWS))
dtypes = st.sampled_from(DTYPES)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    return draw(st.sampled_from(SHAPES)) if draw(st.booleans()) else (draw(st.sampled_from(SIZES)),)


@st.composite
def granularity(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter: per tensor of any rank, or along any axes, with or without the leading ones."""
    if not draw(st.integers(0, 3)):
        return (1,) * draw(st.integers(0, len(shape) + 1))
    sizes = [size if draw(st.booleans()) else 1 for size in shape]
    while sizes and sizes[0] == 1 and draw(st.booleans()):
        sizes = sizes[1:]
    return tuple(sizes)


def blocks_of(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    return (*shape[:-1], -(-shape[-1] // block_size))


@st.composite
def parameter(draw: st.DrawFn, shape: tuple[int, ...], low: float = 0.05, values: tuple[float, ...] = AMAX) -> Tensor:
    """Positive values and some of ``values``, of any floating-point dtype and view."""
    drawn = low + 3 * torch.rand(shape, generator=generator(draw(seeds)), dtype=torch.float64)
    if drawn.numel():
        for value in draw(st.lists(st.sampled_from(values), max_size=3)):
            drawn.view(-1)[draw(st.integers(0, drawn.numel() - 1))] = value
    drawn = drawn.to(draw(st.sampled_from((torch.float32, torch.float32, torch.float64, torch.bfloat16))))
    return VIEWS[draw(st.sampled_from(("contiguous", "transposed", "gaps", "negative", "offset")))](drawn)


def full(parameter: Tensor, shape: tuple[int, ...], block_size: int | None) -> Tensor:
    """The parameter of every element."""
    like = torch.empty(shape)
    fitted = reference.expand_blocks(like, parameter.double(), block_size, "amax")
    return fitted.expand(shape)


@st.composite
def symmetric_case(draw: st.DrawFn, fmt: IntFormat) -> tuple[Tensor, Tensor, int | None]:
    shape = draw(shapes())
    block_size = draw(st.sampled_from((None, None, 1, 2, 3, 8, 32, 100))) if shape else None
    grouped = shape if block_size is None else blocks_of(shape, block_size)
    amax = draw(parameter(draw(granularity(grouped))))
    x = adversarial(shape, draw(dtypes), draw(seeds), full(amax, shape, block_size), max(fmt.bound, 1))
    if fmt.unsigned:
        x = torch.where(x < 0, -x, x)  # a negative zero stays
    view = VIEWS[draw(views)](x)
    return view, amax, block_size


# -- equality --------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.data(), st.sampled_from(FORMATS))
def test_symmetric(data: st.DataObject, fmt: IntFormat) -> None:
    x, amax, block_size = data.draw(symmetric_case(fmt))
    check("symmetric_quantize", x, amax, fmt, block_size)
    check("symmetric_fake_quantize", x, amax, fmt, block_size)


@settings(max_examples=80)
@given(st.data())
def test_symmetric_gradient(data: st.DataObject) -> None:
    x, amax, block_size = data.draw(symmetric_case(INT8))
    grad = VIEWS[data.draw(views)](adversarial(tuple(x.shape), x.dtype, data.draw(seeds)))
    check("symmetric_gradient", grad, x, amax, block_size)


@settings(max_examples=80)
@given(st.data(), st.sampled_from([(0, 255), (-128, 127), (0, 1), (-8, 7), (0, 2**24 - 1), (-(2**31), 2**31 - 1)]))
def test_affine(data: st.DataObject, limits: tuple[int, int]) -> None:
    lo, hi = limits
    shape = data.draw(shapes())
    block_size = data.draw(st.sampled_from((None, None, 1, 3, 8, 100))) if shape else None
    grouped = shape if block_size is None else blocks_of(shape, block_size)
    bad = (1e-45, 1e-38, 1e-30, 3e38, math.inf, math.nan, 0.125, 1e30)
    step = data.draw(parameter(data.draw(granularity(grouped)), values=bad)).clamp(min=1e-45)
    step = torch.where(step == 0, 1.0, step)  # a 16-bit dtype has no such number
    kind = data.draw(st.sampled_from((torch.int32, torch.int64, torch.float32, torch.uint8)))
    # Parameters of two shapes.
    zero = torch.randint(0, 256, data.draw(granularity(grouped)), generator=generator(data.draw(seeds))).to(kind)
    ends = full(step, shape, block_size) * (255 - full(zero, shape, block_size))
    x = VIEWS[data.draw(views)](adversarial(shape, data.draw(dtypes), data.draw(seeds), ends.abs(), 127))
    grad = VIEWS[data.draw(views)](adversarial(shape, x.dtype, data.draw(seeds)))
    check("affine_quantize", x, step, zero, lo, hi, block_size)
    check("affine_fake_quantize", x, step, zero, lo, hi, block_size)
    check("affine_gradient", grad, x, step, zero, lo, hi, block_size)


@settings(max_examples=100)
@given(st.data(), st.sampled_from([1, 2, 4, 8, 16, 24, 25, 26, 32]))
def test_range(data: st.DataObject, num_bits: int) -> None:
    shape = data.draw(shapes())
    high = data.draw(parameter(data.draw(granularity(shape))))
    low = data.draw(st.sampled_from([-high, high * 0.5, high * 1, torch.zeros_like(high) * -1, -3 * high]))
    if data.draw(st.booleans()) and low.numel():
        low = low.reshape(-1)[data.draw(st.integers(0, low.numel() - 1))].clone()
        high = torch.maximum(high, low)
    x = adversarial(shape, data.draw(dtypes), data.draw(seeds), full(high.abs(), shape, None), 2 ** (num_bits - 1))
    check("range_fake_quantize", VIEWS[data.draw(views)](x), low, high, num_bits)


@settings(max_examples=100)
@given(st.data(), st.sampled_from([E4M3, E5M2, E2M1]))
def test_float_formats(data: st.DataObject, fmt: Any) -> None:
    x, amax, block_size = data.draw(symmetric_case(INT8))
    check("scaled_float_fake_quantize", x, amax, fmt, block_size)
    check("scaled_float_fake_quantize", x, None, fmt)
    check("round_to_float_format", x, fmt)
    check("round_to_float_format", x * (fmt.max_value / 3), fmt)
    check("round_to_e8m0", x.abs())
    check("round_to_e8m0", x)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("num_bits", [2, 4, 8, 12])
def test_every_tie(num_bits: int, unsigned: bool, narrow: bool) -> None:
    """Of every code, and its neighbours on both sides."""
    fmt = IntFormat(num_bits, unsigned, narrow)
    for dtype in (torch.float32, torch.float64):
        for limit in (float(fmt.bound), 1.0, 0.7, 1e-7, 1e-30, 3e38):
            amax = torch.tensor(limit, dtype=dtype)
            ties = (torch.arange(fmt.lo - 2, fmt.hi + 3, dtype=dtype) + 0.5) * amax / fmt.bound
            x = torch.cat([ties, *(ties.nextafter(torch.tensor(way, dtype=dtype)) for way in (math.inf, -math.inf))])
            x = x.abs() if unsigned else x
            check("symmetric_quantize", x, amax, fmt)
            check("symmetric_fake_quantize", x, amax, fmt)
            check("symmetric_gradient", torch.ones_like(x), x, amax)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for amax in (torch.tensor(1.0), torch.tensor(300.0), torch.tensor(2.0**-20)):
        check("symmetric_fake_quantize", x, amax, INT8)
        check("symmetric_gradient", x, x, amax)
        for fmt in (E4M3, E5M2):
            check("scaled_float_fake_quantize", x, amax, fmt)
    check("affine_fake_quantize", x, torch.tensor(0.037), torch.tensor(100), 0, 255)
    check("round_to_e8m0", x)
    check("round_to_float_format", x, E4M3)
    values = x[torch.isfinite(x)]
    check("abs_histogram", values, 0.01, 300)
    check("histogram", values, 2.0**-7, -3000, 5000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1025,), (2, 70, 3, 3)])
def test_16_bits_are_the_result_of_float32_cast_once(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, grad = adversarial(shape, dtype, 1), adversarial(shape, dtype, 2)
    channel = [size if axis == 1 else 1 for axis, size in enumerate(shape)]
    for amax in (torch.tensor(0.7), torch.rand(channel, generator=generator(3)) + 0.01):
        step, zero = amax / 100, torch.tensor(7)
        pairs = [
            [
                *(cpu.symmetric_fake_quantize(y, amax, INT8), cpu.symmetric_quantize(y, amax, INT8)[0]),
                *(cpu.affine_fake_quantize(y, step, zero, 0, 255), cpu.range_fake_quantize(y, -amax, amax, 8)),
                *(cpu.scaled_float_fake_quantize(y, amax, E4M3), cpu.round_to_float_format(y, E5M2)),
                *(cpu.symmetric_gradient(g, y, amax), cpu.affine_gradient(g, y, step, zero, 0, 255)),
                *(cpu.round_to_e8m0(y), cpu.absmax(y), cpu.absmax(y, 0), *cpu.minmax(y)),
                *cpu.minmax(torch.where(y.isnan(), 0.0, y), -1),
            ]
            for y, g in ((x, grad), (x.float(), grad.float()))
        ]
        for narrow, wide in zip(*pairs, strict=True):
            assert_same(narrow, wide.to(dtype))
        assert cpu.affine_quantize(x, step, zero, 0, 255).dtype == torch.float32


@pytest.mark.parametrize("view", ["contiguous", "gaps", "offset", "odd address"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_around_those_of_vectors_and_threads(dtype: torch.dtype, view: str) -> None:
    """Every length has each end of its loops; a threshold of threads cuts between parameters too."""
    for n in (*range(1, 71), 1023, 1024, 1025, *(SHARED if view == "offset" and dtype == torch.float32 else (32769,))):
        x = VIEWS[view](adversarial((n,), dtype, n))
        check("symmetric_fake_quantize", x, torch.tensor(0.9), INT8)
        check("symmetric_gradient", x, x, torch.tensor(0.9))
        check("round_to_float_format", x, E4M3)
        check("absmax", x)
        check("abs_histogram", x, 0.01, 50)


@pytest.mark.parametrize("shape", [(3, 5, 2731), (40000, 2), (2, 70, 17, 19), (11, 3001), (2, 64, 16, 33)])
@pytest.mark.parametrize("view", ["contiguous", "channels last", "transposed"])
def test_parameters_of_slices_that_threads_share(shape: tuple[int, ...], view: str) -> None:
    for dtype in (torch.float32, torch.bfloat16) if view == "contiguous" else (torch.float32,):
        x = VIEWS[view](adversarial(shape, dtype, 5))
        for axis in range(len(shape)):
            sizes = [size if other == axis else 1 for other, size in enumerate(shape)]
            amax = torch.rand(sizes, generator=generator(axis)) * 2 + 0.1
            check("symmetric_fake_quantize", x, amax, INT8)
            check("symmetric_gradient", x, x, amax)
            check("absmax", x, axis)
            check("minmax", torch.where(x == 0, 1.0, x), axis)
        if view == "contiguous":
            amax = torch.rand(blocks_of(shape, 32), generator=generator(9)) + 0.1
            check("symmetric_fake_quantize", x, amax, IntFormat(4), 32)


def test_negative_zero_of_unsigned_codes_and_of_ranges() -> None:
    x = torch.tensor([-0.0, 0.0]).repeat(40)
    for name in ("symmetric_quantize", "symmetric_fake_quantize"):
        check(name, x, torch.tensor(1.0), IntFormat(8, True))
    for low, high in ((-0.0, 0.0), (0.0, 0.0), (-0.0, -0.0), (-0.0, 1.0)):
        check("range_fake_quantize", x, torch.tensor(low), torch.tensor(high), 8)
    check("affine_fake_quantize", x, torch.tensor(0.5), torch.tensor(0), 0, 255)
