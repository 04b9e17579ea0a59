"""Canonical forms: operations written in terms of simpler ones, so that placement meets one spelling of each idea.

They are handed to `ExportedProgram.run_decompositions`, which traces them with symbolic shapes. A form that does not
apply returns `NotImplemented` and the operation stays as it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention as two matrix products around a softmax, so that each product can be quantized.

    A masked score becomes the least float32 number in place of -inf: equal results, except that a row which is masked
    as a whole gives the mean of the values and not NaN.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query * factor, key.transpose(-2, -1))
    lowest = torch.finfo(scores.dtype).min
    if is_causal:
        length, width = query.shape[-2], key.shape[-2]
        seen = torch.ones(length, width, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(seen.logical_not(), lowest)
    elif attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), lowest)
        else:
            scores = scores + attn_mask.clamp(min=lowest)
    return torch.matmul(torch.softmax(scores, -1), value)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x): runtimes have integer forms of both operations, but none of their product."""
    return x * torch.sigmoid(x)


def _global_pool(x: Tensor, output_size: Any) -> Any:
    if any(not isinstance(size, int) or size != 1 for size in output_size):
        return NotImplemented
    return aten.mean.dim(x, list(range(x.dim() - len(output_size), x.dim())), True)


def mean(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """The mean over all spatial dimensions without keeping them, as one that keeps them and a flatten."""
    if dtype is not None or keepdim or not dim or not 3 <= x.dim() <= 5:
        return NotImplemented
    if sorted(d % x.dim() for d in dim) != list(range(2, x.dim())):
        return NotImplemented
    return aten.flatten.using_ints(aten.mean.dim(x, dim, True), 1)


def addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """x @ weight + bias, the linear layer of models ported from other frameworks."""
    if beta != 1 or alpha != 1 or bias.dim() != 1:
        return NotImplemented
    return aten.linear.default(x, weight.t(), bias)


CANONICAL_FORMS: dict[Any, Any] = {
    aten.scaled_dot_product_attention.default: attention,
    aten.silu.default: silu,
    aten.adaptive_avg_pool1d.default: _global_pool,
    aten.adaptive_avg_pool2d.default: _global_pool,
    aten.adaptive_avg_pool3d.default: _global_pool,
    aten.mean.dim: mean,
    aten.addmm.default: addmm,
}
