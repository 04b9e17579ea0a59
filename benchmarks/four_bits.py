"""Weights of 4 bits: what rounding them well is worth, on trained models, as deployed.

    python benchmarks/four_bits.py                       # S1, S2 (W4A8 per channel) and MiniLM (W4, blocks of 128)
    python benchmarks/four_bits.py --models minilm

S1 and S2 have weights of 4 bits per output channel and activations of 8; the sentence encoder weights of 4 bits in
blocks of 128 with float activations. All rows of a model share calibration data. Scores and SQNR are those of the
exported file in ONNX Runtime. The exit code is 1 where AdaRound loses more than 1 % of fp32 on S1 or 3 % on S2, or the
best row of the sentence encoder more than 1 %.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import cases
import contenders
import measure
import torch
from cases import Case

RESULTS = Path(__file__).parent / "results" / "four_bits.json"
# Algorithms by the name of a row; "adaround" alone has a bar on the networks of convolutions.
_PER_CHANNEL: dict[str, Any] = {
    "plain rounding": (),
    "chosen ranges": (),
    "bias correction": ("bias_correction",),
    "adaround": ("adaround", "bias_correction"),
}
_BLOCKS: dict[str, Any] = {"plain rounding": (), "chosen ranges": (), "awq": ("awq",), "gptq": ("gptq",)}
_LOSS = {"s1": 0.01, "s2": 0.03, "minilm": 0.01}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(_LOSS), default=list(_LOSS), metavar="NAME")
    parser.add_argument("--json", metavar="FILE", default=str(RESULTS), help="- writes none")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(contenders.THREADS)
    report: dict[str, Any] = {"environment": measure.environment(), "models": {}}
    print(report["environment"], flush=True)
    failed = False
    for name in options.models:
        rows = _rows(cases.build(name))
        lines = _bars(name, rows)
        print(_table(name, rows) + "\n".join(lines), flush=True)
        report["models"][name] = {"rows": rows, "bars": lines}
        failed |= any(line.startswith("FAIL") for line in lines)
    if options.json != "-":
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(failed)


def _rows(case: Case) -> dict[str, dict[str, Any]]:
    import qdq

    blocks = case.kind == "transformer"
    weights = qdq.QuantDescriptor(4, axis=0, narrow_range=True, block_size=128 if blocks else None)
    activations: dict[str, Any] = {"activations": "float"} if blocks else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fp32 = contenders.onnxruntime_contender("fp32", contenders.export_fp32(case, folder / "fp32.onnx"))
        reference = measure.outputs(fp32.run, case.held_out)
        rows = {"fp32": _row(case, fp32)}
        for key, algorithms in (_BLOCKS if blocks else _PER_CHANNEL).items():
            measure.progress(f"{case.name}: {key}")
            ranges = "max" if key == "plain rounding" else "auto"
            recipe = qdq.Recipe(weights=weights, algorithms=algorithms, weight_calibration=ranges, **activations)
            start = time.perf_counter()
            model = qdq.quantize(
                case.model, case.calibration, recipe=recipe, progress=False, dynamic_shapes=contenders.shapes(case)
            )
            seconds = time.perf_counter() - start
            path = qdq.export_onnx(model, folder / f"{key}.onnx")
            made = contenders.onnxruntime_contender(key, path)
            sqnr = measure.sqnr_db(reference, measure.outputs(made.run, case.held_out))
            rows[key] = {**_row(case, made), "SQNR dB": sqnr, "seconds": seconds}
    return rows


def _row(case: Case, made: contenders.Contender) -> dict[str, Any]:
    return {**{score: task(made.run) for score, task in case.tasks.items()}, "MB": made.file_bytes / 1e6}


def _bars(name: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    scores = [key for key in rows["fp32"] if key != "MB"]
    losses = {k: {s: 1 - row[s] / rows["fp32"][s] for s in scores} for k, row in rows.items() if k != "fp32"}
    # One row is judged by all scores: that whose worst loss is the least.
    judged = "adaround" if "adaround" in losses else min(losses, key=lambda key: max(losses[key].values()))
    lines = []
    for score, loss in losses[judged].items():
        verdict = "PASS" if loss <= _LOSS[name] else "FAIL"
        lines.append(f"{verdict}  {name}: {judged} loses {100 * loss:.2f} % of {score} (<= {_LOSS[name]:.0%})")
    return lines


def _table(name: str, rows: dict[str, dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = ["| " + " | ".join([name, *columns]) + " |", "| --- " * (len(columns) + 1) + "|"]
    for key, row in rows.items():
        values = [f"{row[column]:.4g}" if column in row else "-" for column in columns]
        lines.append("| " + " | ".join([key, *values]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
