"""Placement costs: what the operations of a graph were measured to take in float and in integers, and what follows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from ..analysis.conversion_times import ConversionTimes
from ..analysis.operation_times import NodeTime
from ..export.marked_file import MarkedFile
from ..graph.ops import (
    Kind,
    data_inputs,
    is_constant,
    is_float,
    kind_of,
    module_path,
    operation_name,
    rank_of,
    value_of,
)
from ..graph.plan import Plan, names_of, tail
from ..recipe import matches
from .cheapest_placement import Cost, Crossing, cheapest_placement


@dataclasses.dataclass(frozen=True)
class OperationCost:
    """What an operation was measured to take, in microseconds; what fuses with it is counted where the runtime counts.

    Attributes:
        name: of the node in the captured graph.
        module: path of the user's module.
        operation: its kind, as in "conv2d".
        in_float, in_integers: microseconds; `in_integers` is infinite where it has no integer form.
        quantized: whether it is quantized in the placement that was chosen.
    """

    name: str
    module: str
    operation: str
    in_float: float
    in_integers: float
    quantized: bool


class PlacementCosts:
    """Costs of the operations of a graph, from profiles of its float and of its quantized file."""

    def __init__(
        self,
        graph: fx.Graph,
        plan: Plan,
        marked: MarkedFile,
        in_float: list[NodeTime],
        in_integers: list[NodeTime],
        conversions: ConversionTimes,
    ) -> None:
        self.plan, self.conversions = plan, conversions
        self.nodes = [n for n in graph.nodes if n.op == "call_function" and is_float(n) and not is_constant(n)]
        self.inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self.output = next(n for n in graph.nodes if n.op == "output")
        self.tails = {tail(n) for n in plan.operations}
        self.integer = {n.name for n in self.nodes if self._computes_codes(n)}
        self.in_float, ran_float, fused = _per_operation(marked, in_float)
        self.in_integers, ran_integers, _ = _per_operation(marked, in_integers)
        self.elements = _elements(marked, in_float)
        self.together = self._fused(ran_float, ran_integers, fused)

    def better_in_float(self, factor: float) -> list[fx.Node]:
        """The operations that are quantized and better were not, if conversions take `factor` times the estimate."""
        costs = {n.name: Cost(self._float(n), self._integers(n)) for n in self.nodes}
        for node in (*self.inputs, self.output):
            costs[node.name] = Cost(0.0, math.inf)
        known = [n for n in (*self.nodes, *self.inputs) if n.name in costs]
        crossings = [self._crossing(n, factor, costs) for n in known]
        chosen = cheapest_placement(costs, crossings, self.together)
        return [n for n in self.plan.operations if n.name not in chosen]

    def table(self, placed: Plan) -> tuple[OperationCost, ...]:
        """All operations that take time, in the order of the graph."""
        return tuple(
            OperationCost(
                n.name, module_path(n), operation_name(n), self._float(n), self._integers(n), n in placed.operations
            )
            for n in self.nodes
            if self._float(n) or self.in_integers.get(("operation", n.name), 0.0)
        )

    def _computes_codes(self, node: fx.Node) -> bool:
        """Whether an operation lies between quantizers: by its own rule, or because its neighbours have theirs."""
        plan, sources = self.plan, data_inputs(node)
        if node in plan.operations or node in self.tails:
            return True
        result = plan.tensors.keys() & {node, tail(node)}
        return bool(sources) and bool(result) and all(t in plan.tensors for t in sources)

    def _float(self, node: fx.Node) -> float:
        return self.in_float.get(("operation", node.name), 0.0)

    def _integers(self, node: fx.Node) -> float:
        """With conversions that the runtime did not fuse into an operation that is to compute codes."""
        if node.name not in self.integer:
            return math.inf
        own = self.in_integers.get(("operation", node.name), 0.0)
        return own + sum(self.in_integers.get((kind, node.name), 0.0) for kind in ("quantize", "dequantize"))

    def _crossing(self, node: fx.Node, factor: float, costs: Mapping[str, Cost]) -> Crossing:
        readers = [u.name for u in node.users if u.name in costs]
        elements, image = self.elements.get(node.name, 0) or _size(node), rank_of(node) == 4
        into, out_of = self.conversions.to_codes(elements, image), self.conversions.to_float(elements, image)
        if node in self.plan.operations and kind_of(node) in (Kind.LINEAR, Kind.MATMUL):
            out_of = 0.0  # the kernel gives floats as well as codes
        return Crossing(node.name, readers, factor * into, factor * out_of)

    def _fused(
        self, ran_float: set[str], ran_integers: set[str], fused: list[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        """Pairs that a runtime computes at once: `fused`, and what an operation is part of that did not run by itself.

        Fused in float, an operation is part of one that reads it; in integers a clip is part of the one before it.
        """
        pairs = list(fused)
        for node in self.nodes:
            if node.name not in ran_float:
                pairs += [(node.name, u.name) for u in node.users if u.op == "call_function" and is_float(u)]
            elif node.name not in ran_integers and node.name in self.integer and kind_of(node) is Kind.CLIP:
                pairs += [(node.name, n.name) for n in data_inputs(node) if n.op == "call_function"]
        # What has no integer form would take others with it that do have one.
        return [(a, b) for a, b in pairs if a in self.integer and b in self.integer]


def patterns_for(plan: Plan, excluded: Sequence[fx.Node]) -> list[str]:
    """Patterns that name these operations and no other quantized ones: modules where they do, else names of nodes."""
    chosen = set(excluded)
    others = [name for n in (*plan.operations, *plan.weighted) if n not in chosen for name in names_of(n)]
    patterns: dict[str, None] = {}
    for node in sorted(excluded, key=list(plan.operations).index):
        parts = module_path(node).split(".")
        paths = [".".join(parts[:i]) for i in range(1, len(parts) + 1) if parts[0]]
        usable = (p for p in paths if not set(p) & set("*?[") and not any(matches(p, name) for name in others))
        patterns[next(usable, node.name)] = None
    return list(patterns)


def _per_operation(
    marked: MarkedFile, times: list[NodeTime]
) -> tuple[dict[tuple[str, str], float], set[str], list[tuple[str, str]]]:
    """(part, operation) -> microseconds; the operations that a node is named after; pairs that one node computes."""
    total: dict[tuple[str, str], float] = {}
    ran: set[str] = set()
    fused: list[tuple[str, str]] = []
    for entry in times:
        own = [marked.operation_in(name) for name in (entry.name, *entry.outputs)]
        key = next((name for name in (*own, marked.operation_in(entry.source)) if name is not None), None)
        if key is not None:
            total[key] = total.get(key, 0.0) + entry.microseconds
        names = list(dict.fromkeys(name[1] for name in own if name is not None and name[0] == "operation"))
        ran.update(names)
        fused += [(names[0], other) for other in names[1:]]
    return total, ran, fused


def _elements(marked: MarkedFile, times: list[NodeTime]) -> dict[str, int]:
    """Elements of the results of operations, as they were with the inputs given."""
    out: dict[str, int] = {}
    for entry in times:
        key = marked.operation_in(entry.name)
        if key is not None and key[0] == "operation":
            out[key[1]] = entry.elements
    return out


def _size(node: fx.Node) -> int:
    """Elements of a tensor as captured; 1 for a dynamic dimension."""
    value = value_of(node)
    return math.prod(d if isinstance(d, int) else 1 for d in value.shape) if isinstance(value, Tensor) else 0
