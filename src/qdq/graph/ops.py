"""What each operation of a captured graph means to quantization: its kind, and where its operands sit."""

from __future__ import annotations

import operator
from enum import Enum
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


class Kind(str, Enum):
    """The kinds of operation that the tables of targets speak of."""

    CONVOLUTION = "convolution"
    TRANSPOSED_CONVOLUTION = "transposed convolution"
    LINEAR = "linear"
    MATMUL = "matmul"
    EMBEDDING = "embedding"
    ADD = "add"
    MUL = "mul"
    CONCAT = "concat"
    AVERAGE_POOL = "average pool"
    GLOBAL_AVERAGE = "global average"
    MOVE = "value-moving"
    CLIP = "clip"
    POINTWISE = "pointwise"
    OTHER = "other"


# Bounds (the least and the largest value a clip lets through) are read from the node by `clip_bounds`.
_CLIPS = {aten.relu.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.relu6.default}

# Each value of the result is a value of the one input, from a place that shapes and literals alone decide: what holds
# for single values (codes, channels, places) can be moved by the same operation, in any dtype.
REARRANGEMENTS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.select.int,
        aten.slice.Tensor,
        aten.flip.default,
        aten.roll.default,
        aten.movedim.int,
        aten.pixel_shuffle.default,
        aten.pixel_unshuffle.default,
        aten.channel_shuffle.default,
    }
)

# The same, into several results, which `getitem` nodes pick.
SPLITS = frozenset(
    {
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.tensor_split.sections,
    }
)

# What moves values besides: another tensor or the values themselves decide the place, or float tensors alone are taken.
_MOVES = (
    REARRANGEMENTS
    | SPLITS
    | {
        aten.index_select.default,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten.upsample_nearest1d.vec,
        aten.upsample_nearest2d.vec,
        aten.upsample_nearest3d.vec,
    }
)

# Functions of one tensor, value by value, or with a constant operand.
_POINTWISE = {
    aten.sigmoid.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.leaky_relu.default,
    aten.prelu.default,
    aten.elu.default,
    aten.celu.default,
    aten.selu.default,
    aten.gelu.default,
    aten.mish.default,
    aten.tanh.default,
    aten.softplus.default,
    aten.abs.default,
    aten.neg.default,
    aten.sqrt.default,
    aten.square.default,
    aten.exp.default,
    aten.log_softmax.int,
    aten.softmax.int,
    aten.div.Tensor,
    aten.sub.Tensor,
    aten.pow.Tensor_Scalar,
    aten._native_batch_norm_legit_no_training.default,
    aten.batch_norm.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_linear1d.vec,
    aten.upsample_bicubic2d.vec,
    aten.upsample_trilinear3d.vec,
}

_KINDS: dict[Any, Kind] = {
    aten.conv1d.default: Kind.CONVOLUTION,
    aten.conv2d.default: Kind.CONVOLUTION,
    aten.conv3d.default: Kind.CONVOLUTION,
    aten.conv1d.padding: Kind.CONVOLUTION,
    aten.conv2d.padding: Kind.CONVOLUTION,
    aten.conv3d.padding: Kind.CONVOLUTION,
    aten.conv_transpose1d.default: Kind.TRANSPOSED_CONVOLUTION,
    aten.conv_transpose2d.input: Kind.TRANSPOSED_CONVOLUTION,
    aten.conv_transpose3d.input: Kind.TRANSPOSED_CONVOLUTION,
    aten.linear.default: Kind.LINEAR,
    aten.matmul.default: Kind.MATMUL,
    aten.bmm.default: Kind.MATMUL,
    aten.mm.default: Kind.MATMUL,
    aten.embedding.default: Kind.EMBEDDING,
    aten.add.Tensor: Kind.ADD,
    aten.mul.Tensor: Kind.MUL,
    aten.cat.default: Kind.CONCAT,
    aten.avg_pool1d.default: Kind.AVERAGE_POOL,
    aten.avg_pool2d.default: Kind.AVERAGE_POOL,
    aten.avg_pool3d.default: Kind.AVERAGE_POOL,
    **dict.fromkeys(_CLIPS, Kind.CLIP),
    **dict.fromkeys(_MOVES, Kind.MOVE),
    **dict.fromkeys(_POINTWISE, Kind.POINTWISE),
}

# In the meta data of linears that multiply float activations by a quantized matrix.
WEIGHT_ONLY = "qdq_weight_only"

WEIGHTED = (Kind.CONVOLUTION, Kind.TRANSPOSED_CONVOLUTION, Kind.LINEAR)


def kind_of(node: fx.Node) -> Kind:
    """The kind of a node; `OTHER` for what is not known, for constants and for what does not compute floats."""
    if node.op != "call_function" or is_constant(node):
        return Kind.OTHER
    if node.target is operator.getitem:
        source = node.args[0]
        if isinstance(source, fx.Node) and source.target in SPLITS:
            return Kind.MOVE
        if isinstance(source, fx.Node) and source.target is aten._native_batch_norm_legit_no_training.default:
            return Kind.POINTWISE
        return Kind.OTHER
    kind = _KINDS.get(node.target, Kind.OTHER)
    if kind in (Kind.ADD, Kind.MUL):
        return _binary_kind(node, kind)
    if kind is Kind.POINTWISE and len(data_inputs(node)) != 1:
        return Kind.OTHER
    if node.target is aten.mean.dim:
        return _mean_kind(node)
    if node.target in (aten.constant_pad_nd.default, aten.pad.default):
        return _pad_kind(node)
    return kind


