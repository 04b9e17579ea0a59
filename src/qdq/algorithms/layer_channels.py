"""The weight of a layer by its input channels and by its output channels, groups and transposed convolutions too."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import Layer


def channel_counts(layer: Layer, weight: Tensor) -> tuple[int, int]:
    """How many input and output channels a layer has."""
    groups = _groups(layer, weight)
    if layer.axis == 1:
        return weight.shape[0], weight.shape[1] * groups
    return weight.shape[1] * groups, weight.shape[0]


def channel_dim(weight: Tensor) -> int:
    """The dimension that holds the channels in a layer's input and output, counted from the end."""
    return -1 if weight.dim() == 2 else 1 - weight.dim()


def input_maxima(layer: Layer, weight: Tensor) -> Tensor:
    """[input channels]: the largest magnitude of the weights that read a channel."""
    return _grouped(layer, weight).abs().amax((1, 3)).flatten()


def output_maxima(layer: Layer, weight: Tensor) -> Tensor:
    """[output channels]: the largest magnitude of the weights that compute a channel."""
    return _grouped(layer, weight).abs().amax((2, 3)).flatten()


def times_inputs(layer: Layer, weight: Tensor, factors: Tensor) -> Tensor:
    """The weight with what reads input channel i multiplied by `factors[i]`."""
    grouped = _grouped(layer, weight)
    return _ungrouped(layer, grouped * factors.reshape(grouped.shape[0], 1, -1, 1), weight)


def times_outputs(layer: Layer, weight: Tensor, factors: Tensor) -> Tensor:
    """The weight with what computes output channel i multiplied by `factors[i]`."""
    grouped = _grouped(layer, weight)
    return _ungrouped(layer, grouped * factors.reshape(grouped.shape[0], -1, 1, 1), weight)


def _groups(layer: Layer, weight: Tensor) -> int:
    if weight.dim() == 2:
        return 1
    given = layer.rest[3] if len(layer.rest) > 3 else layer.keywords.get("groups", 1)
    return int(given)


def _grouped(layer: Layer, weight: Tensor) -> Tensor:
    """[groups, output channels of a group, input channels of a group, positions of the kernel]."""
    groups = _groups(layer, weight)
    if layer.axis == 1:
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _ungrouped(layer: Layer, grouped: Tensor, like: Tensor) -> Tensor:
    if layer.axis == 1:
        grouped = grouped.transpose(1, 2)
    return grouped.reshape(like.shape)


def feature_maxima(x: Tensor, dim: int) -> Tensor:
    """[size of `dim`]: the largest magnitude, float64; zeros where `x` is empty."""
    x = x.abs().movedim(dim, -1).reshape(-1, x.shape[dim])
    return x.amax(0).double() if x.shape[0] else x.new_zeros(x.shape[1], dtype=torch.float64)
