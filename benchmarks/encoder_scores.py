"""What the scores of the sentence encoder can tell apart: why some toolkits score above the float model.

    python benchmarks/encoder_scores.py            # an hour
    python benchmarks/encoder_scores.py --no-reviews --draws 5 --subsets 1

Rows: the float model with the GELU of its fourth layer cut off at a value, in float throughout; torchao's model, and
the same with its activations cut off at its ranges but not rounded; ModelOpt's, and parts of what it changes: its
activations quantized alone, its activations cut off alone (weights in float), its weights quantized alone; NNCF's;
qdq's default. Per score, means over calibration subsets: the value, the difference to the float model, and the interval
that holds 95 % of the differences when documents (or pairs of words) are drawn again, with replacement (Efron, 1979).
Beside the two tasks of accuracy.py there are two on which nothing was developed: SimLex-999, pairs of words like
WordSim's, and sentiment, a logistic regression on vectors of the float model, scored on the row's.

Then draws by chance, one after the other, and what share of them lies above each toolkit: the float model with noise on
its weights, as large an error of the outputs as the quantized models have; and ModelOpt's models with the same errors
of rounding of its weights but for their signs, each compared with the toolkits' scores on the subset that it is of.
`--redraw` makes the latter anew, and keeps all else that the JSON file has.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accuracy_peers
import cases
import contenders
import measure
import minilm
import modelopt_ablation
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
# Name of a score (or "SQNR dB") -> its value in each draw.
Draws = dict[str, list[float]]
# Name of a score -> what it is computed from, and what it is compared with; "SQNR dB" -> a number.
Seen = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-reviews", action="store_true", help="leave out sentiment, half of the time")
    parser.add_argument("--json", metavar="FILE", help="default results/encoder_scores.json; - writes none")
    parser.add_argument("--subsets", type=int, default=3, help="of the calibration data (default 3)")
    parser.add_argument("--draws", type=int, default=30, help="of models with noise on their weights (default 30)")
    parser.add_argument("--redraw", action="store_true", help="draws of ModelOpt's models alone")
    options = parser.parse_args(arguments)
    accuracy_peers.quiet()
    torch.set_num_threads(contenders.THREADS)
    environment = measure.environment()
    print(environment, flush=True)
    path = RESULTS if options.json in (None, "-") else Path(options.json)
    subsets = [cases.build("minilm", subset=subset) for subset in range(options.subsets)]
    scorer = _Scorer(subsets[0], None if options.no_reviews or options.redraw else reviews.archive())
    if options.redraw:
        report = json.loads(path.read_text(encoding="utf-8"))
        known = len(report["rows"]["qdq"]["Lee50"]["subsets"])
        if known != len(subsets):
            parser.error(f"{path} has {known} subsets: give --subsets {known}")
    else:
        if scorer.head is None and not options.no_reviews:
            print("the reviews were not fetched (setup_env.sh FOLDER accuracy): no sentiment", file=sys.stderr)
        noise = [_noise(subsets[0], scorer, options.draws)]
        report = {"environment": environment, "rows": _rows(subsets, scorer), "draws": {"the float model": noise}}
    count = max(2, math.ceil(options.draws / len(subsets)))
    report["draws"]["ModelOpt's models"] = [_redrawn(case, scorer, count, i) for i, case in enumerate(subsets)]
    print(_table(report["rows"]), flush=True)
    for name, draws in report["draws"].items():
        print("\n" + _draws_table(name, draws, report["rows"]))
    if options.json != "-":
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _rows(subsets: list[Case], scorer: _Scorer) -> dict[str, dict[str, Any]]:
    seen: dict[str, list[Seen]] = {}
    for name, run in _float_runs(subsets[0]):
        measure.progress(name)
        seen[name] = [scorer.see(run)]
    for subset, case in enumerate(subsets):
        with tempfile.TemporaryDirectory() as folder:
            for name, run in _quantized_runs(case, Path(folder)):
                measure.progress(f"subset {subset}: {name}")
                seen.setdefault(name, []).append(scorer.see(run))
    return {name: scorer.compared(found) for name, found in seen.items()}


def _float_runs(case: Case) -> Iterator[tuple[str, Run]]:
    yield "fp32", contenders.torch_run(case.model)
    for top in TOPS:
        yield f"fp32, cut off at {top:g}", contenders.torch_run(_cut_off(case.model, top))


def _quantized_runs(case: Case, folder: Path) -> Iterator[tuple[str, Run]]:
    torchao, _ = accuracy_peers.by_torchao(case)
    yield "torchao", contenders.torch_run(torchao)
    yield "torchao, cut off, not rounded", contenders.torch_run(_not_rounded(torchao))
    modelopt, _ = accuracy_peers.by_modelopt(case)
    yield "modelopt", contenders.torch_run(modelopt)
    with modelopt_ablation.weights_in_float(modelopt):
        yield "modelopt, activations quantized alone", contenders.torch_run(modelopt)
        with modelopt_ablation.activations(modelopt, cut_off=True):
            yield "modelopt, activations cut off alone", contenders.torch_run(modelopt)
    with modelopt_ablation.activations(modelopt, cut_off=False):
        yield "modelopt, weights quantized alone", contenders.torch_run(modelopt)
    nncf = contenders.nncf_in_float32(case, contenders.export_fp32(case, folder / "f.onnx"), folder)
    yield "nncf", nncf.run
    yield "qdq", contenders.qdq_contender(case, folder / "qdq.onnx", {}).run


def _noise(case: Case, scorer: _Scorer, draws: int) -> Draws:
    """Scores of models whose weights of linears have noise of their own sizes on them, one draw after the other."""
    share = 0.01
    share *= 10 ** ((scorer.sqnr_db(contenders.torch_run(_perturbed(case.model, share, 0))) - NOISE_DB) / 20)
    found: Draws = {}
    for seed in range(1, draws + 1):
        measure.progress(f"noise, draw {seed} of {draws}")
        _append(found, scorer.values(contenders.torch_run(_perturbed(case.model, share, seed))))
    return found


def _redrawn(case: Case, scorer: _Scorer, draws: int, subset: int) -> Draws:
    """Scores of ModelOpt's model with other signs of its weights' errors of rounding, one draw after the other."""
    modelopt, _ = accuracy_peers.by_modelopt(case)
    found: Draws = {}
    for draw in range(draws):
        measure.progress(f"subset {subset}: ModelOpt's, other signs, draw {draw + 1} of {draws}")
        with modelopt_ablation.other_signs(modelopt, seed=subset * draws + draw):
            _append(found, scorer.values(contenders.torch_run(modelopt)))
    return found


def _append(found: Draws, more: Draws) -> None:
    for name, values in more.items():
        found.setdefault(name, []).extend(values)


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

    def see(self, run: Run) -> Seen:
        """SQNR in dB, and of each score what it is computed from."""
        found: Seen = {"SQNR dB": self.sqnr_db(run)}
        found |= {name: similar for name, (similar, _) in self.similarities(run).items()}
        if self.head is not None:
            found["sentiment %"] = self._right(run)
        return found

    def compared(self, seen: list[Seen]) -> dict[str, Any]:
        """Means over subsets: value, difference and interval of each score, and SQNR in dB; the values by subset."""
        found: dict[str, Any] = {"SQNR dB": float(np.mean([one["SQNR dB"] for one in seen]))}
        for name, (in_float, rated) in self.similar.items():
            found[name] = _compared(_STATISTICS[name], [one[name] for one in seen], in_float, rated)
        if self.head is not None:
            found["sentiment %"] = _compared(_share, [one["sentiment %"] for one in seen], self.right, self.positive)
        return found

    def values(self, run: Run) -> Draws:
        """SQNR in dB and the value of each score but sentiment, lists of one."""
        found = {"SQNR dB": [self.sqnr_db(run)]}
        for name, (similar, rated) in self.similarities(run).items():
            found[name] = [_STATISTICS[name](similar, rated)]
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
    statistic: Callable[[np.ndarray, np.ndarray], float],
    subsets: list[np.ndarray],
    in_float: np.ndarray,
    rated: np.ndarray,
) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    differences = []
    for _ in range(DRAWS):
        drawn = generator.integers(0, len(rated), len(rated))
        values = [_on(statistic, drawn, values, rated) for values in subsets]
        differences.append(np.mean(values) - _on(statistic, drawn, in_float, rated))
    low, high = np.percentile(differences, [2.5, 97.5])
    values = [statistic(values, rated) for values in subsets]
    mean = float(np.mean(values))
    difference = mean - statistic(in_float, rated)
    return {"value": mean, "difference": difference, "low": float(low), "high": float(high), "subsets": values}


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


def _draws_table(model: str, draws: list[Draws], rows: dict[str, dict[str, Any]]) -> str:
    """`draws`: one set that is compared with every subset's scores of a toolkit, or one for each subset."""
    given = [name for name in rows if not name.startswith("fp32") and "," not in name]
    count, decibels = sum(len(part["SQNR dB"]) for part in draws), np.mean([part["SQNR dB"] for part in draws])
    lines = [f"{count} draws of {model}, {decibels:.1f} dB:", ""]
    lines += [f"| | difference to fp32, mean | standard deviation | {' | '.join(f'above {n}' for n in given)} |"]
    lines += ["| --- | --- | --- |" + " --- |" * len(given)]
    for name in SCORES:
        values = np.array([part[name] for part in draws])
        deviation = np.sqrt(np.mean(values.var(1, ddof=1)))  # within subsets
        above = [np.mean(values > np.array(rows[row][name]["subsets"])[:, None]) for row in given]
        shares = " | ".join(f"{100 * share:.0f} %" for share in above)
        lines.append(f"| {name} | {values.mean() - rows['fp32'][name]['value']:+.4f} | {deviation:.4f} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
