"""Tensors for property tests: dtypes, shapes, layouts, granularities, and the values that break things."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = ((), (0,), (1,), (7,), (3, 0), (2, 5), (4, 1, 3), (2, 3, 4))
SPECIAL = (0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"), 2.0**-24, 1e-8, 0.5, 6e4)


@st.composite
def inputs(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, non_negative: bool = False) -> Tensor:
    """A tensor of any of the dtypes and shapes, of any magnitude, contiguous or not, with special values."""
    shape = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-6, 3))
    if x.dim() and draw(st.booleans()):
        flat = x.view(-1)
        for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=3)):
            if flat.numel():
                flat[draw(st.integers(0, flat.numel() - 1))] = value
    if non_negative:
        x = x.abs()
    x = x.to(draw(st.sampled_from(dtypes)))
    layout = draw(st.sampled_from(("contiguous", "transposed", "strided", "expanded")))
    if layout == "transposed" and x.dim() >= 2:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "strided" and x.dim() >= 1:
        x = torch.stack([x, x], dim=-1)[..., 0]
    elif layout == "expanded" and x.dim() >= 1 and x.shape[0] > 0:
        x = x[:1].expand(x.shape)
    return x


@st.composite
def amax_for(draw: st.DrawFn, x: Tensor, bad: bool = True) -> Tensor:
    """An amax that broadcasts to ``x``: per tensor or per axis; near the data's, or zero, tiny, NaN, infinite."""
    if x.dim() and x.numel() and draw(st.booleans()):
        axis = draw(st.integers(0, x.dim() - 1))
        shape = [size if i == axis else 1 for i, size in enumerate(x.shape)]
    else:
        shape = [1] * draw(st.integers(0, x.dim()))
    finite = x[torch.isfinite(x)].abs().double()
    largest = float(finite.max()) if finite.numel() else 1.0
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    amax = largest * (0.2 + 1.3 * torch.rand(shape, generator=generator, dtype=torch.float64))
    if bad:
        flat = amax.view(-1)
        for value in draw(st.lists(st.sampled_from((0.0, 2.0**-24, 1e-7, float("nan"), float("inf"))), max_size=2)):
            flat[draw(st.integers(0, flat.numel() - 1))] = value
    return amax.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
