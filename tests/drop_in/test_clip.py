"""`Clip` and `nn.functional.clip` through the old import names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pytorch_quantization import nn as quant_nn
from pytorch_quantization.nn import Clip
from pytorch_quantization.nn.functional import ClipFunction, clip
from pytorch_quantization.nn.modules.clip import Clip as SameClip

X = torch.tensor([-3.0, -1.0, 0.25, 0.5, 2.0])


def test_names() -> None:
    assert Clip is SameClip is quant_nn.Clip
    assert quant_nn.functional.clip is clip
    assert issubclass(ClipFunction, torch.autograd.Function)


@pytest.mark.parametrize("function", [clip, ClipFunction.apply])
def test_gradient_strictly_inside_and_the_rest_to_the_bounds(function: Callable[..., torch.Tensor]) -> None:
    x = X.clone().requires_grad_()
    low, high = torch.tensor(-1.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    out = function(x, low, high)
    assert out.tolist() == [-1, -1, 0.25, 0.5, 0.5]
    out.backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 4, 0, 0]
    assert (low.grad, high.grad) == (torch.tensor(3.0), torch.tensor(24.0))


def test_bounds_broadcast_forward_but_not_backward() -> None:
    x = torch.stack([X, X]).requires_grad_()
    high = torch.tensor([[0.0], [1.0]])
    out = clip(x, torch.tensor(-2.0), high)
    assert torch.equal(out, torch.minimum(torch.clamp(x, min=-2.0), high))
    with pytest.raises(ValueError, match="can only be scalar"):
        out.sum().backward()


@pytest.mark.parametrize("bound", [0.5, np.array([0.5]), np.array(0.5), np.float32(0.5)])
def test_learned_bounds(bound: float | np.ndarray) -> None:
    module = Clip(-1.0, bound, learn_min=True, learn_max=True)
    assert {n: p.item() for n, p in module.named_parameters()} == {"clip_value_min": -1.0, "clip_value_max": 0.5}
    module(X).sum().backward()
    assert (module.clip_value_min.grad, module.clip_value_max.grad) == (torch.tensor(2.0), torch.tensor(2.0))
    one = Clip(torch.tensor(-1.0), 0.5, False, True)
    assert [n for n, _ in one.named_parameters()] == ["clip_value_max"]
    assert torch.equal(one(X), torch.clamp(X, -1.0, 0.5))


def test_fixed_bounds() -> None:
    module = Clip(torch.tensor(-1.0), torch.tensor(0.5))
    assert not list(module.parameters())
    assert torch.equal(module(X), torch.clamp(X, -1.0, 0.5))


@pytest.mark.parametrize("bound", [torch.tensor(1.0), torch.tensor([1.0]), np.array([1.0, 2.0])])
def test_a_learned_bound_must_be_scalar(bound: torch.Tensor | np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be scalar"):
        Clip(-1.0, bound, learn_max=True)
    with pytest.raises(ValueError, match="must be scalar"):
        Clip(bound, 9.0, learn_min=True)
