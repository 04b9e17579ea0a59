"""Latency: two models timed in turn, so that whatever else the machine does strikes both alike."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..progress import track
from .runtime import OnnxRuntimeRunner

WARM_UP = 3
ROUND_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Speed:
    """Latencies of a model, and of the one it is compared with, timed in turn.

    Attributes:
        path, against: the files; `against` is None without a comparison.
        median_ms, against_ms: median latency of one run, in milliseconds.
        ratio: median over the rounds of (time of `against` / time of `path`): above 1, `path` is faster.
        ratio_low, ratio_high: 10th and 90th percentile of that ratio.
        rounds: how many rounds were timed.
        batch_size: of dimension 0 of the first input.
        threads: threads of one operation; None is the runtime's choice.
    """

    path: str
    median_ms: float
    rounds: int
    batch_size: int
    threads: int | None
    against: str | None = None
    against_ms: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None

    def __str__(self) -> str:
        where = f"batch {self.batch_size}, {self.threads or 'default'} threads, {self.rounds} rounds"
        lines = [f"{Path(self.path).name}: {self.median_ms:.3f} ms ({where})"]
        if self.against is not None:
            lines.append(f"{Path(self.against).name}: {self.against_ms:.3f} ms")
            lines.append(
                f"speed-up: {self.ratio:.2f}x (10th to 90th percentile of rounds: {self.ratio_low:.2f} to "
                f"{self.ratio_high:.2f})"
            )
        return "\n".join(lines)


def measure(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None,
    inputs: Sequence[np.ndarray] | Mapping[str, np.ndarray] | None,
    batch_size: int,
    threads: int | None,
    rounds: int,
    progress: bool,
) -> Speed:
    """Times one or two ONNX files in ONNX Runtime; see `qdq.benchmark`."""
    for name, value in (("rounds", rounds), ("batch_size", batch_size), ("threads", 1 if threads is None else threads)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise DataError(f"{name} must be an integer of at least 1, not {value!r}")
    runners = [OnnxRuntimeRunner(p, threads) for p in (path, against) if p is not None]
    arrays = runners[0].random_inputs(batch_size) if inputs is None else _in_order(inputs, runners[0].input_names)
    repeats = []
    for runner in runners:
        if len(arrays) != len(runner.input_names):
            raise DataError(f"inputs holds {len(arrays)} arrays, the model takes {len(runner.input_names)}")
        for _ in range(WARM_UP):
            single = _time(runner, arrays, 1)
        repeats.append(max(1, round(ROUND_SECONDS / max(single, 1e-6))))
    times: list[list[float]] = [[] for _ in runners]
    for index in track(range(rounds), "timing", rounds, progress):
        # The order alternates: what runs second finds the caches that the first left.
        order = range(len(runners)) if index % 2 == 0 else reversed(range(len(runners)))
        for i in order:
            times[i].append(_time(runners[i], arrays, repeats[i]) * 1e3)
    size = int(arrays[0].shape[0]) if arrays[0].ndim else 1
    median = statistics.median(times[0])
    if against is None:
        return Speed(str(path), median, rounds, size, threads)
    ratios = np.array(times[1]) / np.array(times[0])
    low, middle, high = (float(v) for v in np.percentile(ratios, [10, 50, 90]))
    return Speed(str(path), median, rounds, size, threads, str(against), statistics.median(times[1]), middle, low, high)


def _in_order(inputs: Sequence[np.ndarray] | Mapping[str, np.ndarray], names: list[str]) -> list[np.ndarray]:
    if not isinstance(inputs, Mapping):
        return list(inputs)
    if set(inputs) != set(names):
        raise DataError(f"inputs are named {sorted(inputs)}, those of the model {names}")
    return [inputs[name] for name in names]


def _time(runner: OnnxRuntimeRunner, arrays: list[np.ndarray], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        runner(arrays)
    return (time.perf_counter() - start) / repeats
