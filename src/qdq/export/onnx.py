"""Export: a lowered graph becomes an ONNX file, checked and put in place at once."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..atomic_file import is_file, obstacle, path_of
from ..errors import ExportError, need
from ..graph.targets import ONNXRUNTIME, TARGETS, Target
from ..quiet import pytorch_internals
from .constants import store_int4

logger = logging.getLogger("qdq.export")

# A protobuf message cannot pass 2 GiB; room is left for everything that is no tensor data.
EXTERNAL_DATA_ABOVE = 2**31 - 2**26


def write_onnx(
    graph_module: fx.GraphModule,
    path: str | os.PathLike[str],
    input_names: list[str],
    output_names: list[str],
    opset: int,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes a lowered graph as ONNX, with dimension 0 dynamic where capture made it so.

    The file is written beside its place under another name, checked by `onnx.checker`, and moved into place: a
    failure or an interrupt leaves no broken file. Tensors of more than 2 GiB together go to `<name>.data` beside it.

    Raises:
        QdqError: `path` is no path.
        ExportError: the path cannot be written, or PyTorch's exporter does not know an operation.
        RuntimeMissingError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise need(error.name or "onnx", "onnx", "ONNX export") from error
    path = path_of(path)
    check_writable(path)
    program = _exported(graph_module, input_names, output_names, opset)
    store_int4(program.model)
    _drop_traces(program)
    program.model.metadata_props.update(metadata or {})
    size = sum(t.numel() * t.element_size() for t in [*graph_module.parameters(), *graph_module.buffers()])
    external = size > EXTERNAL_DATA_ABOVE
    try:
        folder = Path(tempfile.mkdtemp(prefix=".qdq-", dir=path.parent))
    except OSError as error:
        raise ExportError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    try:
        draft = folder / path.name
        program.save(str(draft), external_data=external)
        onnx.checker.check_model(str(draft), full_check=False)
        for part in sorted(folder.iterdir(), key=lambda p: p == draft):  # the data first, the model last
            os.replace(part, path.parent / part.name)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported model is not valid ONNX: {error}") from error
    except OSError as error:
        raise ExportError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def target_of_file(path: str | os.PathLike[str]) -> Target:
    """The target that a file was written for; the default where it does not say.

    Raises:
        QdqError: `path` is no path.
        ExportError: there is no such file, or it is not ONNX.
    """
    if not is_file(path_of(path)):
        raise ExportError(f"there is no file {str(path)!r}")
    try:
        import onnx
    except ImportError as error:
        raise need("onnx", "onnx", "reading an ONNX file") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ExportError(f"{str(path)!r} is not an ONNX file: {error}") from error
    names = [p.value for p in model.metadata_props if p.key == "qdq.target"]
    return TARGETS.get(names[0], ONNXRUNTIME) if names else ONNXRUNTIME


def check_writable(path: Path) -> None:
    """Raises ExportError where no file can be written at `path`; called before long work as well as after it."""
    reason = obstacle(path)
    if reason is not None:
        raise ExportError(f"cannot write {str(path)!r}: {reason}")


def _exported(
    graph_module: fx.GraphModule, input_names: list[str], output_names: list[str], opset: int
) -> torch.onnx.ONNXProgram:
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    inputs = tuple(_example(n.meta.get("val")) for n in placeholders)
    shapes = tuple(_dynamic(n.meta.get("val")) for n in placeholders)
    flat = _flat(graph_module)
    with pytorch_internals(), torch.no_grad():
        try:
            program = torch.onnx.export(
                flat,
                inputs,
                dynamo=True,
                opset_version=opset,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=shapes,
                verbose=False,
            )
        except Exception as error:
            cause = error.__cause__ or error
            raise ExportError(f"PyTorch's ONNX exporter failed: {_last_line(cause)}") from error
    if program is None:
        raise ExportError("PyTorch's ONNX exporter returned nothing")
    return program


def _flat(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The graph with flat inputs and outputs, which the exporter names one by one."""
    graph = fx.Graph()
    output = graph.graph_copy(graph_module.graph, {})
    graph.output(tuple(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, fx.Node)))
    return fx.GraphModule(graph_module, graph).eval()


def _example(value: Any) -> Any:
    """A real tensor of the captured shape; dynamic dimensions take the size that capture saw."""
    if not isinstance(value, Tensor):
        return value
    shape = [d if isinstance(d, int) else max(int(d.node.hint), 2) for d in value.shape]
    return torch.zeros(shape, dtype=value.dtype)


def _dynamic(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None
    return {i: torch.export.Dim.DYNAMIC for i, d in enumerate(value.shape) if not isinstance(d, int)}


def _drop_traces(program: torch.onnx.ONNXProgram) -> None:
    """The exporter writes stack traces, with paths of this machine, to every node; only what qdq wrote itself stays."""
    graph = program.model.graph
    program.model.metadata_props.clear()
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        for key in [k for k in node.metadata_props if not k.startswith("qdq.")]:
            del node.metadata_props[key]
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.inputs, *graph.initializers.values()]:
        value.metadata_props.clear()


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    known = [line for line in lines if "No ONNX function found" in line or "Unsupported" in line]
    return (known or lines or [type(error).__name__])[0]
