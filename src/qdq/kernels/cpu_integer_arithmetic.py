"""The ends of integer operations on the CPU engine, one pass each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .layout import broadcast_layout, is_dense, per_tensor
from .native import library

_kernels: Any = library().functions
_threads = torch.get_num_threads


def requantize(sums: list[Tensor], bias: Tensor | None, ratio: Tensor, step: Tensor) -> Tensor:
    """:func:`qdq.kernels.reference.requantize`."""
    out = sums[0]
    plain = all(x.dtype is torch.float32 and x.stride() == out.stride() for x in sums)
    if len(sums) > 2 or not plain or not is_dense(out) or out.dim() < 2:
        return reference.requantize(sums, bias, ratio, step)
    zeros = out.new_zeros(out.shape[1])
    whole = zeros.double() if bias is None else bias
    high = whole.float()
    low = (whole - high).float()
    shape = [1, -1, *[1] * (out.dim() - 2)]
    placed = [broadcast_layout(out, (values + zeros).reshape(shape)) for values in (high, low, ratio)]
    layout = placed[0][0]
    _kernels.qdq_requantize(
        out.data_ptr(),
        sums[1].data_ptr() if len(sums) == 2 else None,
        out.data_ptr(),
        *layout,
        *(values.data_ptr() for _, values in placed),
        float(step),
        _threads(),
    )
    return out


def add_codes(
    a: Tensor,
    b: Tensor,
    steps: tuple[Tensor, Tensor, Tensor],
    zero_points: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """:func:`qdq.kernels.reference.add_codes`."""
    if a.shape != b.shape or a.stride() != b.stride() or not is_dense(a) or a.dtype is not torch.float32:
        return reference.add_codes(a, b, steps, zero_points)
    ratio_a, ratio_b, fixed = reference.add_constants(steps, zero_points)
    (step_a, step_b, step), (zero_a, zero_b, zero) = steps, zero_points
    values = (step_a, zero_a, ratio_a, step_b, zero_b, ratio_b, fixed, zero, step)
    numbers = torch.tensor([float(value) for value in values], dtype=torch.float32, device="cpu")
    out = torch.empty_like(a)
    _kernels.qdq_add_codes(
        a.data_ptr(), b.data_ptr(), out.data_ptr(), per_tensor(a.numel()).n, numbers.data_ptr(), _threads()
    )
    return out
