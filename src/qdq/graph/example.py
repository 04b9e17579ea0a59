"""The example that a model is captured with: what is refused, what is made dynamic, how it is run beforehand."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..batches import Inputs, describe
from ..errors import CaptureError, DataError

_STATISTICS = ("running_mean", "running_var")


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode, without gradients.

    Raises:
        CaptureError: it cannot be copied, or its parameters are not finite float32 values.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    try:
        twin = copy.deepcopy(model, _detached(model))
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied ({type(error).__name__}: {error}); qdq works on a copy so that yours is never "
            "changed: detach tensors that hold a gradient history, and keep locks or open files out of the module"
        ) from error
    _check_parameters(twin)
    return twin.eval().requires_grad_(False)


def _detached(model: nn.Module) -> dict[int, Any]:
    """Copies of tensors that were computed from others (weight norm, pruning), which deepcopy alone would refuse."""
    values = [value for module in model.modules() for value in vars(module).values()]
    return {id(v): v.detach().clone() for v in values if isinstance(v, torch.Tensor) and not v.is_leaf}


def _check_parameters(model: nn.Module) -> None:
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if floats & {torch.float16, torch.bfloat16, torch.float64}:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in floats))
        raise CaptureError(f"the model holds {names} parameters; quantization starts from float32: model.float()")
    tensors = [("parameter", *item) for item in model.named_parameters()]
    # Other buffers may be infinite: an attention mask is.
    tensors += [("buffer", n, b) for n, b in model.named_buffers() if n.rpartition(".")[2] in _STATISTICS]
    for kind, name, tensor in tensors:
        if isinstance(tensor, nn.parameter.UninitializedParameter) or not tensor.is_floating_point():
            continue
        if tensor.is_meta:
            raise CaptureError(
                f"{kind} {name!r} is on the meta device and holds no values: load the model's weights first"
            )
        if not torch.isfinite(tensor).all():
            raise CaptureError(
                f"{kind} {name!r} holds NaN or infinite values: the model is broken; look at its training, or at the "
                "file that it was loaded from"
            )


def check_example(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises:
    DataError: the example holds no tensor, or an empty batch.
    """
    tensors = _tensors((args, kwargs))
    if not tensors:
        given = describe(args) if not kwargs else describe(kwargs) if not args else describe((*args, kwargs))
        raise DataError(f"example inputs hold no tensor, but {given}: give batches of tensors or numpy arrays")
    for tensor in tensors:
        if tensor.dim() and tensor.shape[0] == 0:
            raise DataError(f"an example input of shape {tuple(tensor.shape)} holds an empty batch")


def widened(inputs: Inputs) -> Inputs:
    """An example of one sample, repeated to two, because `torch.export` would fix the size 1.

    Where the leading sizes differ, a size of 1 is no batch, and everything stays as it is.
    """
    if any(tensor.dim() and tensor.shape[0] != 1 for tensor in _tensors(inputs)):
        return inputs

    def widen(value: Any) -> Any:
        return value.repeat(2, *[1] * (value.dim() - 1)) if isinstance(value, torch.Tensor) and value.dim() else value

    return cast(Inputs, pytree.tree_map(widen, inputs))


def shortened(inputs: Inputs) -> Inputs:
    """The first two samples of an example; the example itself where leading sizes differ or there are no more."""
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in _tensors(inputs)}
    if len(sizes) != 1 or min(sizes) <= 2:
        return inputs
    return cast(Inputs, pytree.tree_map(lambda x: x[:2] if isinstance(x, torch.Tensor) else x, inputs))


def dynamic_batch(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """`dynamic_shapes` with dimension 0 dynamic in every input where it is above 1."""

    def leading(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return {0: torch.export.Dim.DYNAMIC} if value.dim() and value.shape[0] > 1 else {}
        return None

    args, kwargs = cast(Inputs, pytree.tree_map(leading, inputs))
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def name_keywords(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Gives each keyword that a `**kwargs` takes a parameter of its own, in place: `torch.export` asks for names."""
    forward = model.forward
    signature = inspect.signature(forward)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(named) == len(signature.parameters):
        return
    named += [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY) for k in kwargs if k not in signature.parameters]

    def with_names(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    with_names.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    model.forward = with_names


def run_example(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output on a copy of the inputs, which it may write to."""
    args, kwargs = cast(Inputs, pytree.tree_map(_clone, inputs))
    return model(*args, **kwargs)


def runs_on(model: nn.Module) -> Callable[[Inputs], bool]:
    """Whether the model runs on given inputs, as a function of them; tried on a copy of both."""

    def runs(inputs: Inputs) -> bool:
        try:
            with torch.no_grad():
                run_example(eval_copy(model), inputs)
        except CaptureError:
            raise
        except Exception:
            return False
        return True

    return runs


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
