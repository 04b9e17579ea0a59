"""Compares what toolkits make of a model at 8 bits: task metric, SQNR, size, latency and seconds to quantize.

    python benchmarks/accuracy.py                               # all models, three calibration subsets: hours
    python benchmarks/accuracy.py --models s1 p1 --subsets 1
    python benchmarks/accuracy.py --models s1 --contenders qdq nncf --no-latency
    python benchmarks/accuracy.py --show                        # the tables of the last run

Every contender gets the same calibration data, subset by subset; the table shows means over the subsets and two
standard errors. Scores and SQNR are taken where the contender runs: qdq and quantize_static in ONNX Runtime, NNCF in
OpenVINO, ModelOpt, torchao and Brevitas in PyTorch, in their own simulations, which have no latency to compare.
Latency is that of the first subset's files, interleaved, 2 threads. The exit code is 1 where a contender failed or a
bar was missed. A line names the float model's score where the best rival's is above it; it is judged like any other.
NNCF is scored with float operations in float32 and timed as OpenVINO runs by default (in bfloat16 on some processors).
`setup_env.sh FOLDER accuracy` makes the environment.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accuracy_peers
import cases
import contenders
import measure
import numpy as np
import torch
from cases import Case
from contenders import Contender

MODELS = ("p1", "minilm", "s1", "s2", "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")
DEPTHWISE = ("p1", "p1_rest", "s2", "mobilenet_v2", "efficientnet_b0")
# The least score and SQNR of qdq's default, as deployed: the mean over the subsets, as in the table.
LEAST: dict[str, dict[str, float]] = {
    "p1": {"top-1 % of 1000": 85.0, "SQNR dB": 16.0},
    "s1": {"SQNR dB": 37.0},
    "minilm": {"Lee50 Pearson": 0.650, "WordSim Spearman": 0.725},
}
RESULTS = Path(__file__).parent / "results" / "accuracy.json"


@dataclass
class Row:
    """A contender on one model: one value a calibration subset."""

    name: str
    sqnr_db: list[float] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    file_bytes: int | None = None
    latency_ms: float | None = None
    latency_ratio: measure.Ratio | None = None
    note: str = ""
    error: str = ""


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    path = None if options.json == "-" else Path(options.json or RESULTS)
    if options.show:
        return _show(path or RESULTS)
    _quiet()
    torch.set_num_threads(contenders.THREADS)
    environment = measure.environment()
    report: dict[str, Any] = {"models": {}}
    if path is not None and path.exists() and options.add:
        report = json.loads(path.read_text(encoding="utf-8"))
    print(environment, flush=True)
    failed = False
    for name in options.models:
        rows = _one_model(name, options)
        if options.add:
            rows = _added(_rows(report["models"].get(name, {"rows": {}})["rows"]), rows)
        lines = _bars(name, rows)
        print("\n" + _table(name, rows), flush=True)
        print("\n".join(lines), flush=True)
        failed |= any(row.error for row in rows.values()) or any(line.startswith("FAIL") for line in lines)
        made = {key: asdict(row) for key, row in rows.items()}
        report["models"][name] = {"environment": environment, "rows": made, "bars": lines}
        if path is not None:
            path.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    return int(failed)


def _show(path: Path) -> int:
    for name, model in json.loads(path.read_text(encoding="utf-8"))["models"].items():
        rows = _rows(model["rows"])
        lines = _bars(name, rows)
        print(f"{model['environment']}\n\n{_table(name, rows)}\n" + "\n".join(lines) + "\n")
    return 0


def _rows(data: dict[str, dict[str, Any]]) -> dict[str, Row]:
    rows = {key: Row(**row) for key, row in data.items()}
    for row in rows.values():
        row.latency_ratio = measure.Ratio(**row.latency_ratio) if isinstance(row.latency_ratio, dict) else None
    return rows


def _added(known: dict[str, Row], rows: dict[str, Row]) -> dict[str, Row]:
    """All rows, in one order; latencies stay where none was measured now."""
    for key, row in rows.items():
        if row.latency_ms is None and key in known:
            row.latency_ms, row.latency_ratio = known[key].latency_ms, known[key].latency_ratio
    together = {**known, **rows}
    return {key: together[key] for key in ("fp32", *_NAMES) if key in together}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=cases.names(), default=MODELS, metavar="NAME")
    parser.add_argument(
        "--contenders", nargs="+", choices=_NAMES, default=_NAMES, metavar="NAME", help=", ".join(_NAMES)
    )
    parser.add_argument("--subsets", type=int, default=3, help="of the calibration data (default 3)")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds of the latency (default 11)")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of one turn in a round (default 0.3)")
    parser.add_argument("--no-latency", action="store_true", help="scores, SQNR, size and seconds only")
    parser.add_argument("--budget", default="10min", help="of qdq.recover for each model (default 10min)")
    parser.add_argument("--json", metavar="FILE", help="default results/accuracy.json; - writes none")
    parser.add_argument("--show", action="store_true", help="print the tables of the JSON file, and measure nothing")
    parser.add_argument("--add", action="store_true", help="keep what the JSON file has of other models and contenders")
    options = parser.parse_args(arguments)
    if options.subsets < 1 or options.rounds < 1:
        parser.error("--subsets and --rounds must be at least 1")
    return options


def _one_model(name: str, options: argparse.Namespace) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as temporary:
        timed: dict[str, Contender] = {}
        for subset in range(options.subsets):
            case = cases.build(name, subset=subset)
            folder = Path(temporary) / str(subset)
            folder.mkdir()
            fp32 = contenders.export_fp32(case, folder / "fp32.onnx")
            plain = contenders.onnxruntime_contender("fp32", fp32)
            reference = measure.outputs(plain.run, case.held_out)
            builders = {"fp32": lambda plain=plain: plain, **_builders(case, fp32, folder, options)}
            for key, build in builders.items():
                # The float model is one, and recovery takes its time: once is enough.
                if subset and key in ("fp32", "qdq recover"):
                    continue
                row = rows.setdefault(key, Row(key))
                if row.error:
                    continue
                measure.progress(f"{name}, subset {subset}: {key}")
                try:
                    made = _measure(row, build, case, reference)
                except Exception as error:
                    if os.environ.get("ACCURACY_DEBUG"):
                        traceback.print_exc()
                    row.error = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:90]}"
                    print(f"{name}: {key} FAILED: {row.error}", flush=True)
                    continue
                if subset == 0 and not made.extra.get("simulated"):
                    timed[key] = made
                gc.collect()
        if not options.no_latency:
            measure.progress(f"{name}: latency of {len(timed)} contenders, {options.rounds} rounds")
            runs = {key: made.extra.get("timed", made.run) for key, made in timed.items()}
            taken = measure.interleaved(runs, cases.build(name).timed, options.rounds, options.seconds)
            for key, values in taken.items():
                rows[key].latency_ms = float(np.median(values))
                rows[key].latency_ratio = measure.ratio(values, taken["fp32"])
    return rows


def _measure(row: Row, build: Callable[[], Contender], case: Case, reference: Any) -> Contender:
    made = build()
    row.seconds.append(made.build_seconds)
    row.file_bytes = made.file_bytes or None
    row.note = str(made.extra.get("note", ""))
    row.sqnr_db.append(measure.sqnr_db(reference, measure.outputs(made.run, case.held_out)))
    for score, task in case.tasks.items():
        row.scores.setdefault(score, []).append(task(made.run))
    return made


_NAMES = (
    "qdq", "qdq recover", "static minmax", "static entropy", "static percentile", "nncf", "modelopt",
    "modelopt histogram", "torchao", "brevitas",
)  # fmt: skip


def _builders(case: Case, fp32: Path, folder: Path, options: argparse.Namespace) -> dict[str, Callable[[], Contender]]:
    def static(method: str) -> Callable[[], Contender]:
        def build() -> Contender:
            path = folder / f"static_{method}.onnx"
            operations = ("MatMul", "Gemm") if case.kind == "transformer" else None
            made, seconds = contenders.timed(
                lambda: contenders.quantize_static(case, fp32, path, operations=operations, method=method)
            )
            contender = contenders.onnxruntime_contender(f"static {method}", made)
            contender.build_seconds = seconds
            return contender

        return build

    def simulated(make: Callable[[Case], accuracy_peers.Made]) -> Callable[[], Contender]:
        def build() -> Contender:
            start = time.perf_counter()
            model, on = make(case)
            seconds = time.perf_counter() - start
            return Contender(
                "", contenders.torch_run(model), 0, seconds, extra={"simulated": True, "note": f"{on} quantizers"}
            )

        return build

    found: dict[str, Callable[[], Contender]] = {
        "qdq": lambda: contenders.qdq_contender(case, folder / "qdq.onnx", {}),
        "qdq recover": lambda: _recovered(case, folder, options.budget),
        "static minmax": static("minmax"),
        "static entropy": static("entropy"),
        "static percentile": static("percentile"),
        "nncf": lambda: contenders.nncf_in_float32(case, fp32, folder),
        "modelopt": simulated(accuracy_peers.by_modelopt),
        "modelopt histogram": simulated(lambda c: accuracy_peers.by_modelopt(c, "histogram")),
        "torchao": simulated(accuracy_peers.by_torchao),
        "brevitas": simulated(accuracy_peers.by_brevitas),
    }
    if not case.tasks:
        del found["qdq recover"]
    return {key: build for key, build in found.items() if key in options.contenders}


def _recovered(case: Case, folder: Path, budget: str) -> Contender:
    """`qdq.recover` to 99.8 % of the mean of the case's scores."""
    import qdq

    def evaluate(model: torch.nn.Module) -> float:
        return statistics.fmean(task(contenders.torch_run(model)) for task in case.tasks.values())

    start = time.perf_counter()
    found = qdq.recover(
        case.model,
        case.calibration,
        evaluate,
        target=0.998,
        budget=budget,
        dynamic_shapes=contenders.shapes(case),
        progress=False,
    )
    path = qdq.export_onnx(found.model, folder / "recovered.onnx")
    made = contenders.onnxruntime_contender("qdq recover", path)
    made.build_seconds = time.perf_counter() - start
    made.extra["note"] = f"{len(found.rungs)} rungs"
    return made


