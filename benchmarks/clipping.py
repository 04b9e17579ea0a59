"""What cutting off large activations does to the scores of the sentence encoder, without any rounding.

    python benchmarks/clipping.py            # about ten minutes
    python benchmarks/clipping.py --no-reviews

Some toolkits score above the float model on its two similarity tasks. The rows show why: the float model with the
GELU of its fourth layer cut off at a value, in float throughout; torchao's model; the same with its activations cut
off at its ranges but not rounded; qdq's default. Per score: the value, the difference to the float model, and the
interval that holds 95 % of the differences when documents (or pairs of words) are drawn again, with replacement
(Efron, 1979). The third task is sentiment: a logistic regression on vectors of the float model, scored on the row's.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accuracy_peers
import cases
import contenders
import measure
import minilm
import numpy as np
import reviews
import torch
from cases import Case
from torch import nn

RESULTS = Path(__file__).parent / "results" / "clipping.json"
LAYER = 3
TOPS = (8.0, 6.0, 4.0, 2.0)
DRAWS = 2000
TRAIN = TEST = 4000
Model = Callable[..., Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-reviews", action="store_true", help="leave out the third task, most of the time")
    parser.add_argument("--json", metavar="FILE", help="default results/clipping.json; - writes none")
    options = parser.parse_args(arguments)
    accuracy_peers.quiet()
    torch.set_num_threads(contenders.THREADS)
    environment = measure.environment()
    print(environment, flush=True)
    case = cases.build("minilm")
    scorer = _Scorer(case, None if options.no_reviews else reviews.archive())
    if scorer.head is None and not options.no_reviews:
        print("the reviews were not fetched (setup_env.sh FOLDER accuracy): two tasks only", file=sys.stderr)
    rows = {name: scorer.score(make()) for name, make in _rows(case).items()}
    print(_table(rows))
    if options.json != "-":
        path = Path(options.json or RESULTS)
        path.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def _rows(case: Case) -> dict[str, Callable[[], Model]]:
    import qdq

    torchao, _ = accuracy_peers.by_torchao(case)
    shapes = contenders.shapes(case)
    return {
        "fp32": lambda: case.model,
        **{f"fp32, cut off at {top:g}": lambda top=top: _cut_off(case.model, top) for top in TOPS},
        "torchao": lambda: torchao,
        "torchao, cut off, not rounded": lambda: _not_rounded(torchao),
        "qdq": lambda: qdq.quantize(case.model, case.calibration, dynamic_shapes=shapes, progress=False),
    }


def _cut_off(model: nn.Module, top: float) -> nn.Module:
    """A copy whose GELU of layer `LAYER` gives no more than `top`."""
    made: Any = copy.deepcopy(model)
    made.bert.encoder.layer[LAYER].intermediate.register_forward_hook(lambda _m, _i, out: out.clamp(max=top))
    return made


def _not_rounded(model: Model) -> Model:
    """A copy of torchao's model with a clamp to the quantizer's range in place of each pair of Q and DQ."""
    made: Any = copy.deepcopy(model)
    target = "quantized_decomposed.quantize_per_tensor"
    for node in [n for n in made.graph.nodes if str(n.target).startswith(target)]:
        tensor, scale, zero, low, high = node.args[:5]
        with made.graph.inserting_before(node):
            clamped = made.graph.call_function(torch.clamp, (tensor, (low - zero) * scale, (high - zero) * scale))
        for reader in list(node.users):
            reader.replace_all_uses_with(clamped)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


class _Scorer:
    """Scores beside the float model's."""

    def __init__(self, case: Case, archive: Path | None) -> None:
        from sklearn.linear_model import LogisticRegression

        self.case = case
        self.tokenizer = minilm.load()[1]
        self.head = None
        encode = _encode(case.model)
        self.reference = measure.outputs(contenders.torch_run(case.model), case.held_out)
        self.similar = self._similar(encode)
        if archive is not None:
            texts, ratings = reviews.load(archive)
            order = np.random.default_rng(0).permutation(len(texts))
            self.texts = [texts[i] for i in order[-TEST:]]
            self.positive = ratings[order[-TEST:]] > 0
            vectors = self._vectors(encode, [texts[i] for i in order[:TRAIN]])
            self.head = LogisticRegression(max_iter=2000, C=10).fit(vectors, ratings[order[:TRAIN]] > 0)
            self.right = self._right(encode)

    def score(self, model: Model) -> dict[str, dict[str, float] | float]:
        """Value, difference and interval of each score, and SQNR in dB."""
        encode = _encode(model)
        found: dict[str, Any] = {
            "SQNR dB": measure.sqnr_db(self.reference, measure.outputs(contenders.torch_run(model), self.case.held_out))
        }
        for name, (similar, rated) in self._similar(encode).items():
            statistic = minilm.pearson_of_pairs if name == "Lee50" else minilm.spearman
            found[name] = _compared(statistic, similar, self.similar[name][0], rated)
        if self.head is not None:
            found["sentiment %"] = _compared(_share, self._right(encode), self.right, self.positive)
        return found

    def _similar(self, encode: minilm.Encode) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {
            "Lee50": minilm.lee50_similarities(encode, self.tokenizer),
            "WordSim": minilm.wordsim_similarities(encode, self.tokenizer),
        }

    def _vectors(self, encode: minilm.Encode, texts: list[str]) -> np.ndarray:
        return minilm.embed(encode, self.tokenizer, texts, batch=32)

    def _right(self, encode: minilm.Encode) -> np.ndarray:
        assert self.head is not None
        return self.head.predict(self._vectors(encode, self.texts)) == self.positive


def _compared(
    statistic: Callable[[np.ndarray, np.ndarray], float], values: np.ndarray, in_float: np.ndarray, rated: np.ndarray
) -> dict[str, float]:
    generator = np.random.default_rng(0)
    differences = []
    for _ in range(DRAWS):
        drawn = generator.integers(0, len(rated), len(rated))
        differences.append(_on(statistic, drawn, values, rated) - _on(statistic, drawn, in_float, rated))
    low, high = np.percentile(differences, [2.5, 97.5])
    value = statistic(values, rated)
    return {"value": value, "difference": value - statistic(in_float, rated), "low": float(low), "high": float(high)}


def _on(statistic: Callable[..., float], drawn: np.ndarray, values: np.ndarray, rated: np.ndarray) -> float:
    if values.ndim == 1:
        return statistic(values[drawn], rated[drawn])
    # A document drawn twice would be a pair with itself.
    square = np.ix_(drawn, drawn)
    return statistic(values[square], rated[square], drawn[:, None] != drawn[None])


def _share(right: np.ndarray, _rated: np.ndarray) -> float:
    return 100 * float(right.mean())


def _encode(model: Model) -> minilm.Encode:
    run = contenders.torch_run(model)
    return lambda ids, mask: run(ids, mask)[0]


def _table(rows: dict[str, dict[str, Any]]) -> str:
    names = [name for name in next(iter(rows.values())) if name != "SQNR dB"]
    lines = ["| | SQNR dB | " + " | ".join(names) + " |", "| --- | --- |" + " --- |" * len(names)]
    for row, found in rows.items():
        cells = []
        for name in names:
            score = found[name]
            digits = 2 if name.endswith("%") else 4
            difference = f"{score['difference']:+.{digits}f} ({score['low']:+.{digits}f}..{score['high']:+.{digits}f})"
            cells.append(f"{score['value']:.{digits}f}" + ("" if row == "fp32" else f", {difference}"))
        lines.append(f"| {row} | {found['SQNR dB']:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
