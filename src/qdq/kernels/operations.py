"""The quantizers as operators of PyTorch: `torch.export` keeps one node for each, of which tools can ask the settings.

Eager calls and `torch.compile` do not come here: the first would start more slowly, the second could not fuse.
`torch.ops.qdq.fake_tensor_quant(inputs, amax, num_bits, unsigned, narrow_range)` and
`torch.ops.qdq.scaled_e4m3(inputs, amax)` compute :mod:`qdq.kernels.reference` on every device, and have its
straight-through gradient. They check nothing: :mod:`qdq.functional` did, before the program was captured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import E4M3, IntFormat
from . import reference


@torch.library.custom_op("qdq::fake_tensor_quant", mutates_args=())
def fake_tensor_quant(inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
    """:func:`qdq.kernels.reference.symmetric_fake_quantize` as one node."""
    return reference.symmetric_fake_quantize(inputs, amax, IntFormat(num_bits, unsigned, narrow_range))


@torch.library.custom_op("qdq::scaled_e4m3", mutates_args=())
def scaled_e4m3(inputs: Tensor, amax: Tensor | None) -> Tensor:
    """:func:`qdq.kernels.reference.scaled_float_fake_quantize` to E4M3 as one node."""
    return reference.scaled_float_fake_quantize(inputs, amax, E4M3)


@fake_tensor_quant.register_fake
def _(inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
    return reference.symmetric_fake_quantize(inputs, amax, IntFormat(num_bits, unsigned, narrow_range))


@scaled_e4m3.register_fake
def _(inputs: Tensor, amax: Tensor | None) -> Tensor:
    return reference.scaled_float_fake_quantize(inputs, amax, E4M3)


def _keep_symmetric(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _keep_e4m3(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensor, amax = inputs
    ctx.save_for_backward(tensor, torch.full_like(tensor, E4M3.max_value) if amax is None else amax)


def _straight_through(ctx: Any, grad: Tensor) -> Tensor:
    return torch.where(reference.symmetric_mask(*ctx.saved_tensors), grad, torch.zeros_like(grad))


fake_tensor_quant.register_autograd(
    lambda ctx, grad: (_straight_through(ctx, grad), None, None, None, None), setup_context=_keep_symmetric
)
scaled_e4m3.register_autograd(lambda ctx, grad: (_straight_through(ctx, grad), None), setup_context=_keep_e4m3)

# What nodes of captured graphs call.
FAKE_TENSOR_QUANT = torch.ops.qdq.fake_tensor_quant.default
SCALED_E4M3 = torch.ops.qdq.scaled_e4m3.default

__all__ = ["FAKE_TENSOR_QUANT", "SCALED_E4M3", "fake_tensor_quant", "scaled_e4m3"]
