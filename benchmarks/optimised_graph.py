"""Which operations ONNX Runtime really runs: the graph after its own optimisation."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx


def operations(path: Path, level: str = "extended") -> Counter[str]:
    """Counts of the operator types in the graph that ONNX Runtime makes of the file, at `"extended"` or `"all"`.

    Level `"all"` adds layouts that are specific to the processor and renames operations; `"extended"` is comparable.
    """
    import onnxruntime as ort

    levels = {
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = ort.SessionOptions()
        options.graph_optimization_level = levels[level]
        options.optimized_model_filepath = str(optimised)
        options.log_severity_level = 3
        # Large weights in a file of their own: the graph alone is read back.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        model = onnx.load(optimised, load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


def residual_additions(path: Path) -> int:
    """How many `Add` nodes of a float file add two activations (neither operand is stored in the file).

    Scalars computed in the graph count as activations only if they depend on an input.
    """
    graph = onnx.load(path, load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    count = 0
    for node in graph.node:
        if node.op_type == "Constant" or (node.input and all(name in stored for name in node.input if name)):
            stored.update(node.output)
        elif node.op_type == "Add" and not any(name in stored for name in node.input):
            count += 1
    return count


def convolutions(path: Path) -> int:
    """How many `Conv` nodes a float file has."""
    return sum(node.op_type == "Conv" for node in onnx.load(path, load_external_data=False).graph.node)


SHOWN = (
    "QLinearConv",
    "Conv",
    "FusedConv",
    "ConvTranspose",
    "QLinearAdd",
    "Add",
    "QLinearMul",
    "Mul",
    "QLinearConcat",
    "Concat",
    "QGemm",
    "Gemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMul",
    "FusedMatMul",
    "QLinearGlobalAveragePool",
    "GlobalAveragePool",
    "QLinearAveragePool",
    "QLinearSigmoid",
    "QLinearLeakyRelu",
    "QLinearSoftmax",
    "QuantizeLinear",
    "DequantizeLinear",
)


def summary(counts: Counter[str]) -> str:
    """One line: the operations that matter for quantization, in a fixed order, and how many others there are."""
    shown = [f"{name} {counts[name]}" for name in SHOWN if counts[name]]
    others = sum(counts.values()) - sum(counts[name] for name in SHOWN)
    return ", ".join([*shown, f"others {others}"])