def _binary_kind(node: fx.Node, kind: Kind) -> Kind:
    if node.kwargs.get("alpha", 1) != 1:
        return Kind.OTHER
    operands = node.args[:2]
    if all(isinstance(a, fx.Node) and not is_constant(a) and is_float(a) for a in operands):
        return kind
    return Kind.POINTWISE


def _mean_kind(node: fx.Node) -> Kind:
    source, dims = node.args[0], node.args[1]
    rank = rank_of(source) if isinstance(source, fx.Node) else 0
    keep = len(node.args) > 2 and node.args[2] is True
    if not keep or not isinstance(dims, (list, tuple)) or not 3 <= rank <= 5 or node.kwargs.get("dtype") is not None:
        return Kind.OTHER
    return Kind.GLOBAL_AVERAGE if sorted(d % rank for d in dims) == list(range(2, rank)) else Kind.OTHER  # type: ignore[operator]


def _pad_kind(node: fx.Node) -> Kind:
    mode = node.args[2] if node.target is aten.pad.default and len(node.args) > 2 else "constant"
    position = 3 if node.target is aten.pad.default else 2
    value = node.args[position] if len(node.args) > position else 0
    # Zero is a code of every affine range, so padding with it only moves values; other constants may not be.
    return Kind.MOVE if mode != "constant" or value in (0, 0.0, None) else Kind.POINTWISE


def clip_bounds(node: fx.Node) -> tuple[float, float]:
    """The least and the largest value that a `CLIP` node lets through."""
    infinite = float("inf")
    if node.target is aten.relu.default:
        return 0.0, infinite
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    low, high = -infinite, infinite
    if node.target is aten.hardtanh.default:
        low, high = -1.0, 1.0
    arguments = list(node.args[1:3]) + [None] * (3 - len(node.args))
    given = [arguments[0] if arguments else None, arguments[1] if len(arguments) > 1 else None]
    names = ("min_val", "max_val") if node.target is aten.hardtanh.default else ("min", "max")
    for index, name in enumerate(names):
        value = node.kwargs.get(name, given[index])
        if isinstance(value, (int, float)):
            low, high = (float(value), high) if index == 0 else (low, float(value))
    return low, high


def is_constant(node: fx.Node) -> bool:
    """Whether a node depends on parameters, buffers and literals alone."""
    known = node.meta.get("qdq_constant")
    if known is not None:
        return known
    if node.op == "get_attr":
        result = True
    elif node.op != "call_function":
        result = False
    else:
        result = bool(node.all_input_nodes) and all(is_constant(n) for n in node.all_input_nodes)
    node.meta["qdq_constant"] = result
    return result


def value_of(node: fx.Node) -> Any:
    """The fake value that capture stored: shape and dtype of the node's tensor."""
    return node.meta.get("val")


def is_float(node: fx.Node) -> bool:
    """Whether the node is one float32 tensor."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def rank_of(node: fx.Node) -> int:
    """Number of dimensions of the node's tensor, 0 where it is none."""
    value = value_of(node)
    return value.dim() if isinstance(value, torch.Tensor) else 0


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The float tensors that a node computes from, without constants (weights, biases)."""
    return [n for n in node.all_input_nodes if not is_constant(n) and (is_float(n) or is_split(n))]


def is_split(node: fx.Node) -> bool:
    """Whether a node gives a list of parts of its input, which `getitem` nodes pick."""
    return node.target in SPLITS


def weight_position(node: fx.Node) -> tuple[int, int] | None:
    """Position of the constant weight among the arguments, and its output-channel axis; None without a weight."""
    kind = kind_of(node)
    if kind in (Kind.CONVOLUTION, Kind.LINEAR):
        position, axis = 1, 0
    elif kind is Kind.TRANSPOSED_CONVOLUTION:
        position, axis = 1, 1
    elif kind is Kind.MATMUL:
        position, axis = 1, -1
    elif kind is Kind.EMBEDDING:
        position, axis = 0, 0
    else:
        return None
    weight = node.args[position]
    if not isinstance(weight, fx.Node) or not is_constant(weight) or not is_float(weight):
        return None
    return position, axis % max(rank_of(weight), 1)


def bias_of(node: fx.Node) -> fx.Node | None:
    """The constant bias of a convolution or linear, if it has one."""
    if kind_of(node) not in WEIGHTED or len(node.args) < 3:
        return None
    bias = node.args[2]
    return bias if isinstance(bias, fx.Node) and is_constant(bias) else None


def groups_of(convolution: fx.Node) -> int:
    """The groups of a convolution's channels."""
    return convolution.args[6] if len(convolution.args) > 6 else convolution.kwargs.get("groups", 1)  # type: ignore[return-value]


def is_depthwise(node: fx.Node) -> bool:
    """Whether a convolution has one filter per channel."""
    if kind_of(node) is not Kind.CONVOLUTION or not isinstance(node.args[1], fx.Node):
        return False
    weight = value_of(node.args[1])
    return isinstance(weight, torch.Tensor) and weight.shape[1] == 1 and weight.shape[0] == groups_of(node)


def module_path(node: fx.Node) -> str:
    """Path of the user's module that the node came from ("" for the model itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [entry for entry in stack.values() if isinstance(entry, tuple) and not entry[0].startswith("_empty")]
    return str(entries[-1][0]) if entries else ""


def operation_name(node: fx.Node) -> str:
    """The name of the operation without its overload, as in "conv2d"."""
    if node.op == "placeholder":
        return "input"
    target = node.target
    name = getattr(target, "__name__", str(target))
    name = str(name).split(".")[0].strip("_")
    return "batch_norm" if "batch_norm" in name else name
