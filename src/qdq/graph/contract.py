"""InputContract: the door of a captured graph, which says what inputs it takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..batches import Inputs, describe
from ..errors import DataError, QdqError
from ..modes import out_of_inference
from .capture import RANGES


class _Expected(NamedTuple):
    """A tensor input: its dtype, its sizes (None where dynamic), and what sizes a dynamic dimension may have.

    `batch` names the size of dimension 0 where any number is to do; inputs of one name must have equal sizes.
    """

    dtype: torch.dtype
    shape: tuple[int | None, ...]
    ranges: dict[int, tuple[int, int | None]]
    batch: str | None


class InputContract:
    """The shapes, dtypes and fixed values that a captured graph takes.

    Args:
        graph: captured; its placeholders hold the fake inputs of capture.
        signature: of the user's `forward`.
        example: the inputs it was captured with.
    """

    def __init__(self, graph: fx.Graph, signature: inspect.Signature, example: Inputs) -> None:
        self.signature = signature
        self._structure = pytree.tree_structure(example)
        self._told = describe_call(example)
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.names = [str(n.target) for n in placeholders]
        # What is no tensor is part of the graph: its value is kept, to be compared with that of each batch.
        self._expected: list[Any] = list(pytree.tree_leaves(example))
        for index, node in enumerate(placeholders):
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                dims = tuple(d if isinstance(d, int) else None for d in value.shape)
                self._expected[index] = _Expected(value.dtype, dims, node.meta.get(RANGES, {}), _batch_of(value))
        # Whether a batch may be split along dimension 0: one dynamic size, the same in every tensor input.
        batches = {e.batch for e in self._expected if isinstance(e, _Expected)}
        self.divisible = len(batches) == 1 and None not in batches

    def try_parts(self, graph_module: fx.GraphModule, example: Inputs) -> None:
        """Lets a graph run on one sample of an example; where it cannot, batches are taken not to be divisible.

        Some graphs take multiples of a number of samples alone, and `torch.export` does not say so.
        """
        if not self.divisible:
            return
        try:
            values = self.flatten(self.check(*example))
        except DataError:
            return  # which whoever runs the data will be told
        try:
            with torch.no_grad():
                fx.Interpreter(graph_module).run(*[v[:1] if isinstance(v, Tensor) else v for v in values])
        except Exception:
            self.divisible = False

    def fits(self, inputs: Inputs) -> bool:
        """Whether inputs are arguments like those at capture; their shapes, dtypes and values are not looked at."""
        try:
            return pytree.tree_structure(self._spelled(*inputs)) == self._structure
        except TypeError:
            return False

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """The inputs in the one spelling that the captured graph knows: positional where the signature allows it.

        Raises:
            DataError: other arguments or other fixed values than at capture, a tensor of the wrong shape or dtype, a
                size that the graph does not hold for, or NaN.
        """
        try:
            inputs = self._spelled(args, kwargs)
        except TypeError as error:
            raise DataError(f"{describe_call((args, kwargs))} do not fit forward{self.signature}: {error}") from None
        if pytree.tree_structure(inputs) != self._structure:
            raise DataError(
                f"a batch gives other arguments than the example inputs did: {describe_call(inputs)} in place of "
                f"{self._told}; every batch must give the same ones"
            )
        for name, leaf, expected in zip(self.names, pytree.tree_leaves(inputs), self._expected, strict=False):
            if isinstance(expected, _Expected):
                _check_tensor(name, leaf, expected)
            elif not isinstance(expected, Tensor):
                _check_fixed(name, leaf, expected)
        return out_of_inference(inputs)

    def flatten(self, inputs: Inputs) -> list[Any]:
        """The inputs one by one, in the order of the graph's placeholders and of the exported file's inputs."""
        return pytree.tree_leaves(inputs)

    def _spelled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        bound = self.signature.bind(*args, **kwargs)
        example = pytree.tree_unflatten([None] * self._structure.num_leaves, self._structure)
        return _in_order((bound.args, bound.kwargs), example)


@contextmanager
def failing_on(batch: int, inputs: Inputs) -> Iterator[None]:
    """A block in which a model runs on a batch: what goes wrong there is told with the batch.

    Raises:
        DataError: for every error but those of qdq.
    """
    try:
        yield
    except QdqError:
        raise
    except Exception as error:
        raise DataError(
            f"the model fails on batch {batch}, {describe_call(inputs)}: {type(error).__name__}: {error}"
        ) from error


def describe_call(inputs: Inputs) -> str:
    """Types and shapes of arguments, for messages."""
    args, kwargs = inputs
    return "(" + ", ".join([*map(describe, args), *(f"{k}={describe(v)}" for k, v in kwargs.items())]) + ")"


def _in_order(value: Any, example: Any) -> Any:
    """The value with the keys of its dicts in the order of the example's: the graph takes dicts by that order."""
    if type(value) is dict and type(example) is dict and value.keys() == example.keys():
        return {key: _in_order(value[key], example[key]) for key in example}
    if type(value) in (tuple, list) and type(example) is type(value) and len(value) == len(example):
        return type(value)(_in_order(v, e) for v, e in zip(value, example, strict=True))
    return value


def _batch_of(value: Tensor) -> str | None:
    """The symbol of dimension 0; None where it is a number, or a multiple of something."""
    size: Any = value.shape[0] if value.dim() else 1
    expression = None if isinstance(size, int) else size.node.expr
    return str(expression) if expression is not None and expression.is_Symbol else None


def _check_tensor(name: str, leaf: Any, expected: _Expected) -> None:
    if not isinstance(leaf, Tensor):
        raise DataError(f"input {name!r} is {describe(leaf)}, the model was captured with a tensor")
    dtype, shape, ranges, _ = expected
    wrong = len(shape) != leaf.dim() or any(d is not None and d != s for d, s in zip(shape, leaf.shape, strict=True))
    if wrong:
        wanted = "[" + ", ".join("any" if d is None else str(d) for d in shape) + "]"
        raise DataError(f"input {name!r} has shape {list(leaf.shape)}, the model was captured for {wanted}")
    if leaf.dtype != dtype:
        raise DataError(f"input {name!r} has dtype {leaf.dtype}, the model was captured for {dtype}")
    if leaf.dim() and leaf.shape[0] == 0:
        raise DataError(f"input {name!r} holds an empty batch, of shape {list(leaf.shape)}")
    for dim, (least, most) in ranges.items():
        size = leaf.shape[dim]
        if size < least or (most is not None and size > most):
            wanted = f"{least} or more" if most is None else f"{least} to {most}"
            raise DataError(
                f"input {name!r} has size {size} in dimension {dim}, the captured graph holds for {wanted}: the "
                "model's code depends on this size, and the example inputs decided how; give other example_inputs, or "
                "data of such sizes"
            )
    # An infinite value is legal here (an attention mask); where it meets a quantizer, that one refuses it.
    if leaf.is_floating_point() and torch.isnan(leaf).any():
        raise DataError(f"input {name!r} holds NaN: clean the data first")


def _check_fixed(name: str, leaf: Any, expected: Any) -> None:
    if isinstance(leaf, Tensor):
        raise DataError(f"input {name!r} is a tensor, the model was captured with {_short(expected)}")
    # NaN is the one value that differs from itself.
    if leaf is not expected and not leaf == expected and not (leaf != leaf and expected != expected):
        raise DataError(
            f"input {name!r} is {_short(leaf)}, the model was captured with {_short(expected)}: a captured graph holds "
            "such values fixed; quantize once per value, or make it a tensor"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
