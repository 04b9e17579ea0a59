"""The bars that qdq's file is held to, each a line PASS or FAIL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from measure import Ratio

MAX_RATIO = 1.05
MIN_SIMULATION_SQNR_DB = 40.0
# Scores as deployed: name of the case -> name of the score -> the least that is asked, or the most that may be lost.
MIN_SCORE = {"minilm": {"Lee50 Pearson": 0.64, "WordSim Spearman": 0.71}}
MAX_LOSS = {"s1": 0.1}
MIN_SQNR_DB = {"s1": 35.0}
# Peers that quantize the same operations: the speed and SQNR of a transformer are compared with these.
PEER = {"cnn": "static", "transformer": "static matmul"}


@dataclass
class Result:
    """What was measured of one contender on one model."""

    name: str
    latency_ms: float = 0.0
    against_fp32: Ratio | None = None
    against_static: Ratio | None = None
    file_bytes: int = 0
    sqnr_db: float = 0.0
    build_seconds: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Bar:
    """One requirement: what was asked, what was seen."""

    text: str
    passed: bool

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.text}"


def check(case: str, kind: str, results: dict[str, Result], additions: int, convolutions: int) -> list[Bar]:
    """The bars of one model; those whose peer did not run are left out."""
    ours, fp32 = results.get("qdq"), results.get("fp32")
    if ours is None or fp32 is None or ours.error or fp32.error:
        return [Bar("qdq ran", False)] if ours is not None else []
    bars = [
        Bar(f"file {ours.file_bytes / fp32.file_bytes:.2f} of fp32 (<= 0.5)", ours.file_bytes <= fp32.file_bytes / 2)
    ]
    peer = results.get(PEER[kind])
    if peer is not None and not peer.error:
        bars.append(Bar(f"SQNR {ours.sqnr_db:.2f} dB, {peer.name} {peer.sqnr_db:.2f} dB", ours.sqnr_db >= peer.sqnr_db))
        if ours.against_static is not None:
            text = f"latency {ours.against_static} of {peer.name} (<= {MAX_RATIO})"
            bars.append(Bar(text, ours.against_static.median <= MAX_RATIO))
    if kind == "cnn":
        bars += _integer_graph(ours.operations, additions, convolutions)
    # Transformers hold float operations between the integer ones, whose rounding differs: reported, not barred.
    if kind == "cnn" and "sqnr_simulation" in ours.extra:
        seen = float(ours.extra["sqnr_simulation"])
        bars.append(Bar(f"simulation against runtime {seen:.1f} dB (> 40)", seen > MIN_SIMULATION_SQNR_DB))
    return bars + _scores(case, ours, fp32)


def _integer_graph(counts: dict[str, int], additions: int, convolutions: int) -> list[Bar]:
    floats = counts.get("Conv", 0) + counts.get("FusedConv", 0) + counts.get("ConvInteger", 0)
    integer = counts.get("QLinearConv", 0)
    bars = [Bar(f"QLinearConv {integer} of {convolutions}, float {floats}", floats == 0 and integer >= convolutions)]
    if additions:
        seen = counts.get("QLinearAdd", 0)
        bars.append(Bar(f"QLinearAdd {seen} of {additions} residual additions", seen >= additions))
    return bars


def _scores(case: str, ours: Result, fp32: Result) -> list[Bar]:
    bars = []
    for score, least in MIN_SCORE.get(case, {}).items():
        if score in ours.scores:
            bars.append(Bar(f"{score} {ours.scores[score]:.3f} (>= {least})", ours.scores[score] >= least))
    if case in MIN_SQNR_DB:
        bars.append(Bar(f"SQNR {ours.sqnr_db:.2f} dB (>= {MIN_SQNR_DB[case]})", ours.sqnr_db >= MIN_SQNR_DB[case]))
    if case in MAX_LOSS:
        for score, value in ours.scores.items():
            loss = fp32.scores[score] - value
            # Scores are multiples of 0.01: the small term forgives only the binary representation.
            bars.append(Bar(f"{score} loses {loss:.2f} (<= {MAX_LOSS[case]})", loss <= MAX_LOSS[case] + 1e-9))
    return bars
