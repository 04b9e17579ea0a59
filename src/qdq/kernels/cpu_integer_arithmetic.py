"""The ends of integer operations on the CPU engine, one pass each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .engine import is_plain
from .layout import broadcast_layout, is_dense
from .native import library, refuse

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
    status = _kernels.qdq_requantize(
        out.data_ptr(),
        sums[1].data_ptr() if len(sums) == 2 else None,
        out.data_ptr(),
        *layout,
        *(values.data_ptr() for _, values in placed),
        float(step),
        _threads(),
    )
    refuse(status)
    return out


def add_codes(
    a: Tensor,
    b: Tensor,
    steps: tuple[Tensor, Tensor, Tensor],
    zero_points: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """:func:`qdq.kernels.reference.add_codes`."""
    alike = a.shape == b.shape and a.stride() == b.stride() and a.dtype is b.dtype is torch.float32
    if not alike or not is_dense(a) or not (is_plain(b) and b.is_cpu) or a.is_neg() or b.is_neg():
        return reference.add_codes(a, b, steps, zero_points)
    ratio_a, ratio_b, fixed = reference.add_constants(steps, zero_points)
    (step_a, step_b, step), (zero_a, zero_b, zero) = steps, zero_points
    values = (step_a, zero_a, ratio_a, step_b, zero_b, ratio_b, fixed, zero, step)
    numbers = torch.tensor([float(value) for value in values], dtype=torch.float32, device="cpu")
    out = torch.empty_like(a)
    pointers = a.data_ptr(), b.data_ptr(), out.data_ptr()
    refuse(_kernels.qdq_add_codes(*pointers, a.numel(), numbers.data_ptr(), _threads()))
    return out
