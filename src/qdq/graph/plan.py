"""Plan: what placement decides about a graph, and the names by which recipes speak of its operations."""

from __future__ import annotations

import dataclasses

from torch import fx

from ..descriptor import QuantDescriptor
from .ops import Kind, kind_of, module_path, rank_of, weight_position

# Codes of this width are what runtimes have integer kernels for.
USUAL_BITS = 8


@dataclasses.dataclass
class Plan:
    """The placement of quantizers on a graph.

    Attributes:
        operations: quantized operation -> the tensors that it reads as codes.
        weighted: operations whose weight is quantized.
        tensors: quantized tensor -> why.
        integer: tensors that exist as codes alone: every reader gets the quantized value.
        group: quantized tensor -> the tensor whose quantizer it uses (itself, where it has its own).
        floats: operation or tensor left in float -> why.
        bits: quantized tensor that has its own quantizer -> width of its codes.
        wide: those of `operations` that compute in float: no integer kernel takes codes of this width.
    """

    operations: dict[fx.Node, list[fx.Node]] = dataclasses.field(default_factory=dict)
    weighted: dict[fx.Node, str] = dataclasses.field(default_factory=dict)
    tensors: dict[fx.Node, str] = dataclasses.field(default_factory=dict)
    integer: set[fx.Node] = dataclasses.field(default_factory=set)
    group: dict[fx.Node, fx.Node] = dataclasses.field(default_factory=dict)
    floats: dict[fx.Node, str] = dataclasses.field(default_factory=dict)
    bits: dict[fx.Node, int] = dataclasses.field(default_factory=dict)
    wide: set[fx.Node] = dataclasses.field(default_factory=set)

    def root(self, node: fx.Node) -> fx.Node:
        """The tensor whose quantizer `node` uses."""
        while self.group.get(node, node) is not node:
            node = self.group[node]
        return node

    def bits_of(self, node: fx.Node) -> int:
        """The width of a quantized tensor's codes."""
        return self.bits.get(self.root(node), USUAL_BITS)


def names_of(node: fx.Node) -> tuple[str, ...]:
    """The names by which a pattern may speak of an operation: its module and its parameters."""
    parameters = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    path = module_path(node)
    return (*([path] if path else []), *parameters)


def names_of_tensor(node: fx.Node) -> tuple[str, ...]:
    """The names by which a pattern may speak of a tensor: those of its operation, or an input's own."""
    return (str(node.target),) if node.op == "placeholder" else names_of(node)


def block_size_of(node: fx.Node, descriptor: QuantDescriptor) -> int | None:
    """The block size of an operation's weight: linears, and matrix products with a constant matrix, have blocks."""
    where = weight_position(node)
    if where is None or kind_of(node) not in (Kind.LINEAR, Kind.MATMUL):
        return None
    return descriptor.block_size if rank_of(node.args[where[0]]) == 2 else None  # type: ignore[arg-type]


def tail(node: fx.Node) -> fx.Node:
    """The tensor that stands for a node's result: behind a clip that is the only reader of it, else the node itself.

    A runtime fuses the clip into the operation before it, so the quantizer sits behind both.
    """
    while len(node.users) == 1:
        reader = next(iter(node.users))
        if kind_of(reader) is not Kind.CLIP or reader.all_input_nodes[0] is not node:
            break
        node = reader
    return node