def _bars(name: str, rows: dict[str, Row]) -> list[str]:
    """What is asked of qdq's default, each line PASS or FAIL."""
    ours, fp32 = rows.get("qdq"), rows.get("fp32")
    if ours is None or fp32 is None or ours.error or fp32.error:
        return []
    lines = []
    others = [r for k, r in rows.items() if k not in ("fp32", "qdq", "qdq recover") and not r.error and r.sqnr_db]
    measured = {"SQNR dB": (ours.sqnr_db, {r.name: r.sqnr_db for r in others})}
    for score, values in ours.scores.items():
        measured[score] = (values, {r.name: r.scores[score] for r in others if score in r.scores})
    for what, (mine, theirs) in measured.items():
        if theirs:
            best = max(theirs, key=lambda key: statistics.fmean(theirs[key]))
            noise = 2 * math.hypot(_standard_error(mine), _standard_error(theirs[best]))
            value = statistics.fmean(theirs[best])
            text = f"{name}: {what} {statistics.fmean(mine):.4g}, best of the others {value:.4g}"
            in_float = fp32.scores[what][0] if what in fp32.scores else math.inf
            told = f"{best}; noise {noise:.2g}" + (f"; fp32 {in_float:.4g}" if value > in_float else "")
            lines.append(_line(statistics.fmean(mine) >= value - noise, f"{text} ({told})"))
    allowed = 0.01 if name in DEPTHWISE else 0.005
    for score, values in ours.scores.items():
        loss = 1 - statistics.fmean(values) / fp32.scores[score][0]
        lines.append(_line(loss <= allowed, f"{name}: {score} loses {100 * loss:.2f} % (<= {100 * allowed:g} %)"))
    for what, least in LEAST.get(name, {}).items():
        values = measured[what][0]
        value, each = statistics.fmean(values), ", ".join(f"{v:.4g}" for v in values)
        lines.append(_line(value >= least, f"{name}: {what} {value:.4g} (>= {least}; subset by subset {each})"))
    return lines


