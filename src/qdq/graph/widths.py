"""Widths: how many bits the codes of each quantized tensor have, and which operations compute in float for that.

No runtime here has integer kernels for codes of 16 bits. An operation that reads or gives such a tensor keeps its
quantizers, and computes in float between DequantizeLinear and QuantizeLinear.
"""

from __future__ import annotations

from torch import fx

from ..descriptor import QuantDescriptor
from ..recipe import Recipe
from .ops import Kind, kind_of, rank_of
from .plan import USUAL_BITS, Plan, names_of_tensor, tail


def set_widths(plan: Plan, recipe: Recipe) -> None:
    """Sets `Plan.bits` and `Plan.wide` of a finished placement, in place.

    What a recipe says of an operation holds for the tensors that it reads as codes and for the one that it gives. What
    it says of a pattern that matches an input, or an operation that moves values or computes in float, holds for its
    result. Tensors on one quantizer have one width; where several are asked for, it is the widest.
    """
    for tensor in plan.tensors:
        _widen(plan, tensor, recipe.for_name(*names_of_tensor(tensor), node=tensor.name).activations)
    for node, operands in plan.operations.items():
        asked = recipe.activations_for(*names_of_tensor(node), node=node.name)
        for tensor in (*operands, tail(node)):
            if tensor in plan.tensors:
                _widen(plan, tensor, asked)
    for node, operands in plan.operations.items():
        # A matrix product that reads 8 bits is an integer one whatever its result becomes: the kernel gives floats.
        around = operands if _is_product(node) else (*operands, tail(node))
        if any(plan.bits_of(tensor) > USUAL_BITS for tensor in around if tensor in plan.tensors):
            plan.wide.add(node)


def _widen(plan: Plan, tensor: fx.Node, asked: QuantDescriptor | str | None) -> None:
    if isinstance(asked, QuantDescriptor) and isinstance(asked.num_bits, int):
        root = plan.root(tensor)
        plan.bits[root] = max(asked.num_bits, plan.bits.get(root, 0))


def _is_product(node: fx.Node) -> bool:
    """Whether an operation is a MatMul in ONNX: a linear of two dimensions is a Gemm, whose kernel gives codes."""
    return kind_of(node) is Kind.MATMUL or (kind_of(node) is Kind.LINEAR and rank_of(node) != 2)
