"""What an ONNX file says about its own quantization, read from the file alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from qdq._cli.errors import UsageError, require

# Operations that the runtimes have integer kernels for when their operands come from DequantizeLinear.
_INTEGER = frozenset(
    "Conv ConvTranspose MatMul Gemm Add Sub Mul Div Concat AveragePool GlobalAveragePool ReduceMean Sigmoid LeakyRelu "
    "Softmax HardSigmoid HardSwish Tanh Resize Where Pow Sum Einsum Attention".split()
)
# Operations that move, select or clip values: they compute on codes as well as on floats.
_MOVING = frozenset(
    "Relu Clip MaxPool GlobalMaxPool Reshape Flatten Transpose Squeeze Unsqueeze Slice Split Gather Identity Expand "
    "Pad DepthToSpace SpaceToDepth Tile Dropout".split()
)
_INTEGER_FORMS = ("QLinear", "MatMulInteger", "ConvInteger", "QGemm", "QAttention", "DynamicQuantize")


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """One quantized tensor of the file.

    Attributes:
        name: the float tensor that is quantized (activation), or the integer initializer (weight, bias).
        role: "activation", "weight" or "bias".
        dtype: of the codes, as ONNX names it ("uint8", "int8", "int32", ...).
        granularity: "per tensor", "per channel (axis n)" or "per block".
        step_low, step_high: smallest and largest step size; None if it is not a constant.
        zero_point: its value if there is one for all channels, "varies", or None if it is not a constant.
        used_by: operation types that read it.
    """

    name: str
    role: str
    dtype: str
    granularity: str
    step_low: float | None
    step_high: float | None
    zero_point: int | str | None
    used_by: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FloatOperation:
    """An operation that computes in float, and which of its float operands come quantized."""

    name: str
    op_type: str
    quantized_operands: int
    operands: int


@dataclasses.dataclass(frozen=True)
class Survey:
    """All that :func:`survey` found.

    Attributes:
        integer_operations: count per type of the operations whose operands all come quantized.
        float_operations: those with an integer form which stayed in float, wholly or in part, and those without one.
        code_bytes, float_bytes: of the initializers, without and with a float dtype.
        file_bytes: of the file and its external data.
    """

    path: Path
    opset: int
    producer: str
    tensors: tuple[QuantizedTensor, ...]
    integer_operations: Counter[str]
    float_operations: tuple[FloatOperation, ...]
    code_bytes: int
    float_bytes: int
    file_bytes: int

    def count(self, role: str) -> int:
        """How many quantized tensors have this role."""
        return sum(tensor.role == role for tensor in self.tensors)


def survey(path: Path) -> Survey:
    """Reads an ONNX file; weights stored outside it stay there.

    Raises:
        UsageError: no such file, or it is not an ONNX model.
        CommandError: the package onnx is missing.
    """
    require("onnx", "onnx", "reading an ONNX file")
    import onnx

    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, by whichever implementation is installed
        raise UsageError(f"{path} is not an ONNX model ({type(error).__name__})") from None
    if not model.graph.node and not model.graph.output:
        raise UsageError(f"{path} is not an ONNX model (it has no graph)")
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    reader = _Reader(model.graph, path)
    code_bytes, float_bytes = reader.initializer_bytes()
    integer, floating = reader.operations()
    return Survey(
        path=path,
        opset=opsets.get("", opsets.get("ai.onnx", 0)),
        producer=" ".join(part for part in (model.producer_name, model.producer_version) if part),
        tensors=reader.tensors(),
        integer_operations=integer,
        float_operations=floating,
        code_bytes=code_bytes,
        float_bytes=float_bytes,
        file_bytes=path.stat().st_size + reader.external_bytes(),
    )


class _Reader:
    """The indices of one graph, and the questions asked of them."""

    def __init__(self, graph: Any, path: Path) -> None:
        self._path = path
        self._nodes = list(graph.node)
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in self._nodes:
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self._constants[node.output[0]] = attribute.t
        self._maker = {name: node for node in self._nodes for name in node.output}
        self._readers: dict[str, list[Any]] = {}
        for node in self._nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def tensors(self) -> tuple[QuantizedTensor, ...]:
        found: dict[str, QuantizedTensor] = {}
        for node in self._nodes:
            if node.op_type == "DequantizeLinear" and node.input[0] in self._constants:
                code = self._constants[node.input[0]]
                dtype = _dtype_name(code.data_type)
                role = "bias" if dtype == "int32" else "weight"
                found[code.name or node.input[0]] = self._tensor(node, node.input[0], role, dtype, code)
            elif node.op_type == "QuantizeLinear":
                role = "weight" if node.input[0] in self._constants else "activation"
                found.setdefault(node.input[0], self._tensor(node, node.input[0], role, self._code_dtype(node), None))
        return tuple(found.values())

    def operations(self) -> tuple[Counter[str], tuple[FloatOperation, ...]]:
        integer: Counter[str] = Counter()
        floating: list[FloatOperation] = []
        for node in self._nodes:
            kind = node.op_type
            if kind.startswith(_INTEGER_FORMS):
                integer[kind] += 1
                continue
            if kind in ("QuantizeLinear", "DequantizeLinear", "Constant", "Cast", "Shape") or kind in _MOVING:
                continue
            operands = [name for name in node.input if name and self._is_float(name)]
            if not operands:
                continue
            quantized = sum(self._is_quantized(name) for name in operands)
            if kind in _INTEGER and quantized == len(operands):
                integer[kind] += 1
            else:
                floating.append(FloatOperation(node.name or node.output[0], kind, quantized, len(operands)))
        return integer, tuple(floating)

    def initializer_bytes(self) -> tuple[int, int]:
        codes = floats = 0
        for tensor in self._constants.values():
            size = _bytes_of(tensor)
            if _is_float_type(tensor.data_type):
                floats += size
            else:
                codes += size
        return codes, floats

    def external_bytes(self) -> int:
        locations = {
            entry.value
            for tensor in self._constants.values()
            for entry in tensor.external_data
            if entry.key == "location"
        }
        files = (self._path.parent / location for location in locations)
        return sum(file.stat().st_size for file in files if file.is_file())

    def _tensor(self, node: Any, name: str, role: str, dtype: str, code: Any) -> QuantizedTensor:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        steps = self._values(node.input[1])
        zeros = self._values(node.input[2]) if len(node.input) > 2 and node.input[2] else [0]
        if "block_size" in attributes and attributes["block_size"].i:
            granularity = f"per block of {attributes['block_size'].i}"
        elif steps is not None and len(steps) > 1:
            granularity = f"per channel (axis {attributes['axis'].i if 'axis' in attributes else 1})"
        else:
            granularity = "per tensor"
        zero_point: int | str | None = None
        if zeros is not None:
            zero_point = int(zeros[0]) if len(set(zeros)) == 1 else "varies"
        return QuantizedTensor(
            name=name,
            role=role,
            dtype=dtype,
            granularity=granularity,
            step_low=min(steps) if steps else None,
            step_high=max(steps) if steps else None,
            zero_point=zero_point,
            used_by=self._used_by(node),
        )

    def _used_by(self, node: Any) -> tuple[str, ...]:
        """Types of the operations behind the DequantizeLinear nodes, in the order of the graph, each once."""
        ends = [node] if node.op_type == "DequantizeLinear" else self._readers.get(node.output[0], [])
        kinds = [
            reader.op_type
            for end in ends
            for reader in (self._readers.get(end.output[0], []) if end.op_type == "DequantizeLinear" else [end])
        ]
        return tuple(dict.fromkeys(kinds))

    def _values(self, name: str) -> list[float] | None:
        tensor = self._constants.get(name)
        if tensor is None or tensor.external_data:
            return None
        from onnx import numpy_helper

        return numpy_helper.to_array(tensor).astype("float64").ravel().tolist()

    def _code_dtype(self, node: Any) -> str:
        if len(node.input) > 2 and node.input[2] in self._constants:
            return _dtype_name(self._constants[node.input[2]].data_type)
        for attribute in node.attribute:
            if attribute.name == "output_dtype" and attribute.i:
                return _dtype_name(attribute.i)
        return "uint8"  # the operator's default

    def _is_float(self, name: str) -> bool:
        """Whether an operand carries data in float: not shapes, indices, masks and one-element constants."""
        tensor = self._constants.get(name)
        if tensor is not None:
            return _is_float_type(tensor.data_type) and _count(tensor) > 1
        return not self._is_shape_arithmetic(name)

    def _is_shape_arithmetic(self, name: str) -> bool:
        """Whether a tensor is computed from shapes and constants alone."""
        seen: set[str] = set()
        ends = [name]
        while ends:
            name = ends.pop()
            if name in seen or name in self._constants or not name:
                continue
            seen.add(name)
            maker = self._maker.get(name)
            if maker is None:
                return False  # an input of the graph
            if maker.op_type in ("Shape", "Size"):
                continue
            ends.extend(maker.input)
        return True

    def _is_quantized(self, name: str) -> bool:
        """Whether a tensor comes from DequantizeLinear, through operations that only move values if any."""
        maker = self._maker.get(name)
        while maker is not None and maker.op_type in _MOVING and maker.input:
            maker = self._maker.get(maker.input[0])
        return maker is not None and maker.op_type == "DequantizeLinear"


def _dtype_name(code: int) -> str:
    import onnx

    return onnx.TensorProto.DataType.Name(code).lower()


def _is_float_type(code: int) -> bool:
    return _dtype_name(code) in ("float", "float16", "bfloat16", "double")


def _count(tensor: Any) -> int:
    count = 1
    for length in tensor.dims:
        count *= length
    return count


def _bytes_of(tensor: Any) -> int:
    bits = {"int4": 4, "uint4": 4, "float4e2m1": 4, "int2": 2, "uint2": 2}
    name = _dtype_name(tensor.data_type)
    if name not in bits:
        wide = {"double": 64, "int64": 64, "uint64": 64, "float": 32, "int32": 32, "uint32": 32}
        half = {"float16": 16, "bfloat16": 16, "int16": 16, "uint16": 16}
        bits[name] = {**wide, **half}.get(name, 8)
    return (_count(tensor) * bits[name] + 7) // 8
