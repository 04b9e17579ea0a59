"""A layer as matrix products: its weight as rows, and of its input the patches that the rows are multiplied with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .layer import Layer


class LayerMatrix:
    """result[position, channel] = patches[group, position] @ rows[group, channel] + bias.

    Linear: one group, and every vector is a patch. Convolution: a patch is what the kernel covers. Transposed
    convolution: the convolution of the input, spread by the stride, with the mirrored kernel.

    Args:
        layer: the layer.
        weight: its weight, for the shape.
    """

    def __init__(self, layer: Layer, weight: Tensor) -> None:
        self.shape, self.kernel = tuple(weight.shape), tuple(weight.shape[2:])
        self.transposed, dims = layer.axis == 1, weight.dim() - 2
        names = ("stride", "padding", "dilation", "groups")
        if self.transposed:
            names = ("stride", "padding", "output_padding", "groups", "dilation")
        given: dict[str, Any] = {**dict(zip(names, layer.rest, strict=False)), **layer.keywords} if dims else {}
        self.groups: int = given.get("groups", 1)
        self.stride = _each(given.get("stride", 1), dims)
        self.dilation = _each(given.get("dilation", 1), dims)
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        padding: Any = given.get("padding", 0)
        if isinstance(padding, str):
            before = [r // 2 if padding == "same" else 0 for r in reach]
            after = [r - r // 2 if padding == "same" else 0 for r in reach]
        else:
            before = after = list(_each(padding, dims))
        if self.transposed:
            more = _each(given.get("output_padding", 0), dims)
            before, after = (
                [r - b for r, b in zip(reach, before, strict=True)],
                [r - a + m for r, a, m in zip(reach, after, more, strict=True)],
            )
        self.padding = tuple(zip(before, after, strict=True))

    def rows(self, weight: Tensor) -> Tensor:
        """[groups, channels of a group, values of a patch], of any tensor of the weight's shape."""
        if self.transposed:
            inputs, outputs = self.shape[:2]
            weight = weight.reshape(self.groups, inputs // self.groups, outputs, *self.kernel)
            weight = weight.transpose(1, 2).flip(list(range(3, weight.dim())))
            return weight.reshape(self.groups, outputs, -1)
        return weight.reshape(self.groups, self.shape[0] // self.groups, -1)

    def weight(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        if self.transposed:
            inputs, outputs = self.shape[:2]
            weight = rows.reshape(self.groups, outputs, inputs // self.groups, *self.kernel)
            weight = weight.flip(list(range(3, weight.dim()))).transpose(1, 2)
            return weight.reshape(self.shape)
        return rows.reshape(self.shape)

    def positions(self, x: Tensor) -> int:
        """How many positions an input has: its vectors, or the positions of all its images' results."""
        if not self.kernel:
            return x.numel() // max(1, self.shape[1])
        x = self._batched(x)
        return x.shape[0] * math.prod(self._sizes(x))

    def patches(self, x: Tensor, positions: Tensor) -> Tensor:
        """The patches at some positions.

        Args:
            x: the layer's input.
            positions: int64 [n], counted in the order in which the result lies in memory with its channels last.

        Returns:
            [groups, n, values of a patch].
        """
        if not self.kernel:
            return x.reshape(-1, self.shape[1])[positions][None]
        x = self._batched(x)
        sizes = self._sizes(x)
        x = F.pad(self._spread(x), [p for pair in reversed(self.padding) for p in pair])
        dims, stride = len(sizes), (1,) * len(sizes) if self.transposed else self.stride
        inside, image = positions.clone(), positions
        index = torch.zeros(len(positions), *[1] * dims, dtype=torch.int64, device=x.device)
        strides = [math.prod(x.shape[3 + d :]) for d in range(dims)]
        for d in reversed(range(dims)):
            image = torch.div(inside, sizes[d], rounding_mode="floor")
            first = (inside - image * sizes[d]) * stride[d]
            taps = torch.arange(self.kernel[d], device=x.device) * self.dilation[d]
            along = (first[:, None] + taps) * strides[d]
            index = index + along.reshape(-1, *[self.kernel[d] if i == d else 1 for i in range(dims)])
            inside = image
        index = index.reshape(len(positions), -1)
        # [n, taps, channels] -> [groups, n, channels of a group, taps]
        taken = x.flatten(2).transpose(1, 2)[image[:, None], index]
        taken = taken.reshape(*index.shape, self.groups, -1).permute(2, 0, 3, 1)
        return taken.reshape(self.groups, len(positions), -1)

    def results(self, output: Tensor, positions: Tensor) -> Tensor:
        """[groups, n, channels of a group]: the layer's result at some positions."""
        if self.kernel:
            output = self._batched(output).movedim(1, -1)
        output = output.reshape(-1, output.shape[-1])[positions]
        return output.reshape(len(positions), self.groups, -1).transpose(0, 1)

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == len(self.shape) else x[None]

    def _spread(self, x: Tensor) -> Tensor:
        """Zeros between the values, stride - 1 of them, where the layer is a transposed convolution."""
        if not self.transposed or all(s == 1 for s in self.stride):
            return x
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], self.stride, strict=True)]
        out = x.new_zeros(*x.shape[:2], *sizes)
        out[(..., *[slice(None, None, s) for s in self.stride])] = x
        return out

    def _sizes(self, x: Tensor) -> list[int]:
        """Spatial sizes of the result."""
        out = []
        for d, n in enumerate(x.shape[2:]):
            stride = self.stride[d]
            if self.transposed:
                n, stride = (n - 1) * stride + 1, 1
            reach = self.dilation[d] * (self.kernel[d] - 1)
            out.append((n + sum(self.padding[d]) - reach - 1) // stride + 1)
        return out


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One value per dimension."""
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)
