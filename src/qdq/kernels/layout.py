"""How an element's place in memory says which parameter (amax, step size, ...) it belongs to.

The engines walk memory, whatever the order of the axes in it. Element i of the memory order belongs to parameter
``((i // row) * ceil(row / inner) + (i % row) // inner) % count``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """See the module; ``n`` elements in all."""

    n: int
    row: int
    inner: int
    count: int


def is_dense(x: Tensor) -> bool:
    """True where the elements fill a block of memory without gaps or repetition, in any order of the axes."""
    return x.is_contiguous() or _fill_memory(x.shape, x.stride())


@lru_cache(maxsize=1024)
def _fill_memory(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for axis in _slowest_first(strides)[::-1]:
        if sizes[axis] != 1:
            if strides[axis] != expected:
                return False
            expected *= sizes[axis]
    return True


def memory_order(x: Tensor) -> list[int]:
    """The axes of ``x``, slowest first."""
    return _slowest_first(x.stride())


def _slowest_first(strides: tuple[int, ...]) -> list[int]:
    return sorted(range(len(strides)), key=lambda axis: (-strides[axis], axis))


def per_tensor(n: int) -> Layout:
    """One parameter for all elements."""
    return Layout(n, n, n, 1)


def broadcast_layout(x: Tensor, parameter: Tensor) -> tuple[Layout, Tensor]:
    """The layout of dense ``x`` with a parameter that broadcasts to it, and the parameter in the order of memory.

    Where the axes that the parameter varies over are not neighbours in memory, it is repeated along those between.
    """
    n = x.numel()
    if parameter.numel() == 1:
        return per_tensor(n), parameter
    if n == 0:
        return Layout(0, 0, 0, parameter.numel()), parameter.contiguous()
    quick = one_axis(x, parameter)
    if quick is not None:
        return quick, parameter.contiguous()
    full = parameter.reshape((1,) * (x.dim() - parameter.dim()) + tuple(parameter.shape))
    order = [axis for axis in memory_order(x) if x.shape[axis] != 1]
    varying = [place for place, axis in enumerate(order) if full.shape[axis] != 1]
    if not varying:
        return per_tensor(n), parameter
    used = order[varying[0] : varying[-1] + 1]
    inner = math.prod(x.shape[axis] for axis in order[varying[-1] + 1 :])
    count = math.prod(x.shape[axis] for axis in used)
    if any(full.shape[axis] == 1 for axis in used):
        full = full.expand([x.shape[axis] if axis in used else 1 for axis in range(x.dim())])
    rest = [axis for axis in range(x.dim()) if axis not in used]
    values = full.permute(*used, *rest).reshape(-1)
    return Layout(n, inner * count, inner, count), values.contiguous()


def one_axis(x: Tensor, parameter: Tensor) -> Layout | None:
    """The layout of dense ``x`` with a parameter that varies along one axis, the most frequent case; else None."""
    return _one_axis(x.shape, x.stride(), parameter.shape)


@lru_cache(maxsize=1024)
def _one_axis(sizes: tuple[int, ...], strides: tuple[int, ...], parameter_sizes: tuple[int, ...]) -> Layout | None:
    count = math.prod(parameter_sizes)
    first = len(sizes) - len(parameter_sizes)
    if first < 0 or count == 0:
        return None
    for axis, size in enumerate(parameter_sizes, first):
        if size != 1:
            if size != count or sizes[axis] != count:
                return None
            return Layout(math.prod(sizes), strides[axis] * count, strides[axis], count)
    return None


def block_layout(x: Tensor, parameter: Tensor, block_size: int) -> tuple[Layout, Tensor]:
    """The layout of contiguous ``x`` with a parameter for every ``block_size`` elements of the last axis."""
    n = x.numel()
    if parameter.numel() == 1:
        return per_tensor(n), parameter
    if n == 0:
        return Layout(0, 0, 0, parameter.numel()), parameter.contiguous()
    row = x.shape[-1]
    blocks = (*x.shape[:-1], -(-row // block_size))
    values = parameter.expand(blocks).reshape(-1).contiguous()
    return Layout(n, row, min(block_size, row), values.numel()), values
