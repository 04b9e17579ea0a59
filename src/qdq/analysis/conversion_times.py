"""Conversion times: what it takes to go from float to codes and back, as a function of the size of a tensor."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from .operation_times import NodeTime, operation_times

# Channels, height and width of the tensors measured: what a line is drawn through.
_SIZES = ((8, 32, 32), (32, 112, 112))


@dataclasses.dataclass(frozen=True)
class ConversionTimes:
    """Microseconds of a conversion: a fixed part, and one per element.

    Attributes:
        quantize, dequantize: of QuantizeLinear and DequantizeLinear.
        image_quantize, image_dequantize: the same between convolutions, with the changes of layout around them: float
            convolutions have their channels in blocks, integer ones have them last.
    """

    quantize: tuple[float, float]
    dequantize: tuple[float, float]
    image_quantize: tuple[float, float]
    image_dequantize: tuple[float, float]

    def to_codes(self, elements: int, image: bool) -> float:
        """Microseconds from float to codes."""
        fixed, each = self.image_quantize if image else self.quantize
        return fixed + each * elements

    def to_float(self, elements: int, image: bool) -> float:
        """Microseconds from codes to float."""
        fixed, each = self.image_dequantize if image else self.dequantize
        return fixed + each * elements


def conversion_times() -> ConversionTimes:
    """Measures conversions in ONNX Runtime on this machine, within about a second.

    Raises:
        RuntimeMissingError: onnxruntime is not installed.
    """
    measured = [_measure(size) for size in _SIZES]
    elements = [int(np.prod(size)) for size in _SIZES]
    lines = [_line(elements, [m[i] for m in measured]) for i in range(4)]
    return ConversionTimes(*lines)


def _line(elements: list[int], microseconds: list[float]) -> tuple[float, float]:
    each = max(0.0, (microseconds[1] - microseconds[0]) / (elements[1] - elements[0]))
    return max(0.0, microseconds[0] - each * elements[0]), each


def _measure(size: tuple[int, int, int]) -> tuple[float, float, float, float]:
    """Microseconds of the two nodes, and of all that lies between a float and an integer convolution."""
    x = np.random.default_rng(0).standard_normal((1, *size), dtype=np.float32)
    with tempfile.TemporaryDirectory(prefix="qdq-") as folder:
        path = Path(folder) / "conversions.onnx"
        _write(path, size)
        (times,) = operation_times([path], [x], 20, progress=False)
    nodes = [_part(time) for time in times]
    first = nodes.index("integer convolution") if "integer convolution" in nodes else len(nodes)
    before = nodes.index("convolution")
    after = next((i for i, node in enumerate(nodes) if i > first and node == "convolution"), len(nodes))
    single = [
        sum(t.microseconds for t in times if t.operation == kind) for kind in ("QuantizeLinear", "DequantizeLinear")
    ]
    ways = [sum(t.microseconds for t in times[a + 1 : b]) for a, b in ((before, first), (first, after))]
    return single[0], single[1], ways[0], ways[1]


def _part(time: NodeTime) -> str:
    if time.operation == "QLinearConv":
        return "integer convolution"
    return "convolution" if time.operation in ("Conv", "FusedConv") else "conversion"


def _write(path: Path, size: tuple[int, int, int]) -> None:
    """A float, an integer and a float convolution in a row, depthwise: they cost little themselves."""
    import onnx
    from onnx import TensorProto, helper

    channels = size[0]
    constants = {
        "step": np.float32(0.05),
        "zero": np.uint8(128),
        "weight": np.ones((channels, 1, 1, 1), np.float32),
        "codes": np.full((channels, 1, 1, 1), 100, np.int8),
        "weight_step": np.float32(0.01),
        "weight_zero": np.int8(0),
    }
    quantize, dequantize = "QuantizeLinear", "DequantizeLinear"
    nodes = [
        helper.make_node("Conv", ["x", "weight"], ["a"], "first", group=channels),
        helper.make_node(quantize, ["a", "step", "zero"], ["b"], "to_codes"),
        helper.make_node(dequantize, ["b", "step", "zero"], ["c"], "c"),
        helper.make_node(dequantize, ["codes", "weight_step", "weight_zero"], ["w"], "w"),
        helper.make_node("Conv", ["c", "w"], ["d"], "integer", group=channels),
        helper.make_node(quantize, ["d", "step", "zero"], ["e"], "e"),
        helper.make_node(dequantize, ["e", "step", "zero"], ["f"], "to_float"),
        helper.make_node("Conv", ["f", "weight"], ["y"], "last", group=channels),
    ]
    shape = [1, *size]
    graph = helper.make_graph(
        nodes,
        "conversions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
