"""The ways from a float model to a deployed one that deploy.py compares. Each returns a `Contender` or raises."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from cases import Case, Run

THREADS = 2


@dataclass
class Contender:
    """A deployed model: how to run it, what it weighs, how long it took to make."""

    name: str
    run: Run
    file_bytes: int
    build_seconds: float = 0.0
    onnx_path: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def onnxruntime_contender(name: str, path: Path) -> Contender:
    """An ONNX file in ONNX Runtime, CPU, `THREADS` threads."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Contenders take turns: idle thread pools must not spin on the cores of the one whose turn it is.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        return cast(list[np.ndarray], session.run(None, dict(zip(names, arrays, strict=True))))

    return Contender(name, run, _size(path), onnx_path=path)


def torch_run(model: Callable[..., Any]) -> Run:
    """A PyTorch model as the function of arrays that scores and SQNR are taken from."""

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            out = model(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))
        outputs = out if isinstance(out, (tuple, list)) else [out]
        return [np.asarray(getattr(o, "value", o)) for o in outputs]

    return run


def export_fp32(case: Case, path: Path) -> Path:
    """The float model as ONNX, written by qdq: what every peer starts from."""
    import qdq

    return qdq.export_onnx(case.model, path, example_inputs=case.calibration[0], dynamic_shapes=shapes(case))


def torch_export_fp32(case: Case, path: Path) -> Path:
    """The float model as ONNX, written by PyTorch's exporter alone."""
    program = torch.onnx.export(
        case.model,
        case.calibration[0],
        dynamo=True,
        opset_version=21,
        input_names=list(case.input_names),
        dynamic_shapes=shapes(case),
        verbose=False,
        report=False,
    )
    assert program is not None
    program.save(path, external_data=False)
    return path


def shapes(case: Case) -> tuple[dict[int, Any], ...]:
    """`dynamic_shapes` as torch.export takes them."""
    return tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in case.dynamic)


def quantize_static(
    case: Case,
    fp32: Path,
    path: Path,
    *,
    operations: tuple[str, ...] | None = None,
    reduce_range: bool = False,
    method: str = "minmax",
) -> Path:
    """ONNX Runtime's own static quantization: Q/DQ, uint8 activations, int8 weights per channel.

    `method` finds the ranges: "minmax", "entropy" or "percentile".
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            feeds = _feeds(case, fp32)
            self.rest: Iterator[dict[str, np.ndarray]] = iter(feeds if method == "minmax" else _padded(feeds))

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
            return next(self.rest, None)

    prepared = fp32.with_suffix(".prepared.onnx")
    if not prepared.exists():
        # Symbolic shape inference only adds shapes, and fails on some graphs of PyTorch's exporter.
        quant_pre_process(fp32, prepared, skip_symbolic_shape=True)
    quantize(
        prepared,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=reduce_range,
        calibrate_method={
            "minmax": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }[method],
        op_types_to_quantize=list(operations) if operations else None,
    )
    return path


def nncf_contender(case: Case, fp32: Path, folder: Path) -> Contender:
    """NNCF's post-training quantization of the ONNX file, run by OpenVINO on `THREADS` threads."""
    logging.getLogger("nncf").setLevel(logging.ERROR)
    import nncf
    import openvino as ov

    start = time.perf_counter()
    model = ov.convert_model(fp32)
    kind = nncf.ModelType.TRANSFORMER if case.kind == "transformer" else None
    feeds = _feeds(case, fp32)
    quantized = nncf.quantize(
        model, nncf.Dataset(feeds), subset_size=len(feeds), model_type=kind, preset=nncf.QuantizationPreset.MIXED
    )
    path = folder / "nncf.xml"
    ov.save_model(quantized, path, compress_to_fp16=False)
    seconds = time.perf_counter() - start
    return openvino_contender("nncf", path, seconds)


def nncf_in_float32(case: Case, fp32: Path, folder: Path) -> Contender:
    """NNCF's, scored with float operations in float32; timed as OpenVINO runs by default, in bfloat16 on some CPUs."""
    made = nncf_contender(case, fp32, folder)
    exact = openvino_contender(made.name, folder / "nncf.xml", made.build_seconds, INFERENCE_PRECISION_HINT="f32")
    exact.extra["timed"] = made.run
    return exact


def openvino_contender(name: str, path: Path, build_seconds: float = 0.0, **options: str) -> Contender:
    """A model file (OpenVINO or ONNX) compiled for the CPU, one stream of `THREADS` threads; `options`: properties."""
    import openvino as ov

    config = {"INFERENCE_NUM_THREADS": str(THREADS), "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", **options}
    compiled = ov.Core().compile_model(path, "CPU", config)
    request = compiled.create_infer_request()

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        result = request.infer(list(arrays), share_inputs=True)
        return [np.array(result[output]) for output in compiled.outputs]

    size = _size(path) + (_size(path.with_suffix(".bin")) if path.suffix == ".xml" else 0)
    return Contender(name, run, size, build_seconds)


def qdq_contender(case: Case, path: Path, recipe: dict[str, Any]) -> Contender:
    """This project: quantize, export, verify on held-out inputs."""
    import qdq

    start = time.perf_counter()
    model = qdq.quantize(
        case.model,
        case.calibration,
        target="onnxruntime",
        recipe=qdq.Recipe(**recipe),
        progress=False,
        dynamic_shapes=shapes(case),
    )
    qdq.export_onnx(model, path)
    seconds = time.perf_counter() - start
    contender = onnxruntime_contender("qdq", path)
    contender.build_seconds = seconds
    fidelity = qdq.verify(model, path, case.held_out[:4], progress=False)
    contender.extra.update(
        sqnr_simulation=fidelity.sqnr_db,
        max_step_difference=fidelity.max_step_difference,
        agreement=fidelity.agreement,
    )
    return contender


def timed(build: Callable[[], Path]) -> tuple[Path, float]:
    """What `build` returns and the seconds that it took."""
    start = time.perf_counter()
    path = build()
    return path, time.perf_counter() - start


def _feeds(case: Case, fp32: Path) -> list[dict[str, np.ndarray]]:
    """The calibration batches by the input names of the file."""
    names = [entry.name for entry in onnx.load(fp32, load_external_data=False).graph.input]
    return [{n: t.numpy() for n, t in zip(names, batch, strict=True)} for batch in case.calibration]


def _padded(feeds: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """All batches of one shape, filled up with zeros (padding, masked): the runtime's histograms take no others."""
    shapes = {name: np.max([feed[name].shape for feed in feeds], axis=0) for name in feeds[0]}

    def fill(name: str, array: np.ndarray) -> np.ndarray:
        sizes = zip(array.shape[1:], shapes[name][1:], strict=True)
        return np.pad(array, [(0, 0), *((0, most - size) for size, most in sizes)])

    return [{name: fill(name, array) for name, array in feed.items()} for feed in feeds]


def _size(path: Path) -> int:
    data = path.with_name(path.name + ".data")
    return os.path.getsize(path) + (os.path.getsize(data) if data.exists() else 0)
