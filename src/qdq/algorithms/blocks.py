"""The blocks of a graph: the regions between points where everything computed so far is in a single tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ..constant_quantizers import BiasQuantizer, WeightQuantizer
from .layer import Layer


@dataclass(frozen=True)
class Block:
    """A region of a graph. A residual block is one, and so is a layer outside of any.

    Attributes:
        nodes: what it computes, in the order of the graph; constants are not among them.
        layers: those within it, in the same order.
        output: the one of its nodes that others read.
    """

    nodes: tuple[fx.Node, ...]
    layers: Mapping[fx.Node, Layer]
    output: fx.Node


def is_constant(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node gives a parameter or buffer, or what a quantizer makes of one."""
    if node.op != "call_module":
        return node.op == "get_attr"
    return isinstance(graph_module.get_submodule(str(node.target)), (WeightQuantizer, BiasQuantizer))


def blocks_of(graph_module: fx.GraphModule, layers: Mapping[fx.Node, Layer]) -> tuple[list[fx.Node], list[Block]]:
    """The nodes that no layer comes before, and the blocks, in the order of the graph.

    A block ends where only one of the values that depend on a layer is still to be read; other values, like the mask
    that all blocks of a transformer read, do not count. What follows without a layer (an activation function, a
    quantizer) belongs to the block before it. What the graph gives as outputs is still to be read until its end.

    Args:
        graph_module: quantized.
        layers: its layers, by their nodes.
    """
    nodes = [n for n in graph_module.graph.nodes if n.op != "output" and not is_constant(graph_module, n)]
    known = set(nodes)
    dependent: set[fx.Node] = set()
    for node in nodes:
        if node in layers or any(source in dependent for source in node.all_input_nodes):
            dependent.add(node)
    walked = [n for n in nodes if n in dependent]
    blocks: list[Block] = []
    region: list[fx.Node] = []
    for node, ends in zip(walked, _ends(walked), strict=True):
        region.append(node)
        if not ends:
            continue
        own = {n: layers[n] for n in region if n in layers}
        if own or not blocks:
            blocks.append(Block(tuple(region), own, node))
        else:
            last = blocks.pop()
            blocks.append(Block((*last.nodes, *region), last.layers, node))
        region = []
    return [n for n in nodes if n in known - dependent], blocks


def _ends(nodes: Sequence[fx.Node]) -> list[bool]:
    """Of each node, whether behind it nothing but its own value is still to be read; of the last one it is so."""
    order = {node: i for i, node in enumerate(nodes)}
    last = [max((_reading(user, order) for user in node.users), default=i) for i, node in enumerate(nodes)]
    ends, reach = [], -1
    for index in range(len(nodes)):
        ends.append(reach <= index or index == len(nodes) - 1)
        reach = max(reach, last[index])
    return ends


def _reading(user: fx.Node, order: Mapping[fx.Node, int]) -> int:
    """When a user reads: the end of the graph reads last."""
    return order.get(user, len(order))


def inputs_of(nodes: Collection[fx.Node], known: Collection[fx.Node]) -> list[fx.Node]:
    """Of the known nodes, those that the given ones read."""
    read = {source for node in nodes for source in node.all_input_nodes}
    return [node for node in known if node in read]
