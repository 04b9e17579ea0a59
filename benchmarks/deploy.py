"""Compares deployed models: fp32, qdq, ONNX Runtime's static quantization, NNCF with OpenVINO.

    python benchmarks/deploy.py                              # the default models
    python benchmarks/deploy.py --models s1 resnet18 --rounds 21
    python benchmarks/deploy.py --extra --json results/extra.json

Per model all contenders are built, then timed in interleaved rounds in one process, both runtimes on 2 threads, then
compared with the float outputs on inputs that calibration did not see. Ratios are times: below 1 is faster. The exit
code is 1 where a contender failed or a bar was missed, 2 for wrong arguments. See README.md for the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bars
import cases
import contenders
import measure
import numpy as np
import optimised_graph
import torch
from bars import Result
from contenders import Contender

# A transformer's peers quantize either everything or what qdq quantizes by default.
MATRIX_PRODUCTS = ("MatMul", "Gemm")


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    _quiet()
    torch.set_num_threads(contenders.THREADS)
    names = options.models or [*cases.DEFAULT, *(cases.EXTRA if options.extra else ())]
    print(measure.environment(), flush=True)
    report: dict[str, Any] = {"environment": measure.environment(), "options": _recorded(options), "models": {}}
    failed = False
    for name in names:
        try:
            results, checks = _one_model(name, options)
        except Exception:
            traceback.print_exc()
            print(f"\n{name}: could not be prepared", flush=True)
            failed = True
            continue
        print("\n" + _table(name, results), flush=True)
        for result in results.values():
            if result.operations:
                print(f"{result.name} runs: {optimised_graph.summary(_counter(result.operations))}")
        for bar in checks:
            print(f"{name}: {bar}", flush=True)
        failed |= any(result.error for result in results.values()) or not all(bar.passed for bar in checks)
        report["models"][name] = {
            "results": {key: dataclasses.asdict(result) for key, result in results.items()},
            "bars": [str(bar) for bar in checks],
        }
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"\n{'FAILED: see the errors and the FAIL lines above' if failed else 'all contenders ran, all bars passed'}")
    return int(failed)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=cases.names(), metavar="NAME", help=", ".join(cases.names()))
    parser.add_argument("--extra", action="store_true", help="the default models and " + ", ".join(cases.EXTRA))
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of one turn in a round (default 0.3)")
    parser.add_argument("--batch", type=int, default=1, help="batch size of the latency (default 1)")
    parser.add_argument("--init", choices=("measured", "torchvision"), default="measured", help="see README.md")
    parser.add_argument("--skip-peers", action="store_true", help="fp32 and qdq only")
    parser.add_argument("--skip-qdq", action="store_true", help="fp32 and the peers only")
    parser.add_argument("--skip-nncf", action="store_true", help="no NNCF")
    parser.add_argument("--skip-tasks", action="store_true", help="no task scores")
    parser.add_argument("--reduce-range", action="store_true", help="also static quantization with 7-bit weights")
    parser.add_argument("--recipe", type=json.loads, default={}, help="JSON: fields of qdq.Recipe, for experiments")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the model files there")
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.batch < 1 or options.seconds < 0:
        parser.error("--rounds and --batch must be at least 1, --seconds at least 0")
    return options


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a result depends on."""
    return {key: value for key, value in vars(options).items() if key not in ("keep", "json")}


def _one_model(name: str, options: argparse.Namespace) -> tuple[dict[str, Result], list[bars.Bar]]:
    measure.progress(f"{name}: model and data")
    case = cases.build(name, options.batch, options.init)
    with contextlib.ExitStack() as stack:
        if options.keep:
            folder = Path(options.keep) / name
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ready, results = _build_all(case, folder, options)
        measure.progress(f"{name}: latency of {len(ready)} contenders, {options.rounds} rounds")
        runs = {key: contender.run for key, contender in ready.items()}
        latencies = measure.interleaved(runs, case.timed, options.rounds, options.seconds)
        reference = measure.outputs(ready["fp32"].run, case.held_out)
        static = bars.PEER[case.kind]
        for key, contender in ready.items():
            measure.progress(f"{name}: outputs and scores of {key}")
            result = results[key] = Result(key, file_bytes=contender.file_bytes, build_seconds=contender.build_seconds)
            result.latency_ms = float(np.median(latencies[key]))
            result.against_fp32 = measure.ratio(latencies[key], latencies["fp32"])
            if static in latencies:
                result.against_static = measure.ratio(latencies[key], latencies[static])
            result.sqnr_db = measure.sqnr_db(reference, measure.outputs(contender.run, case.held_out))
            if not options.skip_tasks:
                result.scores = {score: task(contender.run) for score, task in case.tasks.items()}
            if contender.onnx_path is not None and key != "fp32":
                result.operations = dict(optimised_graph.operations(contender.onnx_path))
            result.extra = contender.extra
        fp32 = ready["fp32"].onnx_path
        assert fp32 is not None
        additions, convolutions = optimised_graph.residual_additions(fp32), optimised_graph.convolutions(fp32)
    return results, bars.check(name, case.kind, results, additions, convolutions)


