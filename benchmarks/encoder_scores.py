"""What the scores of the sentence encoder can tell apart: why some toolkits score above the float model.

    python benchmarks/encoder_scores.py            # about half an hour
    python benchmarks/encoder_scores.py --no-reviews --draws 5

Rows: the float model with the GELU of its fourth layer cut off at a value, in float throughout; torchao's model; the
same with its activations cut off at its ranges but not rounded; ModelOpt's; NNCF's; qdq's default. Per score: the
value, the difference to the float model, and the interval that holds 95 % of the differences when documents (or pairs
of words) are drawn again, with replacement (Efron, 1979). Beside the two tasks of accuracy.py there are two on which
nothing was developed: SimLex-999, pairs of words like WordSim's, and sentiment, a logistic regression on vectors of the
float model, scored on the row's.

Then the float model with noise on its weights, as large an error of the outputs as the quantized models have and
another draw each time: how far a score moves by chance alone, and what share of the draws lies above each toolkit.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
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
from cases import Case, Run
from torch import nn

RESULTS = Path(__file__).parent / "results" / "encoder_scores.json"
LAYER = 3
TOPS = (8.0, 6.0, 4.0, 2.0)
DRAWS = 2000
TRAIN = TEST = 4000
# What the perturbed models are to have: about what qdq's and ModelOpt's have.
NOISE_DB = 23.0
SCORES = ("Lee50", "WordSim", "SimLex")
Model = Callable[..., Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-reviews", action="store_true", help="leave out sentiment, half of the time")
    parser.add_argument("--json", metavar="FILE", help="default results/encoder_scores.json; - writes none")
    parser.add_argument("--draws", type=int, default=30, help="of models with noise on their weights (default 30)")
    options = parser.parse_args(arguments)
    accuracy_peers.quiet()
    torch.set_num_threads(contenders.THREADS)
    environment = measure.environment()
    print(environment, flush=True)
    case = cases.build("minilm")
    scorer = _Scorer(case, None if options.no_reviews else reviews.archive())
    if scorer.head is None and not options.no_reviews:
        print("the reviews were not fetched (setup_env.sh FOLDER accuracy): no sentiment", file=sys.stderr)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in _rows(case, Path(folder)).items():
            measure.progress(name)
            rows[name] = scorer.score(make())
    print(_table(rows), flush=True)
    noise = _noise(case, scorer, options.draws)
    print(_noise_table(noise, rows))
    if options.json != "-":
        path = Path(options.json or RESULTS)
        report = {"environment": environment, "rows": rows, "noise": noise}
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _rows(case: Case, folder: Path) -> dict[str, Callable[[], Run]]:
    torchao, _ = accuracy_peers.by_torchao(case)
    return {
        "fp32": lambda: contenders.torch_run(case.model),
        **{
            f"fp32, cut off at {top:g}": lambda top=top: contenders.torch_run(_cut_off(case.model, top)) for top in TOPS
        },
        "torchao": lambda: contenders.torch_run(torchao),
        "torchao, cut off, not rounded": lambda: contenders.torch_run(_not_rounded(torchao)),
        "modelopt": lambda: contenders.torch_run(accuracy_peers.by_modelopt(case)[0]),
        "nncf": lambda: contenders.nncf_in_float32(case, contenders.export_fp32(case, folder / "f.onnx"), folder).run,
        "qdq": lambda: contenders.qdq_contender(case, folder / "qdq.onnx", {}).run,
    }


def _noise(case: Case, scorer: _Scorer, draws: int) -> dict[str, Any]:
    """Scores of models whose weights of linears have noise of their own sizes on them, one draw after the other."""
    share = 0.01
    share *= 10 ** ((scorer.sqnr_db(contenders.torch_run(_perturbed(case.model, share, 0))) - NOISE_DB) / 20)
    found: dict[str, Any] = {"share": share, "SQNR dB": [], **{name: [] for name in SCORES}}
    for seed in range(1, draws + 1):
        measure.progress(f"noise, draw {seed} of {draws}")
        run = contenders.torch_run(_perturbed(case.model, share, seed))
        found["SQNR dB"].append(scorer.sqnr_db(run))
        for name, (similar, rated) in scorer.similarities(run).items():
            found[name].append(_STATISTICS[name](similar, rated))
    return found


def _perturbed(model: nn.Module, share: float, seed: int) -> nn.Module:
    """A copy with normal noise on the weights of its linears, of so large a share of their root mean square."""
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.Linear):
                size = share * module.weight.square().mean().sqrt()
                module.weight += size * torch.randn(module.weight.shape, generator=generator)
    return made


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
        run = contenders.torch_run(case.model)
        self.reference = measure.outputs(run, case.held_out)
        self.similar = self.similarities(run)
        if archive is not None:
            texts, ratings = reviews.load(archive)
            order = np.random.default_rng(0).permutation(len(texts))
            self.texts = [texts[i] for i in order[-TEST:]]
            self.positive = ratings[order[-TEST:]] > 0
            vectors = self._vectors(run, [texts[i] for i in order[:TRAIN]])
            self.head = LogisticRegression(max_iter=2000, C=10).fit(vectors, ratings[order[:TRAIN]] > 0)
            self.right = self._right(run)

    def score(self, run: Run) -> dict[str, dict[str, float] | float]:
        """Value, difference and interval of each score, and SQNR in dB."""
        found: dict[str, Any] = {"SQNR dB": self.sqnr_db(run)}
        for name, (similar, rated) in self.similarities(run).items():
            found[name] = _compared(_STATISTICS[name], similar, self.similar[name][0], rated)
        if self.head is not None:
            found["sentiment %"] = _compared(_share, self._right(run), self.right, self.positive)
        return found

    def sqnr_db(self, run: Run) -> float:
        """Against the float model, on the held-out texts."""
        return measure.sqnr_db(self.reference, measure.outputs(run, self.case.held_out))

    def similarities(self, run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Cosine and human similarities of each task of `SCORES`."""
        encode = _encode(run)
        return {
            "Lee50": minilm.lee50_similarities(encode, self.tokenizer),
            "WordSim": minilm.word_similarities(encode, self.tokenizer, minilm.WORDSIM),
            "SimLex": minilm.word_similarities(encode, self.tokenizer, minilm.SIMLEX),
        }

    def _vectors(self, run: Run, texts: list[str]) -> np.ndarray:
        return minilm.embed(_encode(run), self.tokenizer, texts, batch=32)

    def _right(self, run: Run) -> np.ndarray:
        assert self.head is not None
        return self.head.predict(self._vectors(run, self.texts)) == self.positive


_STATISTICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "Lee50": minilm.pearson_of_pairs,
    "WordSim": minilm.spearman,
    "SimLex": minilm.spearman,
}


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


def _encode(run: Run) -> minilm.Encode:
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


def _noise_table(noise: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    given = [name for name in rows if not name.startswith("fp32") and "not rounded" not in name]
    lines = [f"{len(noise['SQNR dB'])} draws of noise, {np.mean(noise['SQNR dB']):.1f} dB:", ""]
    lines += [f"| | difference to fp32, mean | standard deviation | {' | '.join(f'above {n}' for n in given)} |"]
    lines += ["| --- | --- | --- |" + " --- |" * len(given)]
    for name in SCORES:
        differences = np.array(noise[name]) - rows["fp32"][name]["value"]
        above = [f"{100 * np.mean(differences > rows[row][name]['difference']):.0f} %" for row in given]
        lines.append(f"| {name} | {differences.mean():+.4f} | {differences.std(ddof=1):.4f} | {' | '.join(above)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
