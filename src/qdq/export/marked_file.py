"""Marked file: a quantized ONNX file whose nodes tell the operation of the graph that they come from.

From it files with fewer quantized operations are made within milliseconds, where PyTorch's exporter takes a minute for
a deep model. They hold what a file exported for that placement would, as far as time matters: their ranges are those
of the quantized model. They are timed, and not kept.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import need
from ..graph.names import ORIGINAL_NAME
from ..graph.ops import is_constant, is_float
from ..graph.record import record_of
from ..integer_operations import BlockRounding, IntegerOperation
from .lowering import lower
from .onnx import write_onnx

if TYPE_CHECKING:
    import onnx

_DOMAIN, _MARK, _KEY = "qdq", "Mark", "qdq.operation"
_TOKEN = re.compile(r"qdq_(operation|quantize|dequantize)_(\d+)_")
# Where tensors and operations are named: the outputs of the graph as a reader.
OUTPUT = "output"

# (name of the tensor, name of the operation that reads it, or OUTPUT) -> whether it reads codes.
ReadsCodes = Callable[[str, str], bool]
# Name of an operation -> whether something holds of it.
Says = Callable[[str], bool]


class MarkedFile:
    """A quantized graph as ONNX, with nodes named after the operations of the captured graph.

    Args:
        graph_module: quantized, with ranges.

    Attributes:
        operations: names of the graph's operations and inputs; `operation_in` speaks of their numbers.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        try:
            import onnx
        except ImportError as error:
            raise need("onnx", "onnx", 'tune="latency"') from error
        record = record_of(graph_module)
        assert record.target is not None
        names = list(record.output_names)
        with tempfile.TemporaryDirectory(prefix="qdq-") as folder:
            path = write_onnx(
                lower(_with_marks(graph_module)),
                Path(folder) / "model.onnx",
                record.contract.names,
                names,
                record.target.opset,
            )
            self._model = onnx.load(str(path))
        self._inputs = dict(zip(record.contract.names, _placeholders(graph_module), strict=True))
        self.operations: list[str] = []
        self._numbers: dict[str, int] = {}
        self._owner: dict[str, str] = {}  # value -> the operation whose node gives it
        self._rename()

    def operation_in(self, name: str) -> tuple[str, str] | None:
        """What a runtime's name of a node or value says: ("operation" | "quantize" | "dequantize", operation)."""
        found = _TOKEN.search(name)
        return (found[1], self.operations[int(found[2])]) if found else None

    def save(self, path: Path, reads_codes: ReadsCodes, in_integers: Says, has_codes: Says) -> Path:
        """Writes the file of another placement.

        Args:
            path: of the file.
            reads_codes: for each tensor that has a quantizer and each reader of it.
            in_integers: whether an operation with a quantized weight or bias and quantized inputs keeps these.
            has_codes: whether an operation with a quantized weight keeps that.
        """
        import onnx

        model = copy.deepcopy(self._model)
        nodes = {output: node for node in model.graph.node for output in node.output}
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        floats: dict[str, str] = {}
        for node in model.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                continue
            reader = self._owner.get(node.output[0], "")
            in_float = bool(reader) and not has_codes(reader)
            weighted = [i for i, v in enumerate(node.input) if _codes(nodes, constants, v) is not None]
            activations = {i: raw for i, v in enumerate(node.input) if (raw := _raw(nodes, v)) is not None}
            for position in weighted if in_float or (activations and not in_integers(reader)) else ():
                value = node.input[position]
                if value not in floats:
                    floats[value] = f"{value}_in_float"
                    array = _dequantized(nodes[value], constants)
                    model.graph.initializer.append(onnx.numpy_helper.from_array(array, floats[value]))
                node.input[position] = floats[value]
            unpacked = _unpacked(node, nodes, constants) if in_float else None
            if unpacked is not None:
                plain, array = unpacked
                constant = plain.input[0] if plain.op_type == "Gather" else plain.input[1]
                if constant not in floats:
                    floats[constant] = constant
                    model.graph.initializer.append(onnx.numpy_helper.from_array(array, constant))
                node.CopyFrom(plain)
            for position, raw in activations.items():
                if not reads_codes(self._owner.get(raw, ""), reader):
                    node.input[position] = raw
        for output in model.graph.output:
            raw = _raw(nodes, output.name)
            if raw is not None and not reads_codes(self._owner.get(raw, ""), OUTPUT):
                output.name = raw
        _drop_unused(model)
        large = model.ByteSize() > 2**31 - 2**26
        onnx.save(model, str(path), save_as_external_data=large)
        return path

    def _number(self, operation: str) -> int:
        if operation not in self._numbers:
            self._numbers[operation] = len(self.operations)
            self.operations.append(operation)
        return self._numbers[operation]

    def _rename(self) -> None:
        """Takes the marks out, and names nodes and values after the operations that they stand behind."""
        graph = self._model.graph
        same: dict[str, str] = {}  # the output of a mark -> the value that it marks
        operation: dict[str, str] = {}  # a value -> the first operation that it is the result of
        for node in graph.node:
            if node.domain == _DOMAIN:
                marked = same[node.output[0]] = same.get(node.input[0], node.input[0])
                operation.setdefault(marked, _mark_of(node))
        kept = [node for node in graph.node if node.domain != _DOMAIN]
        for node in kept:
            node.input[:] = [same.get(value, value) for value in node.input]
        for output in graph.output:
            output.name = same.get(output.name, output.name)
        # From the last node to the first: nodes without a mark of their own belong to the operation that reads them.
        readers: dict[str, str] = {}
        for node in reversed(kept):
            owners = [operation[v] for v in node.output if v in operation]
            owners += [readers[v] for v in node.output if v in readers]
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") or not owners:
                continue
            for value in node.output:
                self._owner[value] = owners[0]
            for value in node.input:
                readers.setdefault(value, owners[0])
        for value in graph.input:
            self._owner[value.name] = self._inputs.get(value.name, value.name)
        self._name_values(kept)
        del graph.node[:]
        graph.node.extend(kept)
        imports = [entry for entry in self._model.opset_import if entry.domain != _DOMAIN]
        del self._model.opset_import[:]
        self._model.opset_import.extend(imports)
        del graph.value_info[:]

    def _name_values(self, nodes: list[onnx.NodeProto]) -> None:
        given = {value.name for value in self._model.graph.input}
        new: dict[str, str] = {}
        by_output = {output: node for node in nodes for output in node.output}
        for index, node in enumerate(nodes):
            raw = _raw(by_output, node.output[0])
            if node.op_type == "QuantizeLinear" and node.input[0] in self._owner:
                token = f"qdq_quantize_{self._number(self._owner[node.input[0]])}_{index}"
            elif raw is not None and raw in self._owner:
                token = f"qdq_dequantize_{self._number(self._owner[raw])}_{index}"
            elif node.output[0] in self._owner:
                token = f"qdq_operation_{self._number(self._owner[node.output[0]])}_{index}"
            else:
                token = f"qdq_constant_{index}"
            node.name = token
            new.update({value: f"{token}_{i}_" for i, value in enumerate(node.output) if value not in given and value})
        for node in nodes:
            node.input[:] = [new.get(value, value) for value in node.input]
            node.output[:] = [new.get(value, value) for value in node.output]
        for output in self._model.graph.output:
            output.name = new.get(output.name, output.name)
        self._owner = {new.get(value, value): owner for value, owner in self._owner.items()}