def _build_all(
    case: cases.Case, folder: Path, options: argparse.Namespace
) -> tuple[dict[str, Contender], dict[str, Result]]:
    """Builds what can be built. Results of contenders that failed hold the error; the float model must work."""
    measure.progress(f"{case.name}: fp32")
    path = folder / "fp32.onnx"
    results = {"fp32": Result("fp32")}
    try:
        contenders.export_fp32(case, path)
    except Exception as error:
        # The peers can still be measured: only qdq's own export is at fault.
        results["fp32 by qdq"] = Result("fp32 by qdq", error=_describe(error))
        print(f"{case.name}: qdq.export_onnx of the float model FAILED: {_describe(error)}", flush=True)
        contenders.torch_export_fp32(case, path)
    ready = {"fp32": contenders.onnxruntime_contender("fp32", path)}
    for key, build in _builders(case, path, folder, options).items():
        measure.progress(f"{case.name}: {key}")
        results[key] = Result(key)
        try:
            ready[key] = build()
        except Exception as error:
            results[key].error = _describe(error)
            print(f"{case.name}: {key} FAILED: {results[key].error}", flush=True)
    return ready, results


def _describe(error: Exception) -> str:
    """One line; with DEPLOY_DEBUG set, the traceback is printed as well."""
    if os.environ.get("DEPLOY_DEBUG"):
        traceback.print_exc()
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _builders(
    case: cases.Case, fp32: Path, folder: Path, options: argparse.Namespace
) -> dict[str, Callable[[], Contender]]:
    def static(key: str, **how: Any) -> Callable[[], Contender]:
        def build() -> Contender:
            path = folder / f"{key.replace(' ', '_')}.onnx"
            _, seconds = contenders.timed(lambda: contenders.quantize_static(case, fp32, path, **how))
            contender = contenders.onnxruntime_contender(key, path)
            contender.build_seconds = seconds
            return contender

        return build

    builders: dict[str, Callable[[], Contender]] = {}
    if not options.skip_qdq:
        builders["qdq"] = lambda: contenders.qdq_contender(case, folder / "qdq.onnx", options.recipe)
    if options.skip_peers:
        return builders
    builders["static"] = static("static")
    if case.kind == "transformer":
        builders["static matmul"] = static("static matmul", operations=MATRIX_PRODUCTS)
    if options.reduce_range:
        operations = MATRIX_PRODUCTS if case.kind == "transformer" else None
        builders["static 7-bit"] = static("static 7-bit", operations=operations, reduce_range=True)
    if not options.skip_nncf:
        builders["openvino fp32"] = lambda: contenders.openvino_contender("openvino fp32", fp32)
        builders["nncf"] = lambda: contenders.nncf_contender(case, fp32, folder)
    return builders


def _table(name: str, results: dict[str, Result]) -> str:
    fp32 = results["fp32"]
    scores = list(fp32.scores)
    head = [
        "contender",
        "ms",
        "x fp32 (p10..p90)",
        "x static (p10..p90)",
        "MB",
        "x fp32",
        "SQNR dB",
        *scores,
        "build s",
    ]
    rows = [head, ["---"] * len(head)]
    for result in results.values():
        if result.error:
            rows.append([result.name, result.error, *[""] * (len(head) - 2)])
            continue
        rows.append(
            [
                result.name,
                f"{result.latency_ms:.2f}",
                str(result.against_fp32),
                "-" if result.against_static is None else str(result.against_static),
                f"{result.file_bytes / 1e6:.2f}",
                f"{result.file_bytes / fp32.file_bytes:.2f}",
                f"{result.sqnr_db:.1f}",
                *(f"{result.scores[score]:.3f}" for score in scores if score in result.scores),
                f"{result.build_seconds:.1f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows if len(row) > column) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + " |" for row in rows
    ]
    text = f"### {name}\n\n" + "\n".join(lines) + "\n"
    ours = results.get("qdq")
    if ours is not None and ours.extra:
        text += "\nqdq, simulation against runtime: " + ", ".join(f"{k} {v}" for k, v in ours.extra.items()) + "\n"
    return text


def _counter(counts: dict[str, int]) -> Any:
    from collections import Counter

    return Counter(counts)


def _quiet() -> None:
    warnings.simplefilter("ignore")
    for name in ("torch.onnx", "onnxscript", "onnx_ir", "transformers", "nncf", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
