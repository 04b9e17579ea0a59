"""Running a graph anew from some nodes on: what does not depend on them is taken from an earlier run."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..graph.parameters import tensor_at

Values = dict[fx.Node, Any]


class PartialRun:
    """Runs a graph module node by node, wholly or in part, with its modules as they are at the time of the run.

    Args:
        graph_module: its nodes must not write to their inputs (those of `qdq.quantize` do not).
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.nodes = list(graph_module.graph.nodes)
        self.results = [leaf for leaf in pytree.tree_leaves(self.nodes[-1].args) if isinstance(leaf, fx.Node)]
        self._needed = _ancestors(self.results)
        self._plans: dict[frozenset[fx.Node], list[tuple[fx.Node, list[fx.Node]]]] = {}

    @torch.no_grad()
    def whole(self, inputs: Sequence[Any]) -> Values:
        """The values of all nodes.

        Args:
            inputs: of the placeholders, in their order.
        """
        values: Values = {}
        given = iter(inputs)
        for node in self.nodes[:-1]:
            values[node] = next(given) if node.op == "placeholder" else self._compute(node, values)
        return values

    def outputs(self, values: Values) -> list[Any]:
        """The outputs of the graph among the values of a run, flat."""
        return [values[node] for node in self.results]

    @torch.no_grad()
    def after(self, values: Values, changed: Collection[fx.Node]) -> list[Any]:
        """The outputs of the graph with some nodes, and all that depends on them, computed anew.

        Args:
            values: of all nodes, from `whole`; they stay as they are.
            changed: the nodes whose modules have changed since.
        """
        new: Values = {}
        either = ChainMap(new, values)
        for node, dead in self._plan(frozenset(changed)):
            new[node] = self._compute(node, either)
            for old in dead:
                del new[old]
        return [either[node] for node in self.results]

    def _plan(self, changed: frozenset[fx.Node]) -> list[tuple[fx.Node, list[fx.Node]]]:
        """The nodes to compute, each with those whose values nothing needs after it."""
        plan = self._plans.get(changed)
        if plan is not None:
            return plan
        affected: dict[fx.Node, None] = {}
        for node in self.nodes[:-1]:
            if node in self._needed and (node in changed or any(n in affected for n in node.all_input_nodes)):
                affected[node] = None
        last = {source: node for node in affected for source in node.all_input_nodes if source in affected}
        dead: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            if source not in self.results:
                dead.setdefault(node, []).append(source)
        plan = self._plans[changed] = [(node, dead.get(node, [])) for node in affected]
        return plan

    def _compute(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return tensor_at(self.graph_module, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        if node.op == "call_module":
            return self.graph_module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found
