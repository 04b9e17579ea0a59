"""Quantization per block along the last axis: the definition is one parameter for each value, repeated and cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from numerics.strategies import inputs
from qdq.formats import E2M1, E4M3, IntFormat
from qdq.kernels.reference import (
    affine_dequantize,
    affine_fake_quantize,
    affine_gradient,
    affine_quantize,
    expand_blocks,
    scaled_float_fake_quantize,
    symmetric_fake_quantize,
    symmetric_gradient,
    symmetric_quantize,
)

INT8, INT4 = IntFormat(8, narrow_range=True), IntFormat(4)


def spread(parameter: Tensor, x: Tensor, block_size: int) -> Tensor:
    """One value of ``parameter`` for each of ``x``, written out index by index."""
    result = torch.empty(x.shape, dtype=parameter.dtype)
    blocks = parameter.broadcast_to((*x.shape[:-1], math.ceil(x.shape[-1] / block_size)))
    for k in range(x.shape[-1]):
        result[..., k] = blocks[..., k // block_size]
    return result


@st.composite
def blocks_for(draw: st.DrawFn, x: Tensor, block_size: int) -> Tensor:
    """A positive value per block, or per column of blocks, with some that are zero, tiny or no numbers."""
    full = (*x.shape[:-1], math.ceil(x.shape[-1] / block_size))
    shape = draw(st.sampled_from([full, (1,) * (x.dim() - 1) + full[-1:], full[-1:], (*full[:-1], 1), ()]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.rand(shape, generator=generator) * 10.0 ** draw(st.integers(-3, 2)) + 1e-6
    if values.numel():
        for value in draw(st.lists(st.sampled_from([0.0, 2.0**-24, torch.nan, torch.inf]), max_size=2)):
            values.view(-1)[draw(st.integers(0, values.numel() - 1))] = value
    return values


def assert_same(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@given(st.data(), st.integers(1, 6), st.sampled_from([INT8, INT4, IntFormat(8, unsigned=True), IntFormat(0)]))
def test_symmetric(data: st.DataObject, block_size: int, fmt: IntFormat) -> None:
    x = data.draw(inputs().filter(lambda t: t.dim() > 0))
    amax = data.draw(blocks_for(x, block_size))
    each = spread(amax, x, block_size)
    codes, scale = symmetric_quantize(x, amax, fmt, block_size)
    expected, expected_scale = symmetric_quantize(x, each, fmt)
    assert_same(codes, expected)
    assert scale.shape == amax.shape
    assert_same(spread(scale, x, block_size), expected_scale)
    assert_same(symmetric_fake_quantize(x, amax, fmt, block_size), symmetric_fake_quantize(x, each, fmt))
    assert_same(symmetric_gradient(x, x, amax, block_size), symmetric_gradient(x, x, each))


@given(st.data(), st.integers(1, 6), st.sampled_from([(0, 255), (-8, 7)]))
def test_affine(data: st.DataObject, block_size: int, limits: tuple[int, int]) -> None:
    x = data.draw(inputs().filter(lambda t: t.dim() > 0))
    step = data.draw(blocks_for(x, block_size)).nan_to_num(1.0, 2.0).clamp_(min=1e-5)
    zero = (step * 1e4).to(torch.int32) % (limits[1] + 1)
    steps, zeros = spread(step, x, block_size), spread(zero, x, block_size)
    codes = affine_quantize(x, step, zero, *limits, block_size)
    assert_same(codes, affine_quantize(x, steps, zeros, *limits))
    assert_same(affine_dequantize(codes, step, zero, block_size), affine_dequantize(codes, steps, zeros))
    fake = affine_fake_quantize(x, step, zero, *limits, block_size)
    assert_same(fake, affine_fake_quantize(x, steps, zeros, *limits))
    assert_same(
        affine_gradient(x, x, step, zero, *limits, block_size=block_size),
        affine_gradient(x, x, steps, zeros, *limits),
    )


@given(st.data(), st.integers(1, 6), st.sampled_from([E4M3, E2M1]))
def test_float_formats(data: st.DataObject, block_size: int, fmt: object) -> None:
    x = data.draw(inputs().filter(lambda t: t.dim() > 0))
    amax = data.draw(blocks_for(x, block_size))
    result = scaled_float_fake_quantize(x, amax, fmt, block_size)  # type: ignore[arg-type]
    assert_same(result, scaled_float_fake_quantize(x, spread(amax, x, block_size), fmt))  # type: ignore[arg-type]


def test_a_short_last_block_and_its_digits() -> None:
    x = torch.tensor([[1.0, 0.5, 4.0, 2.0, 7.0], [1.0, 1.0, 0.0, 9.0, -3.0]])
    amax = torch.tensor([[1.0, 4.0, 7.0], [2.0, 0.0, 3.0]])
    codes, scale = symmetric_quantize(x, amax, INT8, 2)
    assert codes.tolist() == [[127, 64, 127, 64, 127], [64, 64, 0, 0, -127]]
    assert scale.tolist() == [[127, 31.75, pytest.approx(127 / 7)], [63.5, 1, pytest.approx(127 / 3)]]


def test_one_block_wider_than_the_axis_and_single_values() -> None:
    x = torch.randn(2, 3)
    amax = x.abs().amax(1, keepdim=True)
    assert_same(symmetric_fake_quantize(x, amax, INT8, 128), symmetric_fake_quantize(x, amax, INT8))
    one = torch.ones(1, 1, 1)
    assert_same(symmetric_fake_quantize(x, one, INT8, 2), symmetric_fake_quantize(x, one, INT8))
    scalar = torch.tensor(0.3)
    assert_same(symmetric_fake_quantize(scalar, one, INT8, 2), symmetric_fake_quantize(scalar, one, INT8))
    assert_same(symmetric_fake_quantize(scalar, scalar, INT8, 2), symmetric_fake_quantize(scalar, scalar, INT8))


def test_empty_inputs() -> None:
    for shape, blocks in (((0,), (0,)), ((0, 5), (0, 3)), ((2, 0), (2, 0)), ((2, 0), (2, 1))):
        x, amax = torch.empty(shape), torch.ones(blocks)
        assert symmetric_fake_quantize(x, amax, INT8, 2).shape == shape


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 6)
    message = (
        r"amax of shape \(2, 2\) does not broadcast to the blocks of shape \(2, 3\): "
        r"inputs of shape \(2, 6\) with block_size=2"
    )
    with pytest.raises(ValueError, match=message):
        symmetric_fake_quantize(x, torch.ones(2, 2), INT8, 2)
    with pytest.raises(ValueError, match=r"zero_point of shape \(6,\)"):
        affine_fake_quantize(x, torch.ones(3), torch.ones(6), 0, 255, 2)
    with pytest.raises(ValueError, match=r"amax of shape \(2, 1, 1\)"):
        symmetric_gradient(x, x, torch.ones(2, 1, 1), 2)
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"block_size must be at least 1, got {bad}"):
            symmetric_quantize(x, torch.ones(()), INT8, bad)
    with pytest.raises(ValueError, match=r"step_size of shape \(2,\) does not broadcast to the blocks of shape \(\)"):
        expand_blocks(torch.zeros(()), torch.ones(2), 2, "step_size")


def test_blocks_can_be_traced_and_keep_the_layout() -> None:
    x = torch.randn(4, 6).t()  # 6 x 4, transposed
    amax = torch.rand(6, 2) + 0.1
    zero = torch.ones(6, 2, dtype=torch.int32)

    def every(x: Tensor, amax: Tensor, zero: Tensor) -> list[Tensor]:
        return [
            *symmetric_quantize(x, amax, INT8, 3),
            symmetric_fake_quantize(x, amax, INT8, 3),
            affine_quantize(x, amax, zero, 0, 15, 3),
            affine_fake_quantize(x, amax, zero, 0, 15, 3),
            scaled_float_fake_quantize(x, amax, E4M3, 3),
            symmetric_gradient(x, x, amax, 3),
            affine_gradient(x, x, amax, zero, 0, 15, 3),
        ]

    expected = every(x, amax, zero)
    assert {v.stride() for v in expected if v.shape == x.shape} == {x.stride()}
    compiled = torch.compile(every, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, amax, zero), expected, rtol=0, atol=0)
    on_meta = every(x.to("meta"), amax.to("meta"), zero.to("meta"))
    assert [v.shape for v in on_meta] == [v.shape for v in expected]
