"""Clip: clamping to a range whose ends may be learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function

from .kernels import reference
from .kernels.engine import for_tensor


def _compared(bound: Tensor, x: Tensor) -> Tensor:
    """``bound`` as the forward pass compares it with ``x``: a 0-d tensor takes the dtype of the other."""
    return bound.to(x.dtype) if bound.dim() == 0 else bound


class ClipFunction(Function):
    """The ``autograd.Function`` behind :func:`clip`, which documents it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, clip_value_min: Tensor, clip_value_max: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(input, clip_value_min), clip_value_max).to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, low, high = ctx.saved_tensors
        (grad,) = grad_outputs
        # Compilers trace the reference, and it is what records a gradient of the gradient.
        run = reference if torch.compiler.is_compiling() or torch.is_grad_enabled() else for_tensor(grad)
        passed, grad_low, grad_high = run.clip_gradient(grad, x, _compared(low, x), _compared(high, x))
        return passed, grad_low.to(low.dtype), grad_high.to(high.dtype)


def clip(input: Tensor, clip_value_min: Tensor, clip_value_max: Tensor) -> Tensor:
    """``input`` clamped to the range, in its own dtype; the bounds broadcast to it.

    The gradient passes strictly inside the range; what lies at an end or beyond is summed into that bound's gradient.

    Raises:
        ValueError: in the backward pass, where a bound is not a single value.
    """
    return ClipFunction.apply(input, clip_value_min, clip_value_max)


class Clip(nn.Module):
    """Clamp to a range whose ends may be learned.

    Args:
        clip_value_min: the lower end. A number, or an array of one element, where it is learned; else a tensor
            too, which broadcasts to the input.
        clip_value_max: the upper end, likewise.
        learn_min: make the lower end a Parameter.
        learn_max: make the upper end a Parameter.

    Raises:
        ValueError: a learned end that is a tensor or has several elements.
    """

    clip_value_min: Tensor
    clip_value_max: Tensor

    def __init__(
        self,
        clip_value_min: float | np.ndarray | Tensor,
        clip_value_max: float | np.ndarray | Tensor,
        learn_min: bool = False,
        learn_max: bool = False,
    ) -> None:
        super().__init__()
        self._add("clip_value_min", clip_value_min, learn_min)
        self._add("clip_value_max", clip_value_max, learn_max)

    def _add(self, name: str, value: Any, learned: bool) -> None:
        if learned:
            if isinstance(value, Tensor) or np.size(value) != 1:
                raise ValueError(f"{name} must be scalar (a number or an array of one element) to be learned")
            setattr(self, name, nn.Parameter(torch.tensor(float(np.asarray(value).item()))))
        else:
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.get_default_dtype())
            # Not persistent: state dicts hold the learned bounds only.
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` clamped to the range."""
        return clip(inputs, self.clip_value_min, self.clip_value_max)