class _Mark(nn.Module):
    """The identity, kept in an exported file as a node that names an operation."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return x
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::{_MARK}", (x,), {}, dtype=x.dtype, shape=x.shape, version=1, metadata_props={_KEY: self.name}
        )


def name_in_capture(node: fx.Node) -> str:
    """The name of a node in the captured graph, before operations were replaced by modules that simulate them."""
    return str(node.meta.get(ORIGINAL_NAME, node.name))


def is_operation(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node of a quantized graph is an operation of the captured one, with one float tensor as its result."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return isinstance(module, IntegerOperation) and not isinstance(module, BlockRounding)
    return node.op == "call_function" and is_float(node) and not is_constant(node)


def _with_marks(graph_module: fx.GraphModule) -> fx.GraphModule:
    marked = copy.deepcopy(graph_module)
    for number, node in enumerate(list(marked.graph.nodes)):
        if not is_operation(marked, node):
            continue
        path = f"qdq_mark_{number}"
        marked.add_submodule(path, _Mark(name_in_capture(node)))
        with marked.graph.inserting_after(node):
            call = marked.graph.call_module(path, (node,))
        call.meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack")}
        node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
    marked.recompile()
    return marked


def _placeholders(graph_module: fx.GraphModule) -> Iterator[str]:
    return (node.name for node in graph_module.graph.nodes if node.op == "placeholder")


def _mark_of(node: onnx.NodeProto) -> str:
    return next(entry.value for entry in node.metadata_props if entry.key == _KEY)


def _raw(nodes: dict[str, onnx.NodeProto], value: str) -> str | None:
    """The float value that a dequantized activation came from; None for others."""
    node = nodes.get(value)
    if node is None or node.op_type != "DequantizeLinear":
        return None
    node = nodes.get(node.input[0])
    while node is not None and node.op_type == "Clip":
        node = nodes.get(node.input[0])
    return node.input[0] if node is not None and node.op_type == "QuantizeLinear" else None


def _codes(nodes: dict[str, onnx.NodeProto], constants: dict[str, Any], value: str) -> Any:
    """The stored codes that a value is dequantized from; None for others."""
    node = nodes.get(value)
    return constants.get(node.input[0]) if node is not None and node.op_type == "DequantizeLinear" else None


def _dequantized(node: onnx.NodeProto, constants: dict[str, Any]) -> np.ndarray:
    import onnx

    codes, step = (onnx.numpy_helper.to_array(constants[name]) for name in node.input[:2])
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    axis, block = int(attributes.get("axis", 1)), int(attributes.get("block_size", 0))
    if block:
        step = np.take(np.repeat(step, block, axis), range(codes.shape[axis]), axis)
    elif step.ndim == 1:
        step = step.reshape([-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)])
    return codes.astype(np.float32) * step


def _unpacked(
    node: onnx.NodeProto, nodes: dict[str, onnx.NodeProto], constants: dict[str, Any]
) -> tuple[onnx.NodeProto, np.ndarray] | None:
    """The float operation in place of one that computes from packed codes, and its weight; None for others."""
    import onnx

    if node.op_type == "MatMulNBits":
        packed, step = (onnx.numpy_helper.to_array(constants[name]) for name in node.input[1:3])
        sizes = {a.name: int(onnx.helper.get_attribute_value(a)) for a in node.attribute}
        codes = packed if sizes["bits"] == 8 else np.stack([packed & 15, packed >> 4], -1)
        rows = codes.reshape(len(step), -1).astype(np.float32) - 2 ** (sizes["bits"] - 1)
        weight = (rows * step[:, None]).reshape(sizes["N"], -1)[:, : sizes["K"]]
        name = f"{node.input[1]}_in_float"
        plain = onnx.helper.make_node("MatMul", [node.input[0], name], node.output, node.name)
        return plain, np.ascontiguousarray(weight.T)
    if node.op_type != "Mul" or (cast := nodes.get(node.input[0])) is None or cast.op_type != "Cast":
        return None
    # Rows of an embedding's codes times their step sizes: see `QuantizedEmbedding`.
    rows, steps = nodes.get(cast.input[0]), nodes.get(node.input[1])
    if rows is None or steps is None or {rows.op_type, steps.op_type} != {"Gather"} or rows.input[0] not in constants:
        return None
    codes, step = (onnx.numpy_helper.to_array(constants[n.input[0]]) for n in (rows, steps))
    table = f"{rows.input[0]}_in_float"
    plain = onnx.helper.make_node("Gather", [table, rows.input[1]], node.output, node.name)
    return plain, codes.astype(np.float32) * step


def _drop_unused(model: onnx.ModelProto) -> None:
    """Nodes and constants that no output of the graph depends on."""
    needed = {output.name for output in model.graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    constants = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
