"""Where the channels of a tensor go: labels that follow them through operations which a factor per channel passes.

Let a tensor's channel c be divided by a factor s_c > 0. An operation passes the factor if each value of its result is
divided by the factor of one channel: moves of values, positively homogeneous functions (ReLU, a maximum, a mean over
positions), products with something else. The label of a value tells its channel; OTHER is what belongs to none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.ops import REARRANGEMENTS, SPLITS

aten = torch.ops.aten

OTHER = -1

_ELEMENTWISE = {
    aten.relu.default,
    aten.leaky_relu.default,
    aten.prelu.default,
    aten.abs.default,
    aten.neg.default,
    aten.alias.default,  # what rounds the input of a linear in blocks
}
_WINDOWS = {
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
    aten.upsample_nearest1d.vec: 1,
    aten.upsample_nearest2d.vec: 2,
    aten.upsample_nearest3d.vec: 3,
    aten.upsample_linear1d.vec: 1,
    aten.upsample_bilinear2d.vec: 2,
    aten.upsample_bicubic2d.vec: 2,
    aten.upsample_trilinear3d.vec: 3,
}
_MOVES = REARRANGEMENTS | SPLITS | {operator.getitem}
_PADS = {aten.constant_pad_nd.default: 2, aten.pad.default: 3}
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}


def pass_labels(
    node: fx.Node, operation: Any, labels: dict[fx.Node, Any], value: Callable[[fx.Node], Any]
) -> Tensor | list[Tensor] | None:
    """The labels of a node's result; None where it does not pass the factors.

    Args:
        node: reads at least one labelled node.
        operation: what it computes.
        labels: of nodes before it; a list where a node gives several tensors.
        value: a node's size if it gives a tensor (a list of sizes if several), else its value.
    """
    if operation in _MOVES:
        return _moved(node, operation, labels, value)
    if operation is aten.cat.default:
        return _concatenated(node, labels, value)
    if operation in _PRODUCTS:
        return _product(node, labels, value(node))
    if operation in _SUMS:
        return _sum(node, labels, value(node))
    given = [a for a in node.args[:2] if isinstance(a, fx.Node) and a in labels]
    if len(given) != 1 or not isinstance(labels[given[0]], Tensor) or given[0] in node.args[2:]:
        return None
    source = labels[given[0]]
    if operation in (aten.mul.Tensor, aten.mul.Scalar):
        return source.expand(value(node))
    if given[0] is not node.args[0]:
        return None
    if operation in _ELEMENTWISE:
        return source
    if operation is aten.div.Tensor:
        return source.expand(value(node))
    if operation in _WINDOWS:
        return _spread(source, range(-_WINDOWS[operation], 0), value(node))
    if operation in _PADS:
        return _padded(node, operation, source, value(node))
    if operation is aten.mean.dim:
        return _mean(node, source, value(node))
    return None


def along(labels: Tensor, dim: int) -> Tensor | None:
    """[size of `dim`]: the labels, where they differ along this dimension alone; else None."""
    dim %= labels.dim()
    one = _uniform(labels, [d for d in range(labels.dim()) if d != dim])
    return None if one is None else one.reshape(-1)


def _uniform(labels: Tensor, dims: Sequence[int]) -> Tensor | None:
    """With size 1 along `dims`, where the labels are the same along them."""
    one = labels
    for dim in dims:
        one = one.narrow(dim, 0, 1)
    return one if labels.numel() and bool((labels == one).all()) else None


def _spread(labels: Tensor, dims: Sequence[int], size: torch.Size) -> Tensor | None:
    if labels.dim() < len(dims):
        return None
    one = _uniform(labels, dims)
    return None if one is None else one.expand(size)


def _moved(node: fx.Node, operation: Any, labels: dict[fx.Node, Any], value: Callable[[fx.Node], Any]) -> Any:
    source, rest = node.args[0], node.args[1:]
    if not isinstance(source, fx.Node) or source not in labels:
        return None
    numbers, keywords = fx.map_arg((rest, node.kwargs), value)
    return operation(labels[source], *numbers, **keywords)


def _concatenated(node: fx.Node, labels: dict[fx.Node, Any], value: Callable[[fx.Node], Any]) -> Tensor | None:
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)):
        return None
    other = next(iter(labels.values())).new_full((), OTHER)
    given = [labels[p] if p in labels else other.expand(value(p)) for p in parts]  # type: ignore[index]
    return torch.cat(given, *node.args[1:], **node.kwargs)  # type: ignore[arg-type]


def _product(node: fx.Node, labels: dict[fx.Node, Any], size: torch.Size) -> Tensor | None:
    """Matrix products: the factor must be the same along the dimension that is summed over."""
    left, right = node.all_input_nodes if len(node.all_input_nodes) == 2 else (None, None)
    if left is None:
        return None  # a tensor times itself
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if (left in labels) == (right in labels):
        return None
    source, dim = (labels[left], -1) if left in labels else (labels[right], -2)
    return _spread(source, [dim], size) if source.dim() > 1 and len(size) > 1 else None


def _sum(node: fx.Node, labels: dict[fx.Node, Any], size: torch.Size) -> Tensor | None:
    """Of two tensors whose values have the same factors."""
    if len(node.args) < 2 or not all(isinstance(a, fx.Node) and a in labels for a in node.args[:2]):
        return None
    first, second = (labels[a].expand(size) for a in node.args[:2])  # type: ignore[index]
    return first if torch.equal(first, second) else None


def _padded(node: fx.Node, operation: Any, labels: Tensor, size: torch.Size) -> Tensor | None:
    mode = node.args[2] if operation is aten.pad.default and len(node.args) > 2 else "constant"
    position = _PADS[operation]
    fill = node.args[position] if len(node.args) > position else node.kwargs.get("value")
    if mode == "constant" and fill not in (None, 0, 0.0):
        return None
    widths = next(iter(node.args[1:]), None)
    assert isinstance(widths, (list, tuple))
    return _spread(labels, range(-(len(widths) // 2), 0), size)


def _mean(node: fx.Node, labels: Tensor, size: torch.Size) -> Tensor | None:
    dims = node.args[1] if len(node.args) > 1 else None
    if not isinstance(dims, (list, tuple)) or not dims or node.kwargs.get("dtype") is not None:
        return None
    one = _uniform(labels, [int(d) for d in dims])  # type: ignore[arg-type]
    return None if one is None else one.reshape(size)
