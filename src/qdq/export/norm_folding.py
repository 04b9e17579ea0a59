"""Batch norms after quantized convolutions and linears, folded into the step sizes of the weight's codes."""

from __future__ import annotations

import dataclasses
import logging
import operator
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.fold import evaluate
from ..graph.ops import WEIGHTED, Kind, is_constant, kind_of, rank_of
from ..graph.parameters import add_parameter, get_attribute
from .coded_constants import CodedConstant

logger = logging.getLogger("qdq.export")

_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


def fold_norms(graph_module: fx.GraphModule, coded: dict[fx.Node, Any]) -> None:
    """Folds each batch norm whose input is a layer with a coded weight, and which alone reads that layer.

    The weight's codes stay, a channel's step size is multiplied by |gamma / sqrt(variance + eps)|, and codes change
    their sign where that factor is negative (a code of -128, which has no counterpart, becomes 127). The bias becomes
    (b - mean) * factor + beta. Without this no runtime could use integers: the codes are those of the weight before
    the batch norm.

    Args:
        graph_module: changed in place.
        coded: the coded constant of each node; takes the new ones.
    """
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target is _BATCH_NORM:
            _fold(graph_module, node, coded)
    graph_module.graph.eliminate_dead_code()


def _fold(graph_module: fx.GraphModule, norm: fx.Node, coded: dict[fx.Node, Any]) -> None:
    layer = norm.args[0]
    outputs = [u for u in norm.users if u.target is operator.getitem and u.args[1] == 0]
    if not isinstance(layer, fx.Node) or len(outputs) != 1 or len(norm.users) != 1 or len(layer.users) != 1:
        return
    kind = kind_of(layer)
    if kind not in WEIGHTED or (kind is Kind.LINEAR and rank_of(layer) != 2):
        return
    arguments = list(layer.args) + [None] * (3 - len(layer.args))
    weight = coded.get(arguments[1])  # type: ignore[arg-type]
    bias = arguments[2]
    if not isinstance(weight, CodedConstant) or (isinstance(bias, fx.Node) and not is_constant(bias)):
        return
    gamma, beta, mean, variance = (
        evaluate(graph_module, a).double() if isinstance(a, fx.Node) else None for a in norm.args[1:5]
    )
    assert mean is not None and variance is not None
    factor = (variance + norm.args[6]).rsqrt()  # type: ignore[operator]
    factor = factor if gamma is None else factor * gamma
    scaled = _scaled(weight, factor, layer)
    if scaled is None:
        return
    value = -mean if bias is None else evaluate(graph_module, bias).double() - mean  # type: ignore[arg-type]
    value = value * factor + (0 if beta is None else beta)
    source = arguments[1]
    assert isinstance(source, fx.Node)
    with graph_module.graph.inserting_before(layer):
        # A node of its own: another layer may read the same weight.
        arguments[1] = graph_module.graph.node_copy(source)
        owner = weight.name.rpartition(".")[0]
        path = add_parameter(graph_module, f"{owner}.bias" if owner else "bias", value.float())
        arguments[2] = get_attribute(graph_module, path, norm.args[3])  # type: ignore[arg-type]
    coded[arguments[1]] = scaled  # type: ignore[index]
    layer.args = tuple(arguments)
    outputs[0].replace_all_uses_with(layer)
    graph_module.graph.erase_node(outputs[0])
    graph_module.graph.erase_node(norm)


def _scaled(weight: CodedConstant, factor: Tensor, layer: fx.Node) -> CodedConstant | None:
    """The weight of factor times the outputs; None where codes cannot express it."""
    transposed = kind_of(layer) is Kind.TRANSPOSED_CONVOLUTION
    if weight.block_size is not None:
        return None
    axis = 1 if transposed else 0
    groups = layer.args[6] if len(layer.args) > 6 else layer.kwargs.get("groups", 1)
    if (transposed and groups != 1) or weight.axis not in (None, axis) or weight.codes.dtype == torch.uint8:
        return None
    shape = [-1 if i == axis else 1 for i in range(weight.codes.dim())]
    per_channel = factor.reshape(shape)
    step = (weight.step_size.double() * per_channel.abs()).float()
    # A factor of 0, or one so small that the step size vanishes, leaves nothing of the channel.
    gone = step < torch.finfo(torch.float32).tiny
    if weight.codes.dtype == torch.int8:
        wide = weight.codes.to(torch.int16)
        wide = torch.where(per_channel < 0, -wide, wide)
        lost = int((wide > 127).sum())
        if lost:
            logger.info("%s: %d codes of -128 become 127, since their channel changes its sign", weight.name, lost)
        codes = torch.where(gone, 0, wide.clamp(max=127)).to(torch.int8)
    else:
        wide = weight.codes.float()
        codes = torch.where(gone, 0.0, torch.where(per_channel < 0, -wide, wide)).to(weight.codes.dtype)
    step = torch.where(gone, weight.step_size.clamp(min=2.0**-64), step)
    return dataclasses.replace(weight, codes=codes, step_size=step)
