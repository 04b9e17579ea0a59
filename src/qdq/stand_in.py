"""Stand-ins: what a data function is given in place of the user's model, and the first inputs that it feeds to one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .batches import Inputs, describe
from .errors import DataError


class StandIn(nn.Module):
    """Called as the model is, with the parameters and the attributes of the model, and in eval mode whatever is called.

    `train`, `to` and the like change nothing. Writing into a parameter or a buffer changes the model: they are its own.

    Args:
        model: the user's. Its parameters are the stand-in's own, so that `next(m.parameters()).device` works.
        signature: of the model's `forward`.
    """

    def __init__(self, model: nn.Module, signature: inspect.Signature) -> None:
        super().__init__()
        self.training = False
        self.model = model
        self.signature = signature

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet
                raise
            return getattr(self.model, name)

    def train(self, mode: bool = True) -> StandIn:
        """Changes nothing: what is run is in eval mode, and the model keeps its own."""
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> StandIn:
        return self  # .to(device), .half() and the like would change the user's model

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Raises:
        DataError: the call does not fit `forward`.
        """
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise DataError(
                f"the data function's call does not fit forward{self.signature}: {error}; it gives {describe(args)} "
                f"and keywords {describe(kwargs)}"
            ) from None
        return bound.args, bound.kwargs


class _Seen(BaseException):
    """Leaves a user's data function after its first call of the model; no `except Exception` in it stops that."""


class _Recorder(StandIn):
    def __init__(self, model: nn.Module, signature: inspect.Signature) -> None:
        super().__init__(model, signature)
        self.seen: list[Inputs] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(self.bind(args, kwargs))
        raise _Seen


def is_data_function(batches: Any) -> bool:
    """Whether data are a callable that takes a model and runs it, and no iterable that can be called as well."""
    return callable(batches) and not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__")


def first_call(model: nn.Module, run: Callable[[nn.Module], None], signature: inspect.Signature) -> Inputs:
    """The inputs of the first call that a data function makes.

    Raises:
        DataError: it makes none, or one that does not fit `forward`.
    """
    recorder = _Recorder(model, signature)
    with contextlib.suppress(_Seen):
        run(recorder)
    if not recorder.seen:
        raise DataError("the data function ran the model not once: it must call the model that it is given")
    return recorder.seen[0]
