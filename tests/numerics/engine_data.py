"""For the tests of engines: values that break kernels, views of every kind, and what equal means."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qdq.kernels import native

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Around the lengths of vectors, of a run that is vectorised, of buffers.
SIZES = (*range(1, 71), 127, 128, 129, 1023, 1024, 1025, 2049)
SHAPES = ((), (0,), (1,), (3, 0), (0, 3), (2, 5), (1, 70), (70, 1), (5, 33), (33, 5), (3, 2, 40), (4, 1, 3), (2, 3, 4))
SHAPES += ((2, 3, 5, 7), (2, 40, 3, 3), (1, 3, 1, 4), (2, 3, 2, 3, 4), (1, 70, 5, 5), (3, 1030))
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 5e-324, 2.0**-24, 2.0**-25, -(2.0**-24), 6e-8)
SPECIAL += (3e38, -3e38, 1e300, 65504.0, -65520.0, 1.0, 0.5, -0.5, 1.5, 2.5, 0.49999997, 8388609.0, 448.0, 464.0, 1e-30)
AMAX = (0.0, 2.0**-24, math.nextafter(2.0**-24, 0), 2.0**-23, 1e-45, 1e-40, 1.2e-38, 1e-7, 1.0, 127.0, 0.3, 1e30, 3e38)
AMAX += (3.4028234e38, math.inf, math.nan)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adversarial(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, amax: Tensor | None = None, bound: int = 127
) -> Tensor:
    """Ordinary values, ties between codes, the ends and their neighbours, any magnitude, special values; contiguous."""
    g = generator(seed)
    limit = torch.ones(shape, dtype=torch.float64) if amax is None else amax.double().expand(shape)
    limit = torch.where(torch.isfinite(limit) & (limit > 0), limit, 1.0)
    most = min(bound + 2, 2**26)
    codes = torch.randint(-most, most + 1, shape, generator=g)
    few = torch.randint(-5, 6, shape, generator=g)
    at_end = limit.to(dtype) * torch.randint(0, 2, shape, generator=g).mul(2).sub(1)
    way = torch.randint(-1, 2, shape, generator=g)
    towards = torch.where(way > 0, math.inf, -math.inf).to(dtype)
    if dtype in (torch.float32, torch.float64):
        near_end = torch.where(way == 0, at_end, torch.nextafter(at_end, towards))
    else:
        near_end = at_end * (1 + way * torch.finfo(dtype).eps)
    kinds = torch.stack(
        [
            torch.randn(shape, generator=g, dtype=torch.float64) * limit,
            (codes + 0.5) * limit / bound,
            (few + 0.5) * limit / bound,
            near_end.double(),
            torch.randn(shape, generator=g, dtype=torch.float64)
            * 10.0 ** torch.randint(-46, 38, shape, generator=g).double(),
            torch.tensor(SPECIAL, dtype=torch.float64)[torch.randint(len(SPECIAL), shape, generator=g)],
        ]
    )
    return kinds.gather(0, torch.randint(len(kinds), (1, *shape), generator=g))[0].to(dtype)


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x


def _rotated(x: Tensor) -> Tensor:
    """The last axis slowest in memory."""
    if x.dim() < 2:
        return x
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _gaps(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 7.0)], dim=-1)[..., 0]


def _padded_rows(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (1, 2))[..., 1:-2] if x.dim() else x


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) if x.dim() and x.shape[0] else x


def _negative(x: Tensor) -> Tensor:
    """A view whose memory holds the negated values."""
    if x.dtype not in (torch.float32, torch.float64):
        return x
    return torch.imag(torch.complex(torch.zeros_like(x), -x).conj())


def _negative_dense(x: Tensor) -> Tensor:
    return torch._neg_view(-x)  # pyright: ignore[reportPrivateImportUsage]


def _offset(x: Tensor) -> Tensor:
    """Not on a multiple of anything but its own size."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    return memory[1:].view(x.shape).copy_(x)


def _odd_address(x: Tensor) -> Tensor:
    if not x.numel():
        return x
    memory = bytearray(x.numel() * x.element_size() + 1)
    return torch.frombuffer(memory, dtype=x.dtype, offset=1).view(x.shape).copy_(x)


def _strides_of_one(x: Tensor) -> Tensor:
    """Strides that mean nothing where an axis has one element."""
    strides = [1000 + axis if size == 1 else x.stride(axis) for axis, size in enumerate(x.shape)]
    return x.as_strided(x.shape, strides)


VIEWS = {
    "contiguous": lambda x: x,
    "channels last": _channels_last,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x,
    "rotated": _rotated,
    "gaps": _gaps,
    "padded rows": _padded_rows,
    "expanded": _expanded,
    "negative": _negative,
    "negative dense": _negative_dense,
    "offset": _offset,
    "odd address": _odd_address,
    "strides of one": _strides_of_one,
    "channels last with gaps": lambda x: _gaps(_channels_last(x)),
}


def bits(x: Tensor) -> Tensor:
    """The bits, all NaN alike; integers as they are."""
    x = x.detach().resolve_neg().clone(memory_format=torch.contiguous_format).reshape(-1)
    if not x.dtype.is_floating_point:
        return x
    return torch.where(torch.isnan(x), torch.nan, x).view(BITS[x.element_size()])


def assert_same(have: Tensor, want: Tensor, what: object = "") -> None:
    assert (have.dtype, have.shape) == (want.dtype, want.shape), what
    different = bits(have) != bits(want)
    if different.any():
        where = different.nonzero()[:4, 0]
        raise AssertionError(
            f"{what}: {int(different.sum())} of {have.numel()} differ, at {where.tolist()}: "
            f"{have.reshape(-1)[where].tolist()} instead of {want.reshape(-1)[where].tolist()}"
        )


def levels() -> list[str]:
    """The instruction sets that this processor has, the best first."""
    functions = native.library().functions
    if functions is None:
        return []
    best = functions.qdq_level()
    names = [b"x86-64-v4", b"x86-64-v3", b"x86-64-v2", b"aarch64", b"generic"]
    found = [name.decode() for name in names if functions.qdq_set_level(name)]
    functions.qdq_set_level(best)
    return found


@contextmanager
def level(name: str) -> Iterator[None]:
    functions = native.library().functions
    best = functions.qdq_level()
    assert functions.qdq_set_level(name.encode())
    try:
        yield
    finally:
        functions.qdq_set_level(best)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


LEVELS = levels()


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
