"""The ends of integer operations: the compiled form against the definition, and that against exact numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qdq.kernels import engine, reference

SHAPES = ((2, 3, 5, 7), (1, 1, 1), (3, 70, 4), (2, 33), (4, 8, 16, 16))


def whole(shape: tuple[int, ...], largest: int) -> Tensor:
    return torch.randint(-largest, largest + 1, shape).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_requantize_equals_the_reference(shape: tuple[int, ...], channels_last: bool, parts: int) -> None:
    torch.manual_seed(len(shape) + parts)
    sums = [whole(shape, 2**24 - 1) for _ in range(parts)]
    if channels_last and len(shape) == 4:
        sums = [x.to(memory_format=torch.channels_last) for x in sums]
    for bias in (None, torch.randint(-(2**30), 2**30, (shape[1],)).double()):
        for ratio in (torch.tensor(3e-6), torch.rand(shape[1]) * 1e-5 + 1e-9):
            step = torch.tensor(0.037)
            expected = reference.requantize([x.clone() for x in sums], bias, ratio, step)
            found = engine.for_tensor(sums[0]).requantize([x.clone() for x in sums], bias, ratio, step)
            assert found.dtype == torch.float32
            assert torch.equal(found, expected)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(-(2**24), 2**24),
    st.integers(-(2**24), 2**24),
    st.integers(-(2**30), 2**30),
    st.floats(2.0**-30, 2.0**-13, width=32),
)
def test_requantize_rounds_the_exact_sum_once(first: int, second: int, bias: int, ratio: float) -> None:
    parts = [torch.tensor([[float(first)]]), torch.tensor([[float(second)]])]
    found = engine.for_tensor(parts[0]).requantize(
        parts, torch.tensor([float(bias)], dtype=torch.float64), torch.tensor(ratio), torch.tensor(1.0)
    )
    total = torch.tensor(first + second + bias, dtype=torch.float64).float()
    product = Fraction(float(total)) * Fraction(float(torch.tensor(ratio)))
    assert float(found) == float(torch.tensor(float(product), dtype=torch.float64).float().round())


@pytest.mark.parametrize("shape", [*SHAPES, (1023,), ()])
def test_add_codes_equals_the_reference(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    for _ in range(20):
        steps = tuple(torch.rand(()) * 10.0 ** float(torch.randint(-4, 3, ())) + 1e-6 for _ in range(3))
        zeros = tuple(torch.randint(0, 256, (), dtype=torch.int32) for _ in range(3))
        a, b = ((torch.randint(0, 256, shape) - z) * s for s, z in zip(steps[:2], zeros[:2], strict=True))
        found = engine.for_tensor(a).add_codes(a, b, steps, zeros)
        assert torch.equal(found, reference.add_codes(a, b, steps, zeros))


def test_add_codes_of_tensors_that_broadcast_or_lie_apart() -> None:
    torch.manual_seed(2)
    steps = tuple(torch.tensor(v) for v in (0.02, 0.05, 0.06))
    zeros = tuple(torch.tensor(v, dtype=torch.int32) for v in (3, 128, 90))
    a = (torch.randint(0, 256, (2, 4, 6, 6)) - zeros[0]) * steps[0]
    b = (torch.randint(0, 256, (2, 4, 1, 1)) - zeros[1]) * steps[1]
    run = engine.for_tensor(a)
    assert torch.equal(run.add_codes(a, b, steps, zeros), reference.add_codes(a, b, steps, zeros))
    apart = a[:, :, ::2]
    assert torch.equal(run.add_codes(apart, apart, steps, zeros), reference.add_codes(apart, apart, steps, zeros))


def test_the_definition_on_numbers() -> None:
    sums = [torch.tensor([[100.0, -7.0]])]
    found = reference.requantize(sums, torch.tensor([4.0, 1.0]).double(), torch.tensor([0.25, 0.5]), torch.tensor(2.0))
    assert found.tolist() == [[52.0, -6.0]]  # 26 and -3, in steps of 2
    one = torch.tensor(1.0)
    none = torch.tensor(0, dtype=torch.int32)
    total = reference.add_codes(torch.tensor([2.0]), torch.tensor([3.0]), (one, one, one), (none, none, none))
    assert math.isclose(float(total), 5.0)
