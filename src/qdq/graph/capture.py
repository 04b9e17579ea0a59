"""Capture: a model and example inputs become a functional fx graph with the model's own parameter names."""

from __future__ import annotations

import copy
import inspect
import re
import traceback
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from ..batches import Inputs
from ..errors import CaptureError, DataError
from ..quiet import pytorch_internals
from .canonical import CANONICAL_FORMS


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> fx.GraphModule:
    """The eval-mode graph of `model`, functional, with parameters and buffers under the model's own names.

    Args:
        model: is not changed; the graph holds copies of its parameters.
        args, kwargs: example inputs of `forward`. Where the first dimension is dynamic and of size 1 the example is
            repeated, because `torch.export` would otherwise fix that size.
        dynamic_shapes: as `torch.export.export` takes it. None makes dimension 0 of every tensor input dynamic; the
            string "static" makes nothing dynamic.

    Returns:
        A GraphModule whose nodes are `torch.ops.aten` calls, without in-place operations.

    Raises:
        CaptureError: the model cannot be captured; the message holds the line of the model that stopped it.
        DataError: the example inputs do not fit the model.
    """
    model = _eval_copy(model)
    kwargs = dict(kwargs or {})
    _check_inputs(args, kwargs)
    if dynamic_shapes is None:
        args, kwargs = cast(Inputs, pytree.tree_map(_widen, (args, kwargs)))
        leading = cast(Inputs, pytree.tree_map(_leading_dimension, (args, kwargs)))
        dynamic_shapes = _by_parameter(model, *leading)
    elif isinstance(dynamic_shapes, str):
        if dynamic_shapes != "static":
            raise DataError(f"dynamic_shapes must be None, 'static' or what torch.export takes, not {dynamic_shapes!r}")
        dynamic_shapes = None
    with torch.no_grad(), _plain_attention(), pytorch_internals():
        try:
            model(*args, **kwargs)
        except Exception as error:
            raise CaptureError(
                f"the model does not run on the example inputs: {type(error).__name__}: {error}{_user_line(error)}"
            ) from error
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
            program = program.run_decompositions(dict(CANONICAL_FORMS))
            _refuse_mutation(program)  # only now: what torch.export gives first still has in-place operations
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(_capture_message(error)) from error
        exported = program.module()
    assert isinstance(exported, fx.GraphModule)
    graph_module = fx.GraphModule(exported, exported.graph).eval()
    _remove_guards(graph_module)
    return graph_module


def _eval_copy(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied ({type(error).__name__}: {error}); qdq works on a copy so that yours is never "
            "changed: detach tensors that hold a gradient history, and keep locks or open files out of the module"
        ) from error
    floats = {p.dtype for p in twin.parameters() if p.is_floating_point()}
    if floats & {torch.float16, torch.bfloat16, torch.float64}:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in floats))
        raise CaptureError(f"the model holds {names} parameters; quantization starts from float32: model.float()")
    return twin.eval().requires_grad_(False)


@contextmanager
def _plain_attention() -> Any:
    # The fused path of nn.TransformerEncoder and nn.MultiheadAttention hides the layers that are to be quantized.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _check_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if not tensors:
        raise DataError("example inputs hold no tensor")
    for tensor in tensors:
        if tensor.dim() and tensor.shape[0] == 0:
            raise DataError(f"an example input of shape {tuple(tensor.shape)} holds an empty batch")


def _widen(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == 1:
        return value.repeat(2, *[1] * (value.dim() - 1))
    return value


def _leading_dimension(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {0: torch.export.Dim.DYNAMIC} if value.dim() else {}
    return None


def _by_parameter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs).arguments
    out: dict[str, Any] = {}
    for name, value in bound.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            out.update(value)
        else:
            out[name] = value
    return out


def _refuse_mutation(program: torch.export.ExportedProgram) -> None:
    mutated = [
        spec.target or str(spec.arg)
        for spec in program.graph_signature.output_specs
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
    ]
    if mutated:
        kind = "buffer or input"
        raise CaptureError(
            f"the model writes to the {kind} {mutated[0]!r} in eval mode; a deployed graph has no state: return "
            "the new "
            "value instead of storing it"
        )
    tokens = [s for s in program.graph_signature.input_specs if s.kind == InputKind.TOKEN]
    if tokens:
        raise CaptureError("the model has operations with side effects (such as printing), which a graph cannot hold")


def _remove_guards(graph_module: fx.GraphModule) -> None:
    """Drops the shape guards: they reject batch sizes that the graph can run; qdq checks shapes at its own door."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph_module.graph.erase_node(node)
    if hasattr(graph_module, "_guards_fn"):
        delattr(graph_module, "_guards_fn")
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def _user_line(error: BaseException) -> str:
    """The innermost line of the traceback that is not PyTorch's own: the user's model, in most cases."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not re.search(r"[/\\](torch|qdq)[/\\]", f.filename)
    ]
    if not frames:
        return ""
    frame = frames[-1]
    return f"\n  at {frame.filename}:{frame.lineno}, in {frame.name}\n    {frame.line}"


def _capture_message(error: BaseException) -> str:
    text = str(error)
    line = _user_line(error)
    found = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.+)', text)
    found = [f for f in found if not re.search(r"[/\\]torch[/\\]", f[0])]
    if found:
        file, number, function, code = found[-1]
        line = f"\n  at {file}:{number}, in {function}\n    {code.strip()}"
    first = next((part.strip() for part in text.splitlines() if part.strip()), type(error).__name__)
    if "specialized" in text or "Constraints violated" in text or "ConstraintViolation" in type(error).__name__:
        advice = (
            "the model fixes a dimension that should be dynamic (dimension 0, the batch, by default): make the "
            "code independent of it, or pass dynamic_shapes='static' or the shapes that torch.export takes"
        )
    elif "data-dependent" in text.lower() or "GuardOnDataDependent" in text:
        advice = (
            "the code branches on values of a tensor: use torch.where or torch.cond, or move that part out of the model"
        )
    else:
        advice = "change that line so that torch.export can trace it, or quantize the part of the model around it"
    return f"torch.export could not capture the model: {first}{line}\n  what to do: {advice}"
