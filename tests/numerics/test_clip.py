"""Clip: values, gradients, bounds of every kind, errors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from qdq.clip import Clip, ClipFunction, clip


def test_values_and_gradients() -> None:
    x = torch.tensor([-2.0, -1.0, 0.5, 1.0, 3.0, float("nan")], requires_grad=True)
    low, high = torch.tensor(-1.0, requires_grad=True), torch.tensor([1.0], requires_grad=True)
    out = ClipFunction.apply(x, low, high)
    torch.testing.assert_close(out, torch.tensor([-1.0, -1.0, 0.5, 1.0, 1.0, float("nan")]), equal_nan=True)
    out.backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]))
    assert x.grad is not None
    assert low.grad is not None
    assert high.grad is not None
    assert x.grad.tolist() == [0, 0, 4, 0, 0, 0]
    assert low.grad == 3
    assert high.grad.tolist() == [24]


def test_bounds_broadcast_but_cannot_be_trained() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    high = torch.tensor([0.1, 0.2])
    out = clip(x, torch.tensor(-0.1), high)
    assert torch.equal(out, torch.clamp(x, torch.tensor(-0.1), high))
    with pytest.raises(ValueError, match=r"clip values can only be scalar in training, got shapes \(\) and \(2,\)"):
        out.sum().backward()


def test_module_learns_what_it_is_told_to() -> None:
    module = Clip(-1, np.array([0.5]), learn_min=True, learn_max=True)
    assert sorted(module.state_dict()) == ["clip_value_max", "clip_value_min"]
    assert module(torch.tensor([-3.0, 0.2, 3.0])).tolist() == pytest.approx([-1, 0.2, 0.5])
    module = Clip(torch.tensor(-1.0), 2.0, learn_max=True)
    assert [name for name, _ in module.named_parameters()] == ["clip_value_max"]
    module = Clip(-1.0, 2)
    assert not list(module.parameters())
    assert module(torch.tensor([-3, 5.0])).tolist() == [-1, 2]
    assert copy.deepcopy(module)(torch.tensor([-3, 5.0])).tolist() == [-1, 2]


def test_learned_bounds_must_be_scalar() -> None:
    for bad in (torch.tensor(1.0), np.array([1.0, 2.0])):
        with pytest.raises(ValueError, match="clip_value_max must be scalar"):
            Clip(-1.0, bad, learn_max=True)
        with pytest.raises(ValueError, match="clip_value_min must be scalar"):
            Clip(bad, 1.0, learn_min=True)


def test_half_inputs_stay_half_and_get_half_gradients() -> None:
    x = torch.tensor([-2.0, 0.25, 2.0], dtype=torch.float16, requires_grad=True)
    module = Clip(-1.0, 1.0, learn_min=True, learn_max=True)
    out = module(x)
    assert out.dtype == torch.float16
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 0]
    assert module.clip_value_max.grad == 1


# PyTorch's own compiler instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_exports_and_transforms() -> None:
    module = Clip(-0.5, 0.5, learn_min=True, learn_max=True)
    x = torch.randn(4, 3, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    program = torch.export.export(module, (x.detach(),))
    assert torch.equal(program.module()(x.detach()), module(x))
    assert torch.equal(torch.func.vmap(module)(x), module(x))
