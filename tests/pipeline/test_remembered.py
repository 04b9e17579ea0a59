"""Constants that the simulation keeps: kept while nothing changes, and never longer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qdq
from qdq.remembered import Remembered, can_remember


def test_a_result_is_kept_until_a_value_changes() -> None:
    x, calls = torch.arange(6.0), []
    memory = Remembered()

    def compute() -> torch.Tensor:
        calls.append(1)
        return x * 2

    first = memory.get(compute, x)
    assert memory.get(compute, x) is first and len(calls) == 1
    with torch.no_grad():
        x[2] = 7
    assert memory.get(compute, x)[2] == 14 and len(calls) == 2
    x.data[3] = 9  # leaves no trace but the values
    assert memory.get(compute, x)[3] == 18 and len(calls) == 3
    odd = torch.arange(5.0)[1:]
    memory.get(compute, odd)
    odd.data[0] = -1
    before = len(calls)
    memory.get(compute, odd)
    assert len(calls) == before + 1


def test_other_kept_tensors_are_other_results() -> None:
    memory, x = Remembered(), torch.ones(2)
    a, b = torch.ones(3), torch.ones(3)
    first = memory.get(lambda: object(), x, kept=(a,))
    assert memory.get(lambda: object(), x, kept=(a,)) is first
    assert memory.get(lambda: object(), x, kept=(b,)) is not first


def test_copies_keep_nothing() -> None:
    memory = Remembered()
    memory.get(lambda: 1, torch.ones(2))
    assert copy.deepcopy(memory)._last is None


def test_nothing_is_kept_where_a_gradient_is_recorded() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert not can_remember(weight)
    with torch.no_grad():
        assert can_remember(weight)


@pytest.fixture(scope="module")
def quantized() -> torch.nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    return qdq.quantize(model, [torch.randn(4, 3, 10, 10)])


@pytest.mark.parametrize("way", ["copy_", "data", "state_dict", "step_size"])
def test_the_simulation_sees_changed_constants(quantized: torch.nn.Module, way: str) -> None:
    model = copy.deepcopy(quantized)
    x = torch.randn(2, 3, 10, 10)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model(x), before)
        name, weight = next((n, p) for n, p in model.named_parameters() if p.dim() == 4)
        if way == "copy_":
            weight.copy_(-weight)
        elif way == "data":
            weight.data.neg_()
        elif way == "state_dict":
            state = model.state_dict()
            model.load_state_dict({**state, name: -state[name]})
        else:
            steps = [b for n, b in model.named_buffers() if n.endswith("step_size") and b.dim() == 1]
            steps[0].mul_(3)
        after = model(x)
        assert not torch.equal(after, before)
        fresh = copy.deepcopy(model)
        assert torch.equal(fresh(x), after)
    weight.requires_grad_()
    with torch.enable_grad():
        trained = model(x)
        trained.sum().backward()
        assert weight.grad is not None
