"""Explanation: for every tensor of a graph, whether it is quantized, by which rule, with whom, and why not if not."""

from __future__ import annotations

import dataclasses
from collections import Counter

from torch import fx

from ..recipe import Recipe
from .ops import Kind, is_float, kind_of, module_path, operation_name, weight_position
from .plan import Plan


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor.

    Attributes:
        tensor: name of the tensor: of a parameter, an input, or a node of the graph.
        role: "activation", "weight" or "bias".
        operation: what computes it (of a parameter: what reads it).
        module: path of the module that this happens in.
        quantized: whether it is.
        quantizer: path of its quantizer, None in float.
        reason: the rule that decided.
        readers: the operations that read it as codes.
        shared_with: the other tensors on the same quantizer.
    """

    tensor: str
    role: str
    operation: str
    module: str
    quantized: bool
    quantizer: str | None
    reason: str
    readers: tuple[str, ...] = ()
    shared_with: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Explanation:
    """All tensors of a quantized model; printing it gives a table and a summary.

    Attributes:
        target: name of the target.
        entries: in the order of the graph.
        recipe: what the model was quantized by; with `tune` the recipe that resulted.
    """

    target: str
    entries: tuple[Entry, ...]
    recipe: Recipe

    def __iter__(self):
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def find(self, name: str) -> Entry:
        """The entry of a tensor, by its name or its module's path.

        Raises:
            KeyError: no tensor bears the name.
        """
        for entry in self.entries:
            if name in (entry.tensor, entry.quantizer):
                return entry
        for entry in self.entries:
            if entry.role == "activation" and entry.module == name:
                return entry
        raise KeyError(f"no tensor or module {name!r}")

    def summary(self) -> str:
        """How many tensors of each role are quantized, and the reasons of the rest."""
        lines = []
        for role, plural in (("activation", "activations"), ("weight", "weights"), ("bias", "biases")):
            entries = [e for e in self.entries if e.role == role]
            if entries:
                done = sum(e.quantized for e in entries)
                lines.append(f"{plural}: {done} of {len(entries)} quantized")
        reasons = Counter(e.reason for e in self.entries if not e.quantized)
        lines += [f"  {count} in float: {reason}" for reason, count in reasons.most_common()]
        return "\n".join(lines)

    def __str__(self) -> str:
        rows = [("tensor", "module", "quantized", "why")]
        for e in self.entries:
            why = e.reason
            if e.shared_with:
                why += f"; one quantizer with {', '.join(e.shared_with[:3])}" + (
                    " ..." if len(e.shared_with) > 3 else ""
                )
            rows.append((e.tensor, e.module, e.quantizer or "-", why))
        widths = [max(len(r[i]) for r in rows) for i in range(3)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[3]]) for r in rows]
        return "\n".join([f"target {self.target}", *lines, "", self.summary()])


def explain_plan(
    graph: fx.Graph,
    plan: Plan,
    target: str,
    recipe: Recipe,
    quantizers: dict[fx.Node, str],
    weights: dict[fx.Node, str | None],
) -> Explanation:
    """The explanation of a placement.

    Args:
        graph: before quantizers are inserted.
        plan: the placement.
        target: name of the target.
        recipe: what the placement was made by.
        quantizers: quantized tensor -> path of its quantizer.
        weights: `get_attr` node of a weight or bias -> path of its quantizer, None in float.
    """
    entries = []
    by_quantizer: dict[str, list[str]] = {}
    for tensor, name in quantizers.items():
        by_quantizer.setdefault(name, []).append(tensor.name)
    for node in graph.nodes:
        if node.op == "get_attr" and is_float(node) and node.users:
            entries.append(_parameter(node, plan, weights))
        elif node.op in ("placeholder", "call_function") and is_float(node) and not _constant(node):
            entries.append(_activation(node, plan, quantizers, by_quantizer))
    return Explanation(target, tuple(entries), recipe)


def _constant(node: fx.Node) -> bool:
    return bool(node.meta.get("qdq_constant"))


def _activation(node: fx.Node, plan: Plan, quantizers: dict[fx.Node, str], by_quantizer: dict[str, list[str]]) -> Entry:
    name = quantizers.get(node)
    if name is not None:
        reason = plan.tensors[node]
        shared = tuple(t for t in by_quantizer[name] if t != node.name)
    else:
        reason, shared = plan.floats.get(node, "no integer operation reads it"), ()
    readers = tuple(u.name for u in node.users if node in plan.operations.get(u, []))
    return Entry(
        node.name,
        "activation",
        operation_name(node),
        module_path(node),
        name is not None,
        name,
        reason,
        readers,
        shared,
    )


def _parameter(node: fx.Node, plan: Plan, weights: dict[fx.Node, str | None]) -> Entry:
    reader = next(iter(node.users))
    name = weights.get(node)
    where = weight_position(reader)
    is_weight = where is not None and reader.args[where[0]] is node
    role = "weight" if is_weight else "bias" if node.name.endswith("bias") else "parameter"
    if name is not None:
        reason = (
            plan.weighted.get(reader, "int32 of step input step x weight step")
            if is_weight
            else ("int32, of step input step x weight step")
        )
    elif reader in plan.floats and kind_of(reader) is not Kind.OTHER and reader not in plan.operations:
        reason = f"{operation_name(reader)}: {plan.floats[reader]}"
    elif role == "bias" and reader in plan.wide:
        reason = "added in float"
    elif role == "bias" and reader in plan.operations:
        reason = "added in float after the integer product"
    else:
        reason = f"a parameter of {operation_name(reader)}, which computes in float"
    return Entry(str(node.target), role, operation_name(reader), module_path(reader), name is not None, name, reason)