def _line(passed: bool, text: str) -> str:
    return f"{'PASS' if passed else 'FAIL'}  {text}"


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _table(name: str, rows: dict[str, Row]) -> str:
    scores = list(rows["fp32"].scores)
    head = ["contender", *scores, "SQNR dB", "MB", "ms", "x fp32", "seconds", "note"]
    lines = [head, ["---"] * len(head)]
    for row in rows.values():
        if row.error:
            lines.append([row.name, row.error, *[""] * (len(head) - 2)])
            continue
        size = "-" if row.file_bytes is None else f"{row.file_bytes / 1e6:.2f}"
        latency = "-" if row.latency_ms is None else f"{row.latency_ms:.2f}"
        ratio = "-" if row.latency_ratio is None else str(row.latency_ratio)
        values = [_mean(row.scores[score], 4) for score in scores]
        seconds = f"{statistics.median(row.seconds):.0f}"
        lines.append([row.name, *values, _mean(row.sqnr_db, 3), size, latency, ratio, seconds, row.note])
    widths = [max(len(line[i]) for line in lines if len(line) > i) for i in range(len(head))]
    text = ("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
    return f"### {name}\n\n" + "\n".join(text) + "\n"


def _mean(values: list[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}g}"
    return f"{statistics.fmean(values):.{digits}g} ± {2 * _standard_error(values):.1g}"


def _quiet() -> None:
    warnings.simplefilter("ignore")
    accuracy_peers.quiet()
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
