"""First convolutions between operations in float, which gain no time from integers and therefore stay in float.

An integer convolution in the target costs a quantizer before it, one behind it and a DequantizeLinear where its result
is read in float. A convolution of an image's few channels multiplies too little to pay for them, and its two quantizers
cost accuracy at the very start of a network. `benchmarks/first_convolution.py` measures both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, fx

from ..recipe import Recipe
from .ops import Kind, data_inputs, groups_of, is_float, kind_of, value_of, weight_position
from .plan import names_of_tensor, tail
from .targets import Rule, Target

# Why an operation that could be computed in integers is not.
REASON = "few products a value between operations in float: integers gain no time (an override quantizes it)"


def held_in_float(
    nodes: Iterable[fx.Node], rules: Mapping[fx.Node, Rule], target: Target, recipe: Recipe
) -> set[fx.Node]:
    """The convolutions of a graph that would alone ask for codes, multiply little, and are read in float.

    Args:
        nodes: the operations of a folded graph.
        rules: the row of the target's table of each operation that the recipe lets be quantized.
        target: says how little is little (`Rule.few_products`).
        recipe: an override of the weights or activations of such a convolution, or of the tensor that it reads,
            quantizes it.
    """
    # A model of such operations alone would not be quantized at all, whatever else the recipe keeps in float.
    if not any(_computes_in_integers(node, target) and not _multiplies_little(node, target) for node in nodes):
        return set()
    held = {
        node
        for node, rule in rules.items()
        if rule.role == "compute"
        and _multiplies_little(node, target)
        and not _is_asked_for(node, recipe)
        and _is_read_in_float(node, rules)
    }
    return _whole(held, rules)


def reading_no_codes(held: set[fx.Node], integer: set[fx.Node], rules: Mapping[fx.Node, Rule]) -> set[fx.Node]:
    """Those of the held convolutions whose inputs are not codes alone: the others would have to decode them."""
    return _whole({node for node in held if not integer.intersection(data_inputs(node))}, rules)


def _computes_in_integers(node: fx.Node, target: Target) -> bool:
    rule = target.rule(kind_of(node))
    return rule is not None and rule.role == "compute" and is_float(node)


def _multiplies_little(node: fx.Node, target: Target) -> bool:
    rule, where = target.rule(kind_of(node)), weight_position(node)
    few = rule.few_products if rule is not None else None
    if few is None or where is None or groups_of(node) != 1:
        return False
    weight: Tensor = value_of(node.args[where[0]])  # type: ignore[arg-type]
    return weight.dim() == 4 and weight.shape[1] <= few.channels and weight.shape[1:].numel() <= few.products


def _is_asked_for(node: fx.Node, recipe: Recipe) -> bool:
    asked = [recipe.for_name(*names_of_tensor(n), node=n.name) for n in (node, tail(node), *data_inputs(node))]
    return any(override.weights is not None or override.activations is not None for override in asked)


def _is_read_in_float(tensor: fx.Node, rules: Mapping[fx.Node, Rule]) -> bool:
    """Whether nothing reads codes of a tensor, but for its product with an operation on it (a SiLU)."""
    for reader in tensor.users:
        rule = rules.get(reader)
        if kind_of(reader) in (Kind.MOVE, Kind.CLIP):
            if not _is_read_in_float(reader, rules):
                return False
        elif reader.op == "output" or (rule is not None and rule.role != "weight"):
            gates = kind_of(reader) is Kind.MUL and any(n in tensor.users for n in reader.all_input_nodes)
            if not gates:
                return False
    return True


def _whole(held: set[fx.Node], rules: Mapping[fx.Node, Rule]) -> set[fx.Node]:
    """Those of which every call of the same weight is among them: a weight has codes or has none."""
    shared = {_weight(node) for node in rules if node not in held}
    return {node for node in held if _weight(node) not in shared}


def _weight(node: fx.Node) -> object:
    where = weight_position(node)
    return None if where is None else getattr(node.args[where[0]], "target", None)
