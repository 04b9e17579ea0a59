"""Operation times: files profiled in ONNX Runtime, in turn, and what each of their nodes took."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExportError, need
from ..progress import track

# Of what a node took in the runs of a file this share is shorter: other work on the machine only adds to it.
_QUANTILE = 0.25
_WARM_UP = 3
_EVENT = "_kernel_time"


@dataclasses.dataclass(frozen=True)
class NodeTime:
    """One node of the graph that a runtime runs, after its own fusions.

    Attributes:
        name: of the node, made by the runtime from those of the file; inserted nodes may have any name.
        operation: its type, as in "QLinearConv".
        outputs: names of the values it computes.
        source: for a node that the runtime put in (a change of layout): the name of the node before it, else `name`.
        microseconds: of one run, the lower quartile.
        elements: of its first output.
    """

    name: str
    operation: str
    outputs: tuple[str, ...]
    source: str
    microseconds: float
    elements: int


def operation_times(
    paths: Sequence[Path], arrays: Sequence[np.ndarray], rounds: int = 30, progress: bool = True
) -> list[list[NodeTime]]:
    """The times of the nodes of each file, run in turn.

    Args:
        paths: of the files.
        arrays: inputs, in the files' order.
        rounds: runs of each file.
        progress: whether a bar is shown.

    Raises:
        ExportError: ONNX Runtime refuses a file.
        RuntimeMissingError: onnxruntime is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="qdq-") as folder:
        sessions = [_Profiled(path, Path(folder) / str(i)) for i, path in enumerate(paths)]
        for _ in track(range(rounds + _WARM_UP), "profiling operations", rounds + _WARM_UP, progress):
            for session in sessions:
                session.run(arrays)
        return [session.times() for session in sessions]


class _Profiled:
    def __init__(self, path: Path, folder: Path) -> None:
        folder.mkdir()
        self.optimized = str(folder / "optimized.onnx")
        options = session_options()
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        options.optimized_model_filepath = self.optimized
        self.session = open_session(path, options)

    def run(self, arrays: Sequence[np.ndarray]) -> None:
        feed = {i.name: a for i, a in zip(self.session.get_inputs(), arrays, strict=True)}
        self.session.run(None, feed)

    def times(self) -> list[NodeTime]:
        import onnx

        events = json.loads(Path(self.session.end_profiling()).read_text(encoding="utf-8"))
        taken: dict[str, list[float]] = defaultdict(list)
        elements: dict[str, int] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_EVENT):
                name = event["name"].removesuffix(_EVENT)
                taken[name].append(float(event["dur"]))
                elements[name] = _elements(event["args"])
        nodes = onnx.load(self.optimized, load_external_data=False).graph.node
        producers = {output: node for node in nodes for output in node.output}
        out = []
        for node in nodes:
            if node.name in taken:
                microseconds = float(np.quantile(taken[node.name][_WARM_UP:], _QUANTILE))
                source = _source(node, producers)
                outputs = tuple(node.output)
                out.append(NodeTime(node.name, node.op_type, outputs, source, microseconds, elements[node.name]))
        return out


def session_options() -> Any:
    """Options of a session that takes turns with others: threads that wait must not keep a core busy.

    Raises:
        RuntimeMissingError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise need("onnxruntime", "onnx", "timing an ONNX file") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def open_session(path: Path, options: Any) -> Any:
    """A session on the CPU.

    Raises:
        ExportError: ONNX Runtime refuses the file.
    """
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot load the model: {str(error).splitlines()[0]}") from error


_LAYOUT = ("ReorderInput", "ReorderOutput", "Transpose")


def _source(node: Any, producers: dict[str, Any]) -> str:
    """The name of the nearest node before (or, at the inputs, of) one that changes the layout."""
    while node.op_type in _LAYOUT and "qdq_" not in node.name and node.input[0] in producers:
        node = producers[node.input[0]]
    return str(node.name)


def _elements(arguments: dict[str, Any]) -> int:
    for shapes in arguments.get("output_type_shape") or []:
        for shape in shapes.values():
            return int(np.prod(shape)) if shape else 1
    return 0
