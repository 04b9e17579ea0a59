"""Placement: which tensors of a graph are quantized, by which rule of the target, and which share a quantizer.

Placement is decided here and carried out in `insert`. A tensor is *demanded* when an integer operation reads it. It is
*integer* when it exists as codes alone, because the operation that computes it writes codes. Operations that
move values pass codes on. Rules are applied until nothing changes; each pass can only add, so that it ends.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection

from torch import fx

from ..errors import RecipeError
from ..recipe import Recipe, matches
from . import few_products
from .ops import (
    Kind,
    clip_bounds,
    data_inputs,
    is_float,
    is_split,
    kind_of,
    operation_name,
    value_of,
    weight_position,
)
from .plan import USUAL_BITS, Plan, block_size_of, names_of, tail
from .targets import Rule, Target
from .widths import set_widths

logger = logging.getLogger(__name__)


def place(graph: fx.Graph, target: Target, recipe: Recipe) -> Plan:
    """Decides the placement for a folded graph."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    attention = target.attention if recipe.attention is None else recipe.attention
    return _Placement(nodes, target, recipe, attention).run()


def check_patterns(graph: fx.Graph, recipe: Recipe, modules: Collection[str]) -> None:
    """Refuses patterns of a recipe that name nothing.

    Args:
        graph: folded.
        recipe: the patterns.
        modules: paths of all modules of the user's model: some compute nothing in the graph, such as a dropout in eval
            mode or a batch norm that was folded. A pattern of such modules alone changes nothing.

    Raises:
        RecipeError: it names the pattern, and modules of the model.
    """
    names = {name for node in graph.nodes for name in names_of(node)}
    names |= {str(n.target) for n in graph.nodes if n.op in ("get_attr", "placeholder")}
    nodes = {node.name for node in graph.nodes}
    for pattern in recipe.patterns():
        if pattern in nodes or any(matches(pattern, name) for name in names):
            continue
        if any(matches(pattern, module) for module in modules):
            logger.info(
                "recipe pattern %r matches modules that compute nothing in the graph, and changes nothing", pattern
            )
            continue
        known = sorted(n for n in names if not n.endswith((".weight", ".bias")))[:8]
        raise RecipeError(f"recipe pattern {pattern!r} matches no module of the model; modules are such as {known}")


_LOCAL = (
    Kind.POINTWISE,
    Kind.CLIP,
    Kind.MOVE,
    Kind.ADD,
    Kind.MUL,
    Kind.CONCAT,
    Kind.AVERAGE_POOL,
    Kind.GLOBAL_AVERAGE,
)


# Why an operation between quantizers computes in float.
WIDE = "it reads or gives codes of 16 bits, which no integer kernel takes"


def _bounds(tensor: fx.Node) -> tuple[float, float] | None:
    """The bounds of the clip that a tensor's values went through last, None without one.

    A runtime drops a clip that the quantizer behind it implies. A range shared with tensors that have other bounds
    would not imply it, and the operation before the clip would be computed in float.
    """
    while kind_of(tensor) is Kind.MOVE and tensor.all_input_nodes:
        tensor = tensor.all_input_nodes[0]
    return clip_bounds(tensor) if kind_of(tensor) is Kind.CLIP else None


