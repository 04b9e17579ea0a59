"""Calibration and verification data: any iterable of batches, bound to the signature of a model's `forward`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from .errors import DataError

logger = logging.getLogger("qdq.batches")

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of `forward` without annotations, so that it can be stored with a model."""
    parameters = inspect.signature(forward).parameters.values()
    return inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])


class Batches:
    """The batches of a user, each bound to `forward`: iterating gives `(args, kwargs)`.

    A tensor is one positional argument, a mapping holds keyword arguments, and a tuple or list positional ones.
    Items of a tuple beyond the parameters of `forward` (a label) are dropped, which is logged once; a tuple that
    fits is never cut; `((a, b), label)` and `({...}, label)` are unwrapped. Numpy arrays become tensors.
    A mapping whose keys name no parameter is the one positional argument of `forward(batch)`.

    Args:
        data: iterable of batches. A one-shot iterator can be gone through once.
        signature: of the model's `forward`.
        inputs_of: takes a batch and gives the model's inputs (tensor, tuple or mapping), which must then fit exactly.
        runs: whether the model takes such inputs. Asked on the first batch that `forward` could take in two ways;
            the answer holds for all batches.

    Raises:
        DataError: `data` is no iterable of batches, holds none, or holds one that does not fit `forward`.
    """

    def __init__(
        self,
        data: Any,
        signature: inspect.Signature,
        inputs_of: Callable[[Any], Any] | None = None,
        runs: Callable[[Inputs], bool] | None = None,
    ) -> None:
        if isinstance(data, (torch.Tensor, np.ndarray)):
            raise DataError(f"batches is one array of shape {tuple(data.shape)}: pass a list of batches, such as [x]")
        indexed = isinstance(data, Iterable) or hasattr(data, "__getitem__")
        if isinstance(data, (str, bytes, Mapping)) or not indexed:
            raise DataError(
                f"batches must be an iterable of tensors, tuples or dicts, not {type(data).__name__}; "
                "one dict of inputs is passed as [inputs]"
            )
        if inputs_of is not None and not callable(inputs_of):
            raise DataError(f"inputs_of must be a callable that takes a batch, not {type(inputs_of).__name__}")
        self._one_shot = isinstance(data, Iterator)
        self._data = data
        self._signature = signature
        self._inputs_of = inputs_of
        self._runs = runs
        self._unwraps: bool | None = None
        self._first: list[Inputs] = []
        self._iterator: Iterator[Any] | None = None
        self._count = 0
        self._told = False
        self.total: int | None = _length(data)

    def first(self) -> Inputs:
        """The first batch, without losing it to a later iteration over a one-shot iterator."""
        if not self._first:
            self._iterator = iter(self._data)
            self._first = [self._bind(self._next())]
        return self._first[0]

    def __iter__(self) -> Iterator[Inputs]:
        first = self.first()
        # A re-iterable source is asked anew each time; only the first pass continues where `first` stopped.
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            if self._one_shot:
                raise DataError(
                    "batches is a one-shot iterator (such as a generator) and has been consumed; a second pass needs "
                    "data that can be gone through again: pass a list or a DataLoader"
                )
            iterator = iter(self._data)
            self._count = 0
        else:
            yield first
            self._count = 1
        for item in iterator:
            bound = self._bind(item)
            self._count += 1
            yield bound

    def _next(self) -> Any:
        assert self._iterator is not None
        try:
            return next(self._iterator)
        except StopIteration:
            hint = (
                "; it is a one-shot iterator (such as a generator), which may have been consumed before: pass a list "
                "or a DataLoader"
                if self._one_shot
                else ""
            )
            raise DataError(f"batches holds no batch{hint}") from None

    def _bind(self, item: Any) -> Inputs:
        if self._inputs_of is not None:
            try:
                item = self._inputs_of(item)
            except Exception as error:
                raise DataError(
                    f"inputs_of failed on batch {self._count} ({describe(item)}): {type(error).__name__}: {error}"
                ) from error
        try:
            return self._bound(*self._split(item))
        except TypeError as error:
            raise DataError(
                f"batch {self._count} ({describe(item)}) does not fit forward{self._signature}: {error}; pass "
                "inputs_of=callable to say which part of a batch the model takes (on the command line: --keys)"
            ) from None

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        bound = self._signature.bind(*args, **kwargs)
        try:
            return tuple(_tensor(a) for a in bound.args), {k: _tensor(v) for k, v in bound.kwargs.items()}
        except DataError as error:
            raise DataError(f"batch {self._count}: {error}") from None

    def _split(self, item: Any) -> Inputs:
        if isinstance(item, Mapping):
            if self._is_one_argument(item) and self._runs is not None and self._runs(self._bound((item,), {})):
                return (item,), {}
            return (), dict(item)
        if not isinstance(item, (tuple, list)):
            return (item,), {}
        items = tuple(item)
        if self._inputs_of is not None:
            return items, {}
        inner = self._unwrapped(items)
        if inner is not None and self._is_unwrapped(items, inner):
            self._say("only the first item of each batch is passed to the model; the rest is taken for labels")
            return inner
        most = self._most()
        if len(items) > most and not isinstance(items[0], (tuple, list, Mapping)):
            self._say(
                f"batches hold {len(items)} items and forward takes {most}: the last {len(items) - most} of each are "
                "dropped (taken for labels)"
            )
            items = items[:most]
        return items, {}

    def _unwrapped(self, items: tuple[Any, ...]) -> Inputs | None:
        """The first item as the model's inputs, the others being labels; None where that does not fit."""
        if len(items) < 2:
            return None
        first = items[0]
        if isinstance(first, Mapping):
            if self._fits_keywords(first):
                return (), dict(first)
            if self._is_one_argument(first) and self._most() == 1:
                return (first,), {}
        if isinstance(first, (tuple, list)) and self._fits(tuple(first), {}):
            return tuple(first), {}
        return None

    def _is_unwrapped(self, items: tuple[Any, ...], inner: Inputs) -> bool:
        """Whether `inner` is meant and not `items` as they are: by the signature, else by what the model takes."""
        if isinstance(items[0], Mapping) and inner[1] and all(key in self._signature.parameters for key in items[0]):
            return True
        if not self._fits(items, {}):
            return True
        if self._unwraps is None:
            readings = [self._bound(*inner), self._bound(items, {})]
            taken = [] if self._runs is None else [self._runs(reading) for reading in readings]
            if sum(taken) != 1:
                tried = f", and the model runs on {'both' if all(taken) else 'neither'}" if taken else ""
                raise DataError(
                    f"batch {self._count} ({describe(items)}) fits forward{self._signature} in two ways, as it is and "
                    f"with its first item unwrapped{tried}; pass inputs_of=callable to say which part the model takes"
                )
            self._unwraps = taken[0]
        return self._unwraps

    def _is_one_argument(self, item: Mapping[Any, Any]) -> bool:
        """Whether a mapping can only be an argument itself: its keys name no parameter."""
        if any(key in self._signature.parameters for key in item):
            return False
        return self._fits((item,), {}) and not self._fits_keywords(item)

    def _fits_keywords(self, item: Mapping[Any, Any]) -> bool:
        return all(isinstance(key, str) for key in item) and self._fits((), dict(item))

    def _fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    def _most(self) -> int:
        kinds = [p.kind for p in self._signature.parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            return 1 << 30
        return sum(k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in kinds)

    def _say(self, message: str) -> None:
        if not self._told:
            logger.warning(message)
            self._told = True


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # generators have none, and a DataLoader over an iterable dataset refuses to tell
        return None


def describe(value: Any) -> str:
    """A short description of a batch for messages: types and shapes, no values."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(describe(v) for v in value) + ")"
    return type(value).__name__


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind not in "biufc":
        kind = "objects" if array.dtype == object else f"dtype {array.dtype}"
        raise DataError(f"it holds a numpy array of {kind}: convert it to numbers of one dtype")
    # PyTorch takes neither the other byte order nor views that run backwards or lie across a record's fields.
    if not array.dtype.isnative or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise DataError(
            f"it holds a numpy array of dtype {array.dtype}, which PyTorch does not have: convert it, as with "
            ".astype(numpy.float32)"
        ) from None


def _tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _from_numpy(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_tensor(v) for v in value) if type(value) in (tuple, list) else value
    if isinstance(value, dict):
        return {k: _tensor(v) for k, v in value.items()}
    return value
