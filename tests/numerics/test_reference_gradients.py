"""The gradients of the reference engine against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from numerics.strategies import amax_for, inputs
from qdq.clip import clip
from qdq.kernels.reference import (
    affine_gradient,
    clip_gradient,
    compute_dtype,
    range_gradient,
    symmetric_gradient,
)

SMALLEST = 2.0**-149
BAD = (torch.inf, -torch.inf, torch.nan, 3e38, SMALLEST)


def as_array(x: Tensor) -> np.ndarray:
    return x.detach().to(torch.float64).numpy()


def in_compute_dtype(value: Tensor, x: Tensor) -> np.ndarray:
    return as_array(value.to(compute_dtype(x.dtype)))


@st.composite
def grads_for(draw: st.DrawFn, x: Tensor) -> Tensor:
    """A gradient like ``x``, in places infinite, NaN or tiny."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    grad = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(draw(st.sampled_from([x.dtype])))
    if grad.dim() and grad.numel():
        for value in draw(st.lists(st.sampled_from(BAD), max_size=3)):
            grad.view(-1)[draw(st.integers(0, grad.numel() - 1))] = value
    return grad


@st.composite
def with_ends_inside(draw: st.DrawFn, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``x`` with values exactly at the ends of the range."""
    x = x.clone()
    if x.dim() and x.numel() and x.is_contiguous():
        for end in draw(st.lists(st.sampled_from([low, high]), max_size=3)):
            x.view(-1)[draw(st.integers(0, x.numel() - 1))] = end.reshape(-1)[0].to(x.dtype)
    return x


def assert_selected(result: Tensor, grad: Tensor, mask: np.ndarray) -> None:
    assert result.dtype == grad.dtype
    assert result.shape == grad.shape
    np.testing.assert_array_equal(as_array(result), np.where(mask, as_array(grad), 0.0))


@given(st.data())
def test_symmetric(data: st.DataObject) -> None:
    x = data.draw(inputs())
    amax = data.draw(amax_for(x))
    x = data.draw(with_ends_inside(x, -amax, amax))
    grad = data.draw(grads_for(x))
    mask = np.abs(as_array(x)) <= in_compute_dtype(amax, x)
    assert_selected(symmetric_gradient(grad, x, amax), grad, mask)


@given(st.data(), st.sampled_from([(0, 255), (-128, 127), (0, 1)]), st.floats(1e-4, 10.0), st.floats(0, 1))
def test_affine(data: st.DataObject, limits: tuple[int, int], step: float, position: float) -> None:
    lo, hi = limits
    x = data.draw(inputs())
    zero = round(lo + position * (hi - lo))
    shape = [1] * (x.dim() - 1) + [x.shape[-1]] if data.draw(st.booleans()) and x.dim() else []
    steps, zeros = torch.full(shape, step), torch.full(shape, zero, dtype=torch.int32)
    kind = np.float64 if x.dtype == torch.float64 else np.float32
    low, high = (kind(end - zero) * steps.numpy().astype(kind) for end in limits)
    x = data.draw(with_ends_inside(x, torch.as_tensor(low), torch.as_tensor(high)))
    grad = data.draw(grads_for(x))
    wide = as_array(x)
    assert_selected(affine_gradient(grad, x, steps, zeros, lo, hi), grad, (wide >= low) & (wide <= high))


def summed_to(values: np.ndarray, shape: torch.Size) -> np.ndarray:
    """The sum over the axes along which ``shape`` broadcasts."""
    total = np.asarray(values, np.float64)
    if int(np.prod(shape)) == 1:
        return total.sum().reshape(shape)
    while total.ndim > len(shape):
        total = total.sum(axis=0)
    for axis, size in enumerate(shape):
        if size == 1:
            total = total.sum(axis=axis, keepdims=True)
    return total


def assert_sum(result: Tensor, values: np.ndarray, end: Tensor) -> None:
    assert result.dtype == end.dtype
    assert result.shape == end.shape
    with np.errstate(all="ignore"):
        expected = summed_to(values, end.shape)
        rounding = 1e-12 * summed_to(np.abs(values), end.shape)
    assert result.device == end.device
    wide = as_array(result)
    with np.errstate(all="ignore"):
        narrow = as_array(torch.from_numpy(np.array(expected)).to(end.dtype))
        close = np.abs(wide - expected) <= rounding + 2e-7 * np.abs(expected) + SMALLEST
    same = (wide == narrow) | (np.isnan(wide) & np.isnan(expected))
    assert (same | close).all(), (wide, expected)


@given(st.data())
def test_range(data: st.DataObject) -> None:
    x = data.draw(inputs())
    high = data.draw(amax_for(x))
    low = high - data.draw(st.sampled_from([0.0, 0.5, 2.0])) * high.abs()
    if data.draw(st.booleans()) and low.numel():
        low = low.reshape(-1)[:1].reshape(()).clone()  # ends of two shapes
    x = data.draw(with_ends_inside(x, low, high))
    grad = data.draw(grads_for(x))
    results = range_gradient(grad, x, low, high)
    wide, below, above = as_array(x), in_compute_dtype(low, x), in_compute_dtype(high, x)
    assert_selected(results[0], grad, (wide >= below) & (wide <= above))
    assert_sum(results[1], np.where(wide < below, as_array(grad), 0.0), low)
    assert_sum(results[2], np.where(wide > above, as_array(grad), 0.0), high)


@given(st.data(), st.floats(-2, 2), st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([(), (1,), (1, 1)]))
def test_clip(data: st.DataObject, start: float, width: float, shape: tuple[int, ...]) -> None:
    x = data.draw(inputs())
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    low, high = torch.full(shape, start, dtype=dtype), torch.full((), start + width, dtype=dtype)
    x = data.draw(with_ends_inside(x, low, high))
    grad = data.draw(grads_for(x))
    results = clip_gradient(grad, x, low, high)
    wide, below, above = as_array(x), as_array(low).reshape(()), as_array(high)
    assert_selected(results[0], grad, (wide > below) & (wide < above))
    assert_sum(results[1], np.where(wide <= below, as_array(grad), 0.0), low)
    assert_sum(results[2], np.where(wide >= above, as_array(grad), 0.0), high)


def test_clip_agrees_with_the_gradient_of_clip() -> None:
    x = torch.cat([torch.randn(500), torch.tensor([-1.0, 1.0, torch.inf, torch.nan])]).requires_grad_()
    low, high = torch.tensor(-1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    grad = torch.randn(504)
    expected = torch.autograd.grad(clip(x, low, high), (x, low, high), grad)
    torch.testing.assert_close(clip_gradient(grad, x.detach(), low.detach(), high.detach()), expected)


def test_an_infinite_gradient_outside_the_range_gives_zero() -> None:
    x, one = torch.tensor([-2.0, 0.0, 2.0, torch.nan, torch.inf]), torch.tensor(1.0)
    grad = torch.full((5,), torch.inf)
    expected = [0.0, torch.inf, 0.0, 0.0, 0.0]
    assert symmetric_gradient(grad, x, one).tolist() == expected
    assert affine_gradient(grad, x, one, torch.tensor(1), 0, 2).tolist() == expected
    # The sums do take it; NaN inputs are in none.
    for function in (range_gradient, clip_gradient):
        passed, below, above = function(grad, x, -one, one)
        assert passed.tolist() == expected
        assert (below, above) == (torch.inf, torch.inf)
        assert function(grad[3:4], x[3:4], -one, one) == (0, 0, 0)


def test_ends_pass_in_a_range_and_not_in_a_clip() -> None:
    x, one, grad = torch.tensor([-1.0, 1.0]), torch.tensor([1.0]), torch.tensor([3.0, 5.0])
    assert symmetric_gradient(grad, x, one).tolist() == [3, 5]
    assert [v.tolist() for v in range_gradient(grad, x, -one, one)] == [[3, 5], [0], [0]]
    assert [v.tolist() for v in clip_gradient(grad, x, -one, one)] == [[0, 0], [3], [5]]


def test_sums_are_computed_in_float64() -> None:
    grad = torch.ones(4001)
    grad[0], grad[-1] = 2.0**30, -(2.0**30)
    x, zero = torch.full((4001,), -1.0), torch.tensor(0.0)
    assert range_gradient(grad, x, zero, zero)[1] == 3999
    assert clip_gradient(grad, x, zero, zero)[1] == 3999
    half = clip_gradient(grad[1:-1].half(), x[1:-1].half(), zero, zero)
    assert (half[0].dtype, half[1].dtype, half[1]) == (torch.float16, torch.float32, 3999)


def test_sixteen_bits_are_compared_in_float32() -> None:
    x, grad = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)
    just_below = torch.tensor(0.9999)  # 1 in bfloat16
    assert symmetric_gradient(grad, x, just_below) == 0
    assert clip_gradient(grad, x, -just_below, just_below)[2] == 1
    assert range_gradient(grad, x, -just_below, just_below)[2] == 1


def test_empty_and_scalar_tensors() -> None:
    one = torch.tensor(1.0)
    for x in (torch.empty(0), torch.empty(3, 0), torch.tensor(0.5)):
        for result in (symmetric_gradient(x, x, one), affine_gradient(x, x, one, one, 0, 3)):
            assert torch.equal(result, x)
        for function in (range_gradient, clip_gradient):
            assert torch.equal(function(x, x, -one, one)[0], x)
            assert function(x, x, -one, one)[1:] == (0, 0)


def test_what_does_not_fit_is_refused() -> None:
    x, pair = torch.zeros(3), torch.zeros(2)
    with pytest.raises(ValueError, match=r"amax of shape \(2,\) does not broadcast to inputs of shape \(3,\)"):
        symmetric_gradient(x, x, pair)
    with pytest.raises(ValueError, match="step_size of shape"):
        affine_gradient(x, x, pair, pair, 0, 1)
    with pytest.raises(ValueError, match="max_range of shape"):
        range_gradient(x, x, torch.zeros(3), pair)
    with pytest.raises(ValueError, match=r"clip values can only be scalar in training, got shapes \(2,\) and \(1,\)"):
        clip_gradient(x, x, pair, pair[:1])
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        symmetric_gradient(x, x.long(), torch.ones(()))


def test_gradients_can_be_traced_and_keep_the_layout() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    column = torch.tensor([0.5, 1.0, 1.5]).reshape(3, 1, 1)
    one = torch.tensor(1.0)

    def every(grad: Tensor, x: Tensor) -> list[Tensor]:
        return [
            symmetric_gradient(grad, x, column),
            affine_gradient(grad, x, column, torch.ones_like(column), 0, 2),
            *range_gradient(grad, x, -column, column),
            *clip_gradient(grad, x, -one, one),
        ]

    expected = every(grad, x)
    assert [v.stride() for v in expected if v.dim() == 4] == [x.stride()] * 4
    assert [v.shape for v in expected if v.dim() == 3] == [column.shape] * 2
    torch.testing.assert_close(torch.compile(every, fullgraph=True, backend="eager")(grad, x), expected, rtol=0, atol=0)
    column, one = column.to("meta"), one.to("meta")
    on_meta = every(grad.to("meta"), x.to("meta"))
    assert [v.shape for v in on_meta] == [v.shape for v in expected]
