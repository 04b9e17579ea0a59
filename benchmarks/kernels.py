"""Times of the kernels, one table: qdq, its reference engine, the bare formula, PyTorch's own operation, the floor.

    python -m benchmarks.kernels                              # everything, about an hour
    python -m benchmarks.kernels --quick                      # does it run? small sizes, few rounds, nothing is judged
    python -m benchmarks.kernels --only 'forward*' histogram --sizes 6.4M --threads 2 --no-compile

Contenders take turns in random order; times are medians, with quartiles; ratios are made round by round. "warm" calls
find their data where the call before left them; before a "cold" call a buffer larger than the last-level cache is
walked. The floor is `Tensor.clone` (one read, one write), `torch.add` (two reads, one write) or `torch.aminmax` (one
read). The bars are in kernel_bars.py; the exit code is 1 where one was missed, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import logging
import math
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import kernel_bars
import kernel_report
import torch
from kernel_bars import Key, Verdict
from kernel_cases import DTYPES, OPERATIONS, SIZES, Data, Operation
from kernel_harness import CacheWalk, Contender, Measured, Plan, measure
from kernel_report import progress, shown_time
from measure import ratio

RESULTS = Path(__file__).resolve().parent / "results" / "kernels.json"
QUICK_SIZES = ("64x64", "4096", "65536")
_COLUMNS = (
    *(("operation", 30), ("dtype", 8), ("size", 6), ("threads", 7), ("cache", 5), ("contender", 22), ("median", 8)),
    *(("quartiles", 20), ("x floor", 7), ("torch / it", 10), ("bars", 4)),
)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = kernel_report.machine(options.device)
    print(kernel_report.machine_lines(found) + "\n", flush=True)
    recorded = {name: value for name, value in vars(options).items() if name not in ("json", "operations")}
    report: dict[str, Any] = {"machine": found, "options": recorded, "rows": [], "bars": []}
    walk = CacheWalk(options.device) if "cold" in options.caches else None
    table = kernel_report.Table(_COLUMNS)
    verdicts: list[Verdict] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for operation in options.operations:
            verdicts += _one_operation(operation, threads, options, walk, table, report["rows"])
            report["bars"] = [_verdict_row(verdict) for verdict in verdicts]
            if options.json is not None:
                kernel_report.write_json(options.json, report)
    print()
    print("\n".join(kernel_bars.summary(verdicts)) or "no bar speaks of what was measured")
    if options.json is not None:
        progress(f"wrote {options.json}")
    return int(not options.quick and not all(verdict.passed for verdict in verdicts))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, no torch.compile")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="operations that it names, matches or is a part of"
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), metavar="SIZE", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), metavar="DTYPE")
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1], help="counts, one after the other")
    parser.add_argument("--caches", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    parser.add_argument("--seconds", type=float, default=1.0, help="per case; more where 9 rounds take longer")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of the reference")
    parser.add_argument("--list", action="store_true", help="print the names of the operations")
    parser.add_argument("--json", type=Path, help=f"default: results/{RESULTS.name} for a whole run, else nothing")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(operation.name for operation in OPERATIONS))
        parser.exit()
    options.operations = [o for o in OPERATIONS if options.only is None or _named(o.name, options.only)]
    if not options.operations:
        parser.error(f"no operation matches {' '.join(options.only or [])}; --list shows them")
    if min(options.threads) < 1 or options.seconds < 0:
        parser.error("--threads must be at least 1, --seconds at least 0")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    restricted = options.quick or options.only or options.sizes or set(options.caches) != {"warm", "cold"}
    if options.json is None and not restricted and set(options.threads) >= {1, 2} and options.device == "cpu":
        options.json = RESULTS
    options.sizes = options.sizes or list(QUICK_SIZES if options.quick else SIZES)
    return options


def _named(name: str, patterns: list[str]) -> bool:
    exact = {operation.name for operation in OPERATIONS}
    return any(fnmatch.fnmatchcase(name, p) or (p not in exact and p in name) for p in patterns)


def _one_operation(
    operation: Operation,
    threads: int,
    options: argparse.Namespace,
    walk: CacheWalk | None,
    table: kernel_report.Table,
    rows: list[dict[str, Any]],
) -> list[Verdict]:
    verdicts: list[Verdict] = []
    if options.quick:
        plan = Plan(0.0, least_rounds=3, most_rounds=3, sample_seconds=2e-4)
    else:
        plan = Plan(options.seconds, least_rounds=9, most_rounds=101)
    for dtype in (name for name in operation.dtypes if name in options.dtypes):
        for size in (name for name in operation.sizes if name in options.sizes):
            progress(f"{operation.name}, {dtype}, {size}, {threads} threads")
            compiled = not (options.no_compile or options.quick)
            data = Data(SIZES[size], DTYPES[dtype], options.device, compiled, **operation.options)
            contenders = operation.build(data)
            for cache in (name for name in operation.caches if name in options.caches):
                key = Key(operation.name, dtype, size, math.prod(SIZES[size]), threads, cache, options.device[:4])
                measured = measure(contenders, plan, walk if cache == "cold" else None, options.device)
                verdicts += _report(key, contenders, measured, table, rows)
    return verdicts


def _report(
    key: Key,
    contenders: list[Contender],
    measured: Measured,
    table: kernel_report.Table,
    rows: list[dict[str, Any]],
) -> list[Verdict]:
    """Prints and records one case."""
    samples = {c.role: measured.samples[c.label] for c in contenders if c.label in measured.samples}

    def against(label: str, role: str) -> float | None:
        if role not in samples or label not in measured.samples:
            return None
        return ratio(measured.samples[label].tolist(), samples[role].tolist()).median

    ours = samples.get("ours")
    verdicts: list[Verdict] = []
    if ours is not None:
        middle = float(statistics(ours)[1])
        verdicts = kernel_bars.judge(key, lambda role: against("qdq", role), 1e3 * middle)
    common = [key.operation, key.dtype, key.size, str(key.threads), key.cache]
    for contender in contenders:
        row: dict[str, Any] = {**dataclasses.asdict(key), "contender": contender.label, "role": contender.role}
        if contender.label in measured.skipped:
            reason = measured.skipped[contender.label]
            table.row([*common, contender.label, "-", reason, "", "", "FAIL" if contender.role == "ours" else ""])
            rows.append({**row, "skipped": reason})
            continue
        taken = measured.samples[contender.label]
        low, median, high = statistics(taken)
        of_floor, of_torch = against(contender.label, "floor"), against(contender.label, "torch")
        mine = verdicts if contender.role == "ours" else []
        judged = ", ".join("pass" if v.passed else f"FAIL {kernel_bars.shown(v)}" for v in mine)
        table.row(
            [
                *(*common, contender.label, shown_time(median), f"{shown_time(low)}..{shown_time(high)}"),
                "" if of_floor is None else f"{of_floor:.2f}",
                "" if of_torch is None else f"{1 / of_torch:.2f}",
                judged,
            ]
        )
        rows.append(
            {
                **row,
                "ms": median,
                "quartiles_ms": [low, high],
                "rounds": len(taken),
                "calls_per_sample": measured.calls[contender.label],
                "times_the_floor": of_floor,
                "torch_over_it": None if of_torch is None else 1 / of_torch,
                "bars": [{"bar": v.bar.text, "value": kernel_bars.shown(v), "passed": v.passed} for v in mine],
            }
        )
    return verdicts


def statistics(samples: Any) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, median, high = torch.quantile(torch.as_tensor(samples), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return float(low), float(median), float(high)


def _verdict_row(verdict: Verdict) -> dict[str, Any]:
    return {
        "bar": verdict.bar.text,
        **dataclasses.asdict(verdict.key),
        "value": verdict.value,
        "shown": kernel_bars.shown(verdict),
        "passed": verdict.passed,
    }


if __name__ == "__main__":
    sys.exit(main())
