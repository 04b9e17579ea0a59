"""Capture: a model and example inputs become a functional fx graph with the model's own parameter names."""

from __future__ import annotations

import contextlib
import io
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from ..batches import Inputs
from ..errors import CaptureError, DataError
from ..modes import out_of_inference
from ..quiet import pytorch_internals
from .canonical import CANONICAL_FORMS
from .capture_errors import check_output, does_not_run, fixes_batch_of_one, not_captured
from .example import check_example, dynamic_batch, eval_copy, name_keywords, run_example, shortened, widened

RANGES = "qdq_ranges"


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> fx.GraphModule:
    """The eval-mode graph of `model`, functional, with parameters and buffers under the model's own names.

    Args:
        model: is not changed; the graph holds copies of its parameters.
        args, kwargs: example inputs of `forward`. Where the first dimension of all is of size 1 the example is
            repeated, because `torch.export` would otherwise fix that size.
        dynamic_shapes: as `torch.export.export` takes it. None makes dimension 0 of every tensor input dynamic; the
            string "static" makes nothing dynamic.

    Returns:
        A GraphModule whose nodes are `torch.ops.aten` calls, without in-place operations.

    Raises:
        CaptureError: the model cannot be captured; the message holds the line of the model that stopped it.
        DataError: the example inputs do not fit the model.
    """
    model = eval_copy(model)
    # Where torch.export fails it leaves its marks (what is dynamic) on the tensors, and a second call would heed them.
    plain = out_of_inference((args, dict(kwargs or {})))
    inputs = cast(Inputs, pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, plain))
    check_example(*inputs)
    if isinstance(dynamic_shapes, str) and dynamic_shapes != "static":
        raise DataError(f"dynamic_shapes must be None, 'static' or what torch.export takes, not {dynamic_shapes!r}")
    with torch.no_grad(), _plain_attention(), pytorch_internals():
        try:
            check_output(_first_run(model, inputs, dynamic_shapes))
        except CaptureError:
            raise
        except Exception as error:
            raise does_not_run(error, model, inputs) from error
        if dynamic_shapes is None:
            inputs = _widen(model, inputs)
        name_keywords(model, inputs[1])
        shapes = dynamic_batch(model, inputs) if dynamic_shapes is None else dynamic_shapes
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # torch.export prints half a graph when it gives up
                program = torch.export.export(model, *inputs, dynamic_shapes=None if shapes == "static" else shapes)
            program = program.run_decompositions(dict(CANONICAL_FORMS))
            _refuse_mutation(program)  # only now: what torch.export gives first still has in-place operations
        except CaptureError:
            raise
        except Exception as error:
            raise not_captured(error, inputs) from error
        exported = program.module()
    assert isinstance(exported, fx.GraphModule)
    graph_module = fx.GraphModule(exported, exported.graph).eval()
    _remove_guards(graph_module)
    _keep_ranges(graph_module, program)
    return graph_module


def _first_run(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> Any:
    """The output on the example; on two samples of it, where any batch size is to do and the model runs on them."""
    few = shortened(inputs) if dynamic_shapes is None else inputs
    if few is not inputs:
        with contextlib.suppress(Exception):
            return run_example(model, few)
    return run_example(model, inputs)


def _widen(model: nn.Module, inputs: Inputs) -> Inputs:
    wide = widened(inputs)
    if wide is not inputs:
        try:
            run_example(model, wide)
        except Exception as error:
            raise fixes_batch_of_one(error) from error
    return wide


@contextlib.contextmanager
def _plain_attention() -> Any:
    # The fused path of nn.TransformerEncoder and nn.MultiheadAttention hides the layers that are to be quantized.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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
            "the new value instead of storing it"
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


def _keep_ranges(graph_module: fx.GraphModule, program: torch.export.ExportedProgram) -> None:
    """Notes at each input, in `meta[RANGES]`, the sizes that the graph holds for: {dimension: (least, most or None)}.

    Where the model's code asks for a size (`if x.shape[0] > 5`) the graph holds the branch that the example took.
    `torch.export` assumes at least 2 of every dynamic size, needed or not: sizes from 2 on are from 1 on here.
    """
    for node in graph_module.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        if not isinstance(value, torch.Tensor):
            continue
        ranges: dict[int, tuple[int, int | None]] = {}
        for dim, size in enumerate(value.shape):
            found = None if isinstance(size, int) else program.range_constraints.get(size.node.expr)
            if found is not None:
                least, most = int(found.lower), found.upper
                ranges[dim] = (least if least > 2 else 1, int(most) if most.is_finite and most < 2**31 else None)
        node.meta[RANGES] = ranges
