"""Record: what a graph module knows of its own making, and the door that inputs pass."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..batches import Inputs
from ..errors import DataError, QdqError
from ..recipe import Recipe
from .explanation import Explanation
from .targets import Target

KEY = "qdq"


class InputContract:
    """The shapes and dtypes that a captured graph takes: its door.

    Args:
        graph: captured; its placeholders hold the fake inputs of capture.
        signature: of the user's `forward`.
        example: the inputs it was captured with.
    """

    def __init__(self, graph: fx.Graph, signature: inspect.Signature, example: Inputs) -> None:
        self.signature = signature
        self._structure = pytree.tree_structure(example)
        self._given = f"{len(example[0])} positional, keywords {sorted(example[1])}"
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.names = [str(n.target) for n in placeholders]
        # Of a tensor its dtype and, per dimension, the sizes that the graph holds for; of anything else the value.
        self._expected: list[tuple[torch.dtype, tuple[_Sizes, ...]] | None] = []
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in pytree.tree_leaves(example)]
        for node in placeholders:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                self._expected.append((value.dtype, tuple(_Sizes.of(d) for d in value.shape)))
            else:
                self._expected.append(None)

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """The inputs in the one spelling that the captured graph knows: positional where the signature allows it.

        Raises:
            DataError: other arguments than at capture, a tensor of the wrong shape or dtype, or NaN.
        """
        bound = self.signature.bind(*args, **kwargs)
        args, kwargs = bound.args, bound.kwargs
        if pytree.tree_structure((args, kwargs)) != self._structure:
            raise DataError(
                f"a batch gives other arguments than the example inputs did: ({len(args)} positional, "
                f"keywords {sorted(kwargs)}) in place of ({self._given}), or others inside them; every batch must "
                "give the same ones"
            )
        leaves = pytree.tree_leaves((args, kwargs))
        for name, leaf, expected, constant in zip(self.names, leaves, self._expected, self._constants, strict=False):
            if expected is None or not isinstance(leaf, Tensor):
                _check_constant(name, leaf, constant, expected is not None)
                continue
            dtype, shape = expected
            if len(shape) != leaf.dim() or any(not d.hold(s) for d, s in zip(shape, leaf.shape, strict=True)):
                wanted = "[" + ", ".join(map(str, shape)) + "]"
                raise DataError(f"input {name!r} has shape {list(leaf.shape)}, the model was captured for {wanted}")
            if leaf.dtype != dtype:
                raise DataError(f"input {name!r} has dtype {leaf.dtype}, the model was captured for {dtype}")
            if leaf.dim() and leaf.shape[0] == 0:
                raise DataError(f"input {name!r} holds an empty batch, of shape {list(leaf.shape)}")
            # An infinite value is legal here (an attention mask); where it meets a quantizer, that one refuses it.
            if leaf.is_floating_point() and torch.isnan(leaf).any():
                raise DataError(f"input {name!r} holds NaN: clean the data first")
        return args, kwargs

    def flatten(self, inputs: Inputs) -> list[Any]:
        """The inputs one by one, in the order of the graph's placeholders and of the exported file's inputs."""
        return pytree.tree_leaves(inputs)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """The sizes of one dimension that a captured graph holds for; outside, the model would have branched."""

    low: int
    high: int | None

    @classmethod
    def of(cls, size: int | torch.SymInt) -> _Sizes:
        if isinstance(size, int):
            return cls(size, size)
        bounds = size.node.shape_env.bound_sympy(size.node.expr)
        low = int(bounds.lower)
        # torch.export takes every dynamic dimension to be 2 at least; the graphs run with 1 as well.
        return cls(low if low > 2 else 1, int(bounds.upper) if bounds.upper.is_Integer else None)

    def hold(self, size: int) -> bool:
        # An empty dimension 0 has a message of its own.
        return (self.low <= size or (size == 0 and self.low == 1)) and (self.high is None or size <= self.high)

    def __str__(self) -> str:
        if self.low == self.high:
            return str(self.low)
        if self.high is not None:
            return f"{self.low} to {self.high}"
        return "any" if self.low == 1 else f"{self.low} or more"


def _check_constant(name: str, value: Any, captured: Any, tensor: bool) -> None:
    if tensor or isinstance(value, Tensor) or value != captured:
        wanted = "a tensor" if tensor else repr(captured)
        given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise DataError(
            f"input {name!r} is {given}, the model was captured with {wanted}: values that are no tensors are fixed in "
            "the graph; quantize the model once for each"
        )


@dataclasses.dataclass(frozen=True)
class Record:
    """Stored in `graph_module.meta` by `qdq.quantize`.

    Attributes:
        contract: the inputs that the graph takes.
        target, recipe: what it was quantized for, and how; None in a float graph.
        reduced_range: whether integer operations have 7-bit weights.
        explanation: of every tensor.
        outputs: for every output of the model, the path of its quantizer, None where it is float.
        output_names: of the exported file.
    """

    contract: InputContract
    output_names: tuple[str, ...]
    target: Target | None = None
    recipe: Recipe | None = None
    reduced_range: bool = False
    explanation: Explanation | None = None
    outputs: tuple[str | None, ...] = ()


def record_of(graph_module: nn.Module) -> Record:
    """The record of a graph module.

    Raises:
        QdqError: the module was not made by `qdq.quantize`.
    """
    record = getattr(graph_module, "meta", {}).get(KEY)
    if not isinstance(record, Record):
        raise QdqError(
            f"expected a model that qdq.quantize returned, not a {type(graph_module).__name__}: quantize it first"
        )
    return record
