"""`Recipe(tune="latency")` beside fp32, the default recipe, ONNX Runtime's static quantization and OpenVINO's int8.

    python benchmarks/latency_tuning.py                       # EfficientNet-B0, random weights, batch 1
    python benchmarks/latency_tuning.py --operations          # and what each convolution with its activation takes
    python benchmarks/latency_tuning.py --keep made           # keep the files there ...
    python benchmarks/latency_tuning.py --reuse made          # ... and time them again

Contenders are timed in interleaved rounds in one process, on 2 threads. Ratios are times round by round: below 1 is
faster. The exit code is 1 where the tuned file is slower than fp32, or than OpenVINO's int8. Time it with nothing else
running: threads that wait for one another make a busy machine's figures meaningless. See README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import cases
import contenders
import deploy
import measure
import numpy as np
import onnx
import torch
from contenders import Contender

OPENVINO = "openvino int8"
FILES = {
    "fp32": "fp32.onnx",
    "qdq": "qdq.onnx",
    "qdq tuned": "tuned.onnx",
    "static": "static.onnx",
    "openvino fp32": "fp32.onnx",
    OPENVINO: "nncf.xml",
}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    deploy._quiet()
    torch.set_num_threads(contenders.THREADS)
    environment = measure.environment()
    print(environment, flush=True)
    case = cases.build(options.model)
    with contextlib.ExitStack() as stack:
        folder = Path(options.reuse or options.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        ready = _contenders(folder) if options.reuse else _build(case, folder)
        measure.progress(f"latency of {len(ready)} contenders, {options.rounds} rounds")
        runs = {key: contender.run for key, contender in ready.items()}
        latencies = measure.interleaved(runs, case.timed, options.rounds, options.seconds)
        reference = measure.outputs(ready["fp32"].run, case.held_out)
        report: dict[str, Any] = {"environment": environment, "model": options.model, "rounds": options.rounds}
        report["results"] = {}
        for key, contender in ready.items():
            report["results"][key] = {
                "ms": float(np.median(latencies[key])),
                "x fp32": str(measure.ratio(latencies[key], latencies["fp32"])),
                "x openvino int8": str(measure.ratio(latencies[key], latencies[OPENVINO])),
                "sqnr_db": measure.sqnr_db(reference, measure.outputs(contender.run, case.held_out)),
                **contender.extra,
            }
        print("\n" + _table([{"contender": k, **_shown(v)} for k, v in report["results"].items()]), flush=True)
        if options.operations:
            report["operations"] = _operations(folder, case.timed)
            print("\n" + _by_kind(report["operations"]) + "\n\n" + _table(report["operations"]), flush=True)
    tuned = latencies["qdq tuned"]
    bars = {key: measure.ratio(tuned, latencies[key]).median for key in ("fp32", OPENVINO)}
    report["bars"] = bars
    for key, ratio in bars.items():
        print(f"tuned against {key}: {ratio:.2f} of its time, {'pass' if ratio <= 1 else 'FAIL'}")
    Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(ratio > 1 for ratio in bars.values()))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=cases.names(), default="efficientnet_b0", metavar="NAME")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds (default 21)")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of one turn in a round (default 0.3)")
    parser.add_argument("--operations", action="store_true", help="also profile every file, convolution by convolution")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the model files there")
    parser.add_argument("--reuse", metavar="FOLDER", help="time the files that an earlier run kept")
    default = Path(__file__).parent / "results" / "latency_tuning.json"
    parser.add_argument("--json", metavar="FILE", default=str(default), help="default: results/latency_tuning.json")
    return parser.parse_args(arguments)


def _build(case: cases.Case, folder: Path) -> dict[str, Contender]:
    fp32 = folder / FILES["fp32"]
    extra: dict[str, dict[str, Any]] = {}
    measure.progress("fp32")
    contenders.export_fp32(case, fp32)
    for key, recipe in (("qdq", {}), ("qdq tuned", {"tune": "latency"})):
        measure.progress(key)
        made = contenders.qdq_contender(case, folder / FILES[key], recipe)
        extra[key] = {"build_seconds": made.build_seconds, **made.extra}
    measure.progress("static, then NNCF")
    contenders.quantize_static(case, fp32, folder / FILES["static"])
    contenders.nncf_contender(case, fp32, folder)
    ready = _contenders(folder)
    for key, values in extra.items():
        ready[key].extra.update(values)
    return ready


def _contenders(folder: Path) -> dict[str, Contender]:
    return {
        key: (contenders.openvino_contender if key.startswith("openvino") else contenders.onnxruntime_contender)(
            key, folder / name
        )
        for key, name in FILES.items()
    }


def _operations(folder: Path, timed: cases.Inputs) -> list[dict[str, Any]]:
    """Microseconds of every convolution of the model and what follows it, up to the next one, in each runtime.

    An operation that a runtime fuses counts where it is computed. Of a row "of these, activation" is what runs by
    itself between this convolution and the next: SiLU, the gate's product, the addition, conversions, layouts.
    """
    from qdq.analysis.operation_times import operation_times

    arrays = [tensor.numpy() for tensor in timed]
    keys = ("fp32", "qdq", "qdq tuned")
    profiles = operation_times([folder / FILES[key] for key in keys], arrays, 60, progress=False)
    columns = {
        key: _groups([(t.operation, t.microseconds) for t in times]) for key, times in zip(keys, profiles, strict=True)
    }
    columns[OPENVINO] = _groups(_openvino_times(folder / FILES[OPENVINO], arrays))
    graph = onnx.load(folder / FILES["fp32"]).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in _shaped(folder / FILES["fp32"])}
    rows = []
    for index, node in enumerate(convolutions):
        out, per_group, *_ = shapes[node.input[1]]
        size = sizes.get(node.output[0], [0, out, 0, 0])
        kind = "depthwise" if per_group == 1 else "gate" if size[2:] == [1, 1] else "pointwise"
        kind = "first" if index == 0 else kind
        row: dict[str, Any] = {"convolution": index, "kind": kind, "shape": "x".join(map(str, size[1:]))}
        for key, groups in columns.items():
            own, rest = groups[index] if len(groups) == len(convolutions) else (float("nan"),) * 2
            row[key], row[f"{key}, of these activation"] = round(own + rest), round(rest)
        rows.append(row)
    return rows


def _shaped(path: Path) -> list[Any]:
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    return list(model.graph.value_info)


def _groups(times: list[tuple[str, float]]) -> list[tuple[float, float]]:
    """(the convolution, what follows it) for every convolution; what comes before the first counts with it."""
    groups: list[list[float]] = []
    before = 0.0
    for operation, microseconds in times:
        if "Conv" in operation:
            groups.append([microseconds, before])
            before = 0.0
        elif groups:
            groups[-1][1] += microseconds
        else:
            before += microseconds
    return [(own, rest) for own, rest in groups]


def _openvino_times(path: Path, arrays: list[np.ndarray]) -> list[tuple[str, float]]:
    """(type, microseconds) of the nodes that OpenVINO runs, in its order; fused ones take no time of their own."""
    import openvino as ov

    config = {"INFERENCE_NUM_THREADS": str(contenders.THREADS), "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
    compiled = ov.Core().compile_model(path, "CPU", {**config, "PERF_COUNT": "YES"})
    request = compiled.create_infer_request()
    times: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for _ in range(63):
        request.infer(arrays)
        for entry in request.get_profiling_info():
            if entry.status == ov.ProfilingInfo.Status.EXECUTED:
                kinds[entry.node_name] = entry.node_type
                times.setdefault(entry.node_name, []).append(1e6 * entry.real_time.total_seconds())
    # Some nodes run once, at the first inference.
    often = {name: values[3:] for name, values in times.items() if len(values) > 3}
    return [(kinds[name], float(np.quantile(values, 0.25))) for name, values in often.items()]


def _by_kind(rows: list[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name not in ("convolution", "kind", "shape")]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    sums = [{"kind": kind, **{n: sum(r[n] for r in rows if r["kind"] == kind) for n in names}} for kind in kinds]
    return _table([*sums, {"kind": "all", **{n: sum(r[n] for r in rows) for n in names}}])


def _shown(result: dict[str, Any]) -> dict[str, str]:
    return {key: f"{value:.2f}" if isinstance(value, float) else str(value) for key, value in result.items()}


def _table(rows: list[dict[str, Any]]) -> str:
    head = list(dict.fromkeys(key for row in rows for key in row))
    cells = [head, ["---"] * len(head), *([str(row.get(key, "-")) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


if __name__ == "__main__":
    sys.exit(main())
