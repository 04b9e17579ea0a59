"""Fold: batch norms into convolutions and linears, constant weights into parameters, and no-operations away."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from .ops import WEIGHTED, Kind, is_constant, kind_of, rank_of, value_of, weight_position
from .parameters import add_parameter, get_attribute, tensor_at

aten = torch.ops.aten

_ALIASES = {
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.lift_fresh_copy.default,
    aten.feature_dropout.default,
}
_CASTS = {aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_CHECKS = {aten._assert_tensor_metadata.default}
_BATCH_NORM = aten._native_batch_norm_legit_no_training.default


def fold(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Simplifies a captured graph in place, without a change of its function beyond float rounding.

    Copies and casts that change nothing go; weights that are expressions of parameters become parameters; a batch norm
    that follows a convolution, transposed convolution or linear (whose output nothing else reads) is folded into its
    weight and bias: w' = w * g / sqrt(v + eps), b' = (b - m) * g / sqrt(v + eps) + beta (Jacob et al. 2018, section
    3.2).
    """
    _remove_aliases(graph_module)
    _products_as_linears(graph_module)
    _fold_constant_weights(graph_module)
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target is _BATCH_NORM:
            _fold_batch_norm(graph_module, node)
    graph_module.graph.eliminate_dead_code()
    _remove_unused_parameters(graph_module)
    graph_module.recompile()
    return graph_module


def _remove_aliases(graph_module: fx.GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _VIEWS:
            node.target = aten.reshape.default  # without the copies, the strides that a view counts on are gone
        if node.target in _CHECKS:
            graph_module.graph.erase_node(node)
        elif node.target in _ALIASES or (node.target in _CASTS and _same_kind(node)):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)


def _same_kind(node: fx.Node) -> bool:
    before = value_of(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    after = value_of(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.dtype == after.dtype and before.device == after.device


def _products_as_linears(graph_module: fx.GraphModule) -> None:
    """x @ weight becomes a linear: one spelling, and one that ONNX Runtime does not fuse into a float Gemm."""
    for node in list(graph_module.graph.nodes):
        if kind_of(node) is not Kind.MATMUL or weight_position(node) is None:
            continue
        source, weight = node.args
        assert isinstance(weight, fx.Node)
        if rank_of(weight) != 2:
            continue
        with graph_module.graph.inserting_before(node):
            transposed = graph_module.graph.call_function(aten.t.default, (weight,))
        transposed.meta = {"val": value_of(weight).t(), "qdq_constant": True}
        node.target, node.args = aten.linear.default, (source, transposed)


def _fold_constant_weights(graph_module: fx.GraphModule) -> None:
    """Weight norm, transposed or scaled weights: the expression is computed once, as deployment would."""
    known: dict[fx.Node, str] = {}
    for node in list(graph_module.graph.nodes):
        positions = [p for p in (weight_position(node),) if p is not None]
        candidates = [positions[0][0]] if positions else []
        if kind_of(node) in WEIGHTED and len(node.args) > 2:
            candidates.append(2)
        for position in candidates:
            operand = node.args[position]
            if not isinstance(operand, fx.Node) or operand.op == "get_attr" or not is_constant(operand):
                continue
            if operand not in known:
                source = next(n for n in _ancestors(operand) if n.op == "get_attr")
                base = re.sub(r"(^|\.)parametrizations\.(.*)\.original\d*$", r"\1\2", str(source.target))
                known[operand] = add_parameter(graph_module, f"{base}_folded", evaluate(graph_module, operand))
            with graph_module.graph.inserting_before(node):
                attribute = get_attribute(graph_module, known[operand], operand)
            node.update_arg(position, attribute)
    graph_module.graph.eliminate_dead_code()


def _ancestors(node: fx.Node) -> list[fx.Node]:
    out: list[fx.Node] = []
    for source in node.all_input_nodes:
        out += _ancestors(source)
    return [*out, node]


def evaluate(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The value of a node that depends on parameters, buffers and literals alone."""
    if node.op == "get_attr":
        return tensor_at(graph_module, str(node.target))
    arguments = fx.map_arg((node.args, node.kwargs), lambda n: evaluate(graph_module, n))
    with torch.no_grad():
        return node.target(*arguments[0], **arguments[1])  # type: ignore[operator]


def _fold_batch_norm(graph_module: fx.GraphModule, norm: fx.Node) -> None:
    layer = norm.args[0]
    outputs = [u for u in norm.users if u.target is operator.getitem and u.args[1] == 0]
    if not isinstance(layer, fx.Node) or len(outputs) != 1 or len(norm.users) != 1:
        return
    if kind_of(layer) not in WEIGHTED or len(layer.users) != 1 or weight_position(layer) is None:
        return
    weight_node, bias_node = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
    if not isinstance(weight_node, fx.Node) or weight_node.op != "get_attr":
        return
    if kind_of(layer) is Kind.LINEAR and (value := value_of(layer)) is not None and value.dim() != 2:
        return  # a batch norm over dimension 1 is then not over the linear's output features
    gamma, beta, mean, variance = (_constant(graph_module, a) for a in norm.args[1:5])
    epsilon = norm.args[6]
    assert isinstance(epsilon, float) and mean is not None and variance is not None
    weight = tensor_at(graph_module, str(weight_node.target)).double()
    bias = _constant(graph_module, bias_node)
    factor = (variance.double() + epsilon).rsqrt()
    if gamma is not None:
        factor = factor * gamma.double()
    shift = -mean.double() if bias is None else bias.double() - mean.double()
    shift = shift * factor + (0 if beta is None else beta.double())
    if kind_of(layer) is Kind.TRANSPOSED_CONVOLUTION:
        groups = _argument(layer, 6, "groups", 1)
        split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        folded = split * factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
        folded = folded.reshape(weight.shape)
    else:
        folded = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    with graph_module.graph.inserting_before(layer):
        new_weight = _store(graph_module, weight_node, folded.float())
        if isinstance(bias_node, fx.Node):
            new_bias = _store(graph_module, bias_node, shift.float())
        else:
            path = str(weight_node.target).rpartition(".")[0]
            name = add_parameter(graph_module, f"{path}.bias" if path else "bias", shift.float())
            new_bias = get_attribute(graph_module, name, norm.args[3])  # type: ignore[arg-type]
    arguments = list(layer.args) + [None] * (3 - len(layer.args))
    arguments[1], arguments[2] = new_weight, new_bias
    layer.args = tuple(arguments)
    outputs[0].replace_all_uses_with(layer)
    graph_module.graph.erase_node(outputs[0])
    graph_module.graph.erase_node(norm)


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _constant(graph_module: fx.GraphModule, node: Any) -> Tensor | None:
    return None if node is None else evaluate(graph_module, node)


def _store(graph_module: fx.GraphModule, node: fx.Node, value: Tensor) -> fx.Node:
    """Puts a folded value under the node's own name, or under a new one where others read the old value too."""
    name = str(node.target)
    readers = [u for n in graph_module.graph.nodes if n.op == "get_attr" and n.target == name for u in n.users]
    if len(readers) == 1:
        owner, _, leaf = name.rpartition(".")
        module = graph_module.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        return node
    return get_attribute(graph_module, add_parameter(graph_module, f"{name}_folded", value), node)


def _remove_unused_parameters(graph_module: fx.GraphModule) -> None:
    used = {str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"}
    for path, module in list(graph_module.named_modules()):
        prefix = f"{path}." if path else ""
        for store in (module._parameters, module._buffers):
            for name in [n for n in store if prefix + n not in used]:
                del store[name]
