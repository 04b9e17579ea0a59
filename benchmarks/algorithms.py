"""What each algorithm of a recipe gains by itself, on models with trained weights, as deployed.

    python benchmarks/algorithms.py                      # about ten minutes on 2 cores
    python benchmarks/algorithms.py --models s1 --settings W4A8 --json -

Every row is one algorithm alone beside the same recipe without it: SQNR against the float model, of the exported file
in ONNX Runtime, on inputs that calibration did not see. Weights of few bits are rounded over their whole ranges
(`weight_calibration="max"`) and over chosen ones (the default, `"auto"`). Seconds are the processor's, of one thread,
for the whole quantization with the algorithm: other work of the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cases
import contenders
import measure
import numpy as np
import torch
from cases import Case

import qdq
from qdq import QuantDescriptor, Recipe

RESULTS = Path(__file__).parent / "results" / "algorithms.json"


def _weights(bits: int, axis: int | None = 0, block_size: int | None = None) -> QuantDescriptor:
    return QuantDescriptor(bits, axis=axis, narrow_range=True, block_size=block_size)


@dataclass(frozen=True)
class Setting:
    """A model and a recipe that algorithms are added to.

    Attributes:
        model: a case of cases.py.
        words: what the table says of the recipe.
        fields: of the recipe.
        algorithms: each is measured alone, or with those that it is joined to by a plus.
        ranges: the values of `weight_calibration`; weights of 8 bits know no other than "max".
    """

    model: str
    words: str
    fields: dict[str, Any]
    algorithms: tuple[str, ...]
    ranges: tuple[str, ...] = field(default=("max", "auto"))


_ROUNDING = ("bias_correction", "weight_clipping", "gptq", "adaround")
_IN_BLOCKS = {"activations": "float"}
_SMALL = "gptq of small layers"
# As the default recipe has it.
_OPTIONS = {_SMALL: ("gptq", Recipe().algorithms["gptq"])}  # type: ignore[call-overload]
_IN_8_BITS = ("bias_correction", _SMALL, f"{_SMALL} + bias_correction")
SETTINGS = (
    Setting("s1", "W4A8 per channel", {"weights": _weights(4)}, (*_ROUNDING, "block_reconstruction")),
    Setting("s2", "W4A8 per channel", {"weights": _weights(4)}, _ROUNDING),
    Setting("s1", "W2A8 per channel", {"weights": _weights(2)}, ("adaround", "block_reconstruction"), ("auto",)),
    Setting(
        "p1",
        "W8A8, weights per tensor, min-max",
        {"weights": _weights(8, axis=None), "calibration": "max"},
        ("equalization", "bias_correction", "equalization + bias_correction"),
        ("max",),
    ),
    Setting(
        "s2",
        "W8A8, weights per tensor, min-max",
        {"weights": _weights(8, axis=None), "calibration": "max"},
        ("equalization", "bias_correction", "equalization + bias_correction"),
        ("max",),
    ),
    Setting("p1", "W8A8 per channel", {}, _IN_8_BITS, ("max",)),
    Setting("s2", "W8A8 per channel", {}, _IN_8_BITS, ("max",)),
    Setting("minilm", "W8A8 per channel, min-max", {"calibration": "max"}, ("smoothquant",), ("max",)),
    Setting("minilm", "W4 per channel", {"weights": _weights(4), **_IN_BLOCKS}, ("awq",)),
    Setting("minilm", "W4 in blocks of 128", {"weights": _weights(4, block_size=128), **_IN_BLOCKS}, ("awq", "gptq")),
    Setting(
        "minilm",
        "W3 in blocks of 128",
        {"weights": _weights(3, block_size=128), **_IN_BLOCKS},
        ("awq", "gptq"),
        ("auto",),
    ),
)
_RANGES = {"max": "whole ranges", "auto": "chosen ranges"}


def main(arguments: list[str] | None = None) -> int:
    names = list(dict.fromkeys(setting.model for setting in SETTINGS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help="default: all")
    parser.add_argument("--settings", nargs="+", metavar="WORDS", help="those whose words begin so; default: all")
    parser.add_argument("--add", action="store_true", help="keep what the JSON file has of other settings")
    parser.add_argument("--json", metavar="FILE", help="default results/algorithms.json; - writes none")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    report: dict[str, Any] = {"environment": measure.environment(), "rows": []}
    print(report["environment"], flush=True)
    chosen = [setting for setting in SETTINGS if setting.model in options.models]
    if options.settings:
        chosen = [setting for setting in chosen if setting.words.startswith(tuple(options.settings))]
    if not chosen:
        parser.error("no setting has such a model and such words")
    built = {name: cases.build(name) for name in dict.fromkeys(setting.model for setting in chosen)}
    path = Path(options.json or RESULTS)
    if options.add and path.exists():
        new = {(setting.model, setting.words) for setting in chosen}
        known = json.loads(path.read_text(encoding="utf-8"))["rows"]
        report["rows"] = [row for row in known if (row["model"], row["setting"]) not in new]
    for setting in chosen:
        report["rows"] += _rows(setting, built[setting.model])
        if options.json != "-":
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(_table(report["rows"]), flush=True)
    return 0


def _rows(setting: Setting, case: Case) -> list[dict[str, Any]]:
    with torch.no_grad():
        reference = [[case.model(*batch).numpy()] for batch in case.held_out]
    rows: dict[str, dict[str, Any]] = {}
    for ranges in setting.ranges:
        plain, _ = _measured(setting, case, reference, ranges, ())
        for name in setting.algorithms:
            found, seconds = _measured(setting, case, reference, ranges, tuple(name.split(" + ")))
            first = {"algorithm": name, "model": setting.model, "setting": setting.words}
            row = rows.setdefault(name, {**first, "seconds": seconds})
            row[_RANGES[ranges]] = {"plain dB": plain, "with it dB": found}
    return list(rows.values())


def _measured(
    setting: Setting, case: Case, reference: list[list[np.ndarray]], ranges: str, algorithms: tuple[str, ...]
) -> tuple[float, float]:
    """SQNR in dB of the exported file, and the processor's seconds that the quantization took."""
    measure.progress(f"{setting.model}, {setting.words}, {_RANGES[ranges]}: {', '.join(algorithms) or 'plain'}")
    options = dict(_OPTIONS.get(name, (name, {})) for name in algorithms)
    recipe = Recipe(**setting.fields, weight_calibration=ranges, algorithms=options)
    start = time.process_time()
    model = qdq.quantize(
        case.model, case.calibration, recipe=recipe, progress=False, dynamic_shapes=contenders.shapes(case)
    )
    seconds = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        path = qdq.export_onnx(model, Path(folder) / "m.onnx")
        run = contenders.onnxruntime_contender("qdq", path).run
        return measure.sqnr_db(reference, measure.outputs(run, case.held_out)), seconds


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown: SQNR without an algorithm and with it."""
    heads = ["algorithm", "model", "setting", *_RANGES.values(), "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        pairs = [row.get(name) for name in _RANGES.values()]
        values = ["" if p is None else f"{p['plain dB']:.1f} to {p['with it dB']:.1f} dB" for p in pairs]
        cells = [f"`{row['algorithm']}`", row["model"], row["setting"], *values, f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
