"""What is said when a model cannot be captured: the line of the model that stopped it, and what to do."""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..batches import Inputs, describe
from ..errors import CaptureError

_FIXED = (
    "the model fixes a dimension that should be dynamic (dimension 0, the batch, by default): make the "
    "code independent of it, or pass dynamic_shapes='static' or the shapes that torch.export takes"
)


def does_not_run(error: Exception, model: nn.Module, inputs: Inputs) -> CaptureError:
    """The model raised on the example as it was given."""
    return CaptureError(
        f"the model does not run on the example inputs: {type(error).__name__}: {error}{_user_line(error)}"
        f"{_dtype_advice(error, model, inputs)}"
    )


def fixes_batch_of_one(error: Exception) -> CaptureError:
    """The model runs on the one sample that was given, and raised on two."""
    return CaptureError(
        "the model runs on the example inputs, a batch of 1, but not on the same batch repeated to 2: "
        f"{type(error).__name__}: {error}{_user_line(error)}\n"
        "  what to do: make the code independent of the batch size, or pass dynamic_shapes='static'"
    )


def check_output(output: Any) -> None:
    """Raises:
    CaptureError: the output holds no tensor, or an object that hides its tensors.
    """
    leaves = pytree.tree_leaves(output)
    for leaf in leaves:
        if isinstance(leaf, Mapping) or dataclasses.is_dataclass(leaf):
            name = type(leaf).__name__
            advice = f" or call torch.export.register_dataclass({name})" if dataclasses.is_dataclass(leaf) else ""
            raise CaptureError(
                f"the model returns a {name}, which torch.export does not know: return a dict or tuple{advice}"
            )
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise CaptureError(f"the model returns no tensor, but {describe(output)}: there is nothing to deploy")


def not_captured(error: Exception, inputs: Inputs) -> CaptureError:
    """`torch.export` gave up."""
    text = str(error)
    line = _user_line(error)
    found = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.+)', text)
    found = [f for f in found if not re.search(r"[/\\]torch[/\\]", f[0])]
    if found:
        file, number, function, code = found[-1]
        line = f"\n  at {file}:{number}, in {function}\n    {code.strip()}"
    first = next((part.strip() for part in text.splitlines() if part.strip()), type(error).__name__)
    if "specialized" in text or "Constraints violated" in text or "ConstraintViolation" in type(error).__name__:
        advice = _FIXED + _flat_advice(inputs)
    elif "data-dependent" in text.lower() or "GuardOnDataDependent" in text:
        advice = (
            "the code branches on values of a tensor: use torch.where or torch.cond, or move that part out of the model"
        )
    else:
        advice = "change that line so that torch.export can trace it, or quantize the part of the model around it"
    return CaptureError(f"torch.export could not capture the model: {first}{line}\n  what to do: {advice}")


def _user_line(error: BaseException) -> str:
    """The innermost line of the traceback that is not PyTorch's own: the user's model, in most cases."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not re.search(r"[/\\](torch|qdq)[/\\]", f.filename)
    ]
    if not frames:
        return ""
    frame = frames[-1]
    return f"\n  at {frame.filename}:{frame.lineno}, in {frame.name}\n    {frame.line}"


def _dtype_advice(error: Exception, model: nn.Module, inputs: Inputs) -> str:
    """Where data of another dtype than the parameters' may be the cause: NumPy's default is float64."""
    if not any(p.dtype == torch.float32 for p in model.parameters()):
        return ""
    found = {t.dtype for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.dtype != torch.float32}
    floats = {d for d in found if d.is_floating_point}
    if not floats and not re.search(r"dtype|type|Long|Byte|Int|Char|Double|Half|BFloat", str(error)):
        return ""
    if not found:
        return ""
    names = ", ".join(sorted(str(d).removeprefix("torch.") for d in (floats or found)))
    return f"\n  what to do: the data are {names} and the model's parameters float32: convert the data with .float()"


def _flat_advice(inputs: Inputs) -> str:
    flat = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.dim() == 1]
    if not flat:
        return ""
    return (
        f". An input has the shape {list(flat[0].shape)}, whose one dimension is taken for the batch: if it is a "
        "single sample, add a dimension (x[None])"
    )
