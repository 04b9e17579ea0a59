"""Runtimes: an ONNX file as a function of numpy arrays, in ONNX Runtime or OpenVINO."""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np

from ..atomic_file import is_file, path_of
from ..errors import DataError, ExportError, need

NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class Runner(Protocol):
    """A loaded model."""

    name: str
    input_names: list[str]

    def __call__(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Outputs for inputs, both in the file's order."""
        ...


class OnnxRuntimeRunner:
    """A model in ONNX Runtime's CPU provider.

    Args:
        model: path of the file, or its bytes.
        threads: of one operation; None leaves it to the runtime.
        optimized: path that the optimised graph is written to (for its operations to be counted).
        fuses: whether operations are fused; without, each node computes what ONNX defines.

    Raises:
        ExportError: the file is missing or ONNX Runtime refuses it.
        RuntimeMissingError: onnxruntime is not installed.
    """

    name = "onnxruntime"

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        threads: int | None = None,
        optimized: str | None = None,
        fuses: bool = True,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise need("onnxruntime", "onnx", "running an ONNX file") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if not fuses:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if optimized is not None:
            options.optimized_model_filepath = optimized
        if not isinstance(model, bytes):
            model = existing_file(model)
        try:
            self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            what = "the model" if isinstance(model, bytes) else repr(model)
            raise ExportError(f"ONNX Runtime cannot load {what}: {str(error).splitlines()[0]}") from error
        self.input_names = [i.name for i in self.session.get_inputs()]
        self.output_names = [o.name for o in self.session.get_outputs()]

    def __call__(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        feed = dict(zip(self.input_names, arrays, strict=True))
        try:
            return list(self.session.run(None, feed))  # type: ignore[arg-type]
        except Exception as error:
            shapes = {name: list(a.shape) for name, a in feed.items()}
            raise DataError(f"ONNX Runtime refuses inputs of shapes {shapes}: {str(error).splitlines()[0]}") from error

    def random_inputs(self, batch_size: int, seed: int = 0) -> list[np.ndarray]:
        """Inputs drawn from a normal distribution; dimension 0, where dynamic, takes the batch size.

        Raises:
            DataError: another dimension is dynamic, or an input is of integers: then inputs must be given.
        """
        generator = np.random.default_rng(seed)
        arrays = []
        for value in self.session.get_inputs():
            shape = [batch_size if i == 0 and not isinstance(d, int) else d for i, d in enumerate(value.shape)]
            if not all(isinstance(d, int) for d in shape) or value.type not in ("tensor(float)", "tensor(double)"):
                raise DataError(
                    f"input {value.name!r} ({value.type}, shape {value.shape}) cannot be made up: pass "
                    "inputs=[...], one array per input of the model"
                )
            arrays.append(generator.standard_normal(shape).astype(NUMPY_TYPES[value.type]))
        return arrays


class OpenVinoRunner:
    """A model in OpenVINO's CPU plugin.

    Raises:
        ExportError: the file is missing or OpenVINO refuses it.
        RuntimeMissingError: openvino is not installed.
    """

    name = "openvino"

    def __init__(self, model: str | os.PathLike[str], threads: int | None = None) -> None:
        try:
            import openvino  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise need("openvino", "openvino", "running a model in OpenVINO") from error
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            self.compiled = openvino.Core().compile_model(existing_file(model), "CPU", settings)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot load {str(model)!r}: {str(error).splitlines()[0]}") from error
        self.input_names = [i.get_any_name() for i in self.compiled.inputs]

    def __call__(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        result = self.compiled(arrays)
        return [np.asarray(result[output]) for output in self.compiled.outputs]


def existing_file(path: str | os.PathLike[str]) -> str:
    """The path as a string.

    Raises:
        QdqError: `path` is no path.
        ExportError: there is no such file.
    """
    if not is_file(path_of(path)):
        raise ExportError(f"there is no file {str(path)!r}")
    return str(path)