class _Placement:
    def __init__(self, nodes: list[fx.Node], target: Target, recipe: Recipe, attention: bool) -> None:
        self.nodes = nodes
        self.target = target
        self.recipe = recipe
        self.plan = Plan()
        self.wanted: set[fx.Node] = set()
        self.near: dict[fx.Node, bool] = {}
        self.rules: dict[fx.Node, Rule] = {}
        # Quantized tensor -> how the first operation that asked for its quantizer uses it, and that operation.
        self.because: dict[fx.Node, tuple[str, fx.Node]] = {}
        for node in nodes:
            rule = self._rule_for(node, attention)
            if rule is not None:
                self.rules[node] = rule
        # What stays in float though the table has a row for it.
        self.held = few_products.held_in_float(nodes, self.rules, target, recipe)

    def run(self) -> Plan:
        held: set[fx.Node] | None = None
        while held != self.held:
            held = self.held
            self._settle()
            self.held = few_products.reading_no_codes(held, self.plan.integer, self.rules)
        self.plan.floats.update(dict.fromkeys(self.held, few_products.REASON))
        set_widths(self.plan, self.recipe)
        self._explain_wide()
        self._explain_floats()
        return self.plan

    def _settle(self) -> None:
        before = -1
        while before != (before := self._size()):
            self._find_wanted()
            self.near.clear()
            for node in self.nodes:
                if node not in self.held:
                    self._visit(node)

    def _size(self) -> int:
        plan = self.plan
        return len(plan.operations) + len(plan.tensors) + len(plan.integer) + len(plan.weighted)

    def _rule_for(self, node: fx.Node, attention: bool) -> Rule | None:
        kind = kind_of(node)
        rule = self.target.rule(kind)
        if rule is None or not (is_float(node) or is_split(node)):
            return None
        if not self.recipe.for_name(*names_of(node), node=node.name).quantize:
            self.plan.floats[node] = "the recipe keeps it in float"
            return None
        where = weight_position(node)
        weighted = where is not None
        if where is not None and not value_of(node.args[where[0]]).numel():  # type: ignore[arg-type]
            self.plan.floats[node] = "its weight holds no values"
            return None
        if kind is Kind.MATMUL and not weighted and not attention:
            self.plan.floats[node] = "product of two activations: in float unless the recipe sets attention=True"
            return None
        if kind in (Kind.CONVOLUTION, Kind.TRANSPOSED_CONVOLUTION, Kind.LINEAR, Kind.EMBEDDING) and not weighted:
            self.plan.floats[node] = "its weight is computed from data"
            return None
        return self._weight_only(node, rule) if weighted else self._with_activations(node, rule)

    def _with_activations(self, node: fx.Node, rule: Rule) -> Rule | None:
        if self.recipe.activations_for(*names_of(node), node=node.name) is None:
            self.plan.floats[node] = "the recipe keeps activations in float"
            return None
        return rule

    def _weight_only(self, node: fx.Node, rule: Rule) -> Rule:
        """The rule, or one of role "weight" where the operation's activations stay in float."""
        weights = self.recipe.weights_for(*names_of(node), node=node.name)
        block = block_size_of(node, weights)
        if self.recipe.activations_for(*names_of(node), node=node.name) is None:
            why = "the recipe keeps activations in float"
        elif block is not None:
            why = "no integer kernel takes step sizes per block"
        else:
            return rule
        if rule.role != "weight":
            self.plan.floats[node] = f"computed in float from a quantized weight: {why}"
        note = f"{weights.num_bits} bits" + (f", blocks of {block}" if block else "") + f", weight only: {why}"
        rounded = block or self.target.rounds_inputs
        if kind_of(node) in (Kind.LINEAR, Kind.MATMUL) and self.target.rounds_inputs is not None:
            note += f"; {self.target.name} rounds what it reads to int8, in blocks of {rounded}"
        return dataclasses.replace(rule, role="weight", output=False, shared=False, note=note)

    def _find_wanted(self) -> None:
        """Tensors that are demanded, themselves or behind operations that move their values."""
        self.wanted = set()
        for node in reversed(self.nodes):
            for reader in node.users:
                demanded = reader in self.plan.operations and node in self.plan.operations[reader]
                if demanded or (kind_of(reader) in (Kind.MOVE, Kind.CLIP) and reader in self.wanted):
                    self.wanted.add(node)

    def _visit(self, node: fx.Node) -> None:
        rule = self.rules.get(node)
        kind = kind_of(node)
        if rule is None:
            if kind is Kind.MOVE:
                self._move(node)
            return
        if rule.role == "weight" or weight_position(node) is not None:
            self.plan.weighted.setdefault(node, rule.note)
        if rule.role == "compute" or (rule.role == "follow" and self._follows(node)):
            self._quantize(node, rule, self._operands(node))

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        inputs = [n for n in data_inputs(node) if is_float(n)]
        if kind_of(node) is Kind.ADD and self.target.skip_only and len(inputs) == 2:
            fused = [
                n for n in inputs if n in self.plan.operations and len(n.users) == 1 and n not in self.plan.tensors
            ]
            return [n for n in inputs if n is not fused[0]] if fused else inputs
        return inputs

    def _follows(self, node: fx.Node) -> bool:
        inputs = data_inputs(node)
        if kind_of(node) is Kind.CONCAT and len(inputs) != len(node.all_input_nodes):
            return False
        if not inputs:
            return False
        if all(n in self.plan.integer for n in inputs):
            return True
        return tail(node) in self.wanted and any(n in self.plan.tensors or self._near(n) for n in inputs)

    def _near(self, node: fx.Node) -> bool:
        """Whether a tensor comes from quantized convolutions alone, through operations that keep to single values."""
        known = self.near.get(node)
        if known is None:
            self.near[node] = False  # graphs have no circles, but a repeated question must not recurse
            known = self.near[node] = self._is_near(node)
        return known

    def _is_near(self, node: fx.Node) -> bool:
        kind = kind_of(node)
        if node in self.plan.integer or (kind is Kind.CONVOLUTION and node in self.plan.operations):
            return True
        inputs = data_inputs(node)
        return kind in _LOCAL and bool(inputs) and all(self._near(n) for n in inputs)

    def _quantize(self, node: fx.Node, rule: Rule, operands: list[fx.Node]) -> None:
        self.plan.operations[node] = operands
        for operand in operands:
            self._use(operand, "read", node, rule.note)
        result = tail(node)
        if rule.output or rule.role == "follow":
            self._use(result, "written", node, rule.note)
        if rule.output or (rule.role == "follow" and not self.target.skip_only):
            self.plan.integer.add(result)
        if rule.shared:
            bounds = {operand: _bounds(operand) for operand in operands}
            alike = len(set(bounds.values())) == 1
            for operand in operands:
                if alike or bounds[operand] is None:
                    self._join(operand, result)

    def _use(self, tensor: fx.Node, how: str, node: fx.Node, note: str) -> None:
        if tensor not in self.plan.tensors:
            self.plan.tensors[tensor] = f"{how} by {operation_name(node)} ({note})"
            self.because[tensor] = how, node

    def _move(self, node: fx.Node) -> None:
        source = node.all_input_nodes[0]
        if source not in self.plan.integer:
            return
        self.plan.integer.add(node)
        if is_split(node):
            self.plan.group[node] = self.plan.root(source)
            return
        self.plan.tensors.setdefault(node, f"{operation_name(node)} moves the values of a quantized tensor")
        self._join(node, source)

    def _join(self, node: fx.Node, other: fx.Node) -> None:
        first, second = self.plan.root(node), self.plan.root(other)
        if first is not second:
            self.plan.group[first] = second

    def _explain_wide(self) -> None:
        """Says of operations that compute in float for their width that they do, and names the width of tensors."""
        plan = self.plan
        for tensor, (how, node) in self.because.items():
            if node in plan.wide:
                plan.tensors[tensor] = f"{how} by {operation_name(node)} (computed in float: {WIDE})"
        for tensor in plan.tensors:
            if plan.bits_of(tensor) > USUAL_BITS:
                plan.tensors[tensor] += f"; {plan.bits_of(tensor)} bits"
        for node in plan.wide & plan.weighted.keys():
            plan.weighted[node] = f"computed in float from a quantized weight: {WIDE}"

    def _explain_floats(self) -> None:
        for node in self.nodes:
            if node in self.plan.tensors or node in self.plan.floats or not is_float(node):
                continue
            result = tail(node)
            kind = kind_of(node)
            if result is not node and result in self.plan.tensors:
                reason = f"quantized behind {operation_name(result)}, which the runtime fuses with it"
            elif node in self.plan.wide:
                reason = f"result of a {kind.value} in float that nothing reads as codes"
            elif node in self.plan.operations:
                reason = f"result of an integer {kind.value} that nothing reads as codes"
            elif kind is Kind.OTHER:
                reason = f"{self.target.name} has no rule for {operation_name(node)}: it stays in float"
            elif self.target.rule(kind) is not None and kind in self.target_follow():
                reason = f"{kind.value} in float: no integer operation reads it, and not all it reads are codes alone"
            else:
                reason = f"{kind.value} operation, and no integer operation reads it"
            self.plan.floats[node] = reason

    def target_follow(self) -> set[Kind]:
        return {r.kind for r in self.target.rules if r.role == "follow"}
