"""Latency by interleaved rounds, SQNR, and the machine that both were measured on."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cases import Inputs, Run


@dataclass(frozen=True)
class Ratio:
    """The median of per-round ratios, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


def interleaved(runs: dict[str, Run], inputs: Inputs, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Latency in milliseconds: per name, one median a round.

    In every round each runner has one turn of about `seconds`, at least 3 inferences after one that is not counted.
    The order moves by one from round to round, so that no runner always follows the same other one.
    """
    arrays = [tensor.numpy() for tensor in inputs]
    names = list(runs)
    latencies: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            latencies[name].append(_turn(runs[name], arrays, seconds))
    return latencies


def _turn(run: Run, arrays: list[np.ndarray], seconds: float) -> float:
    run(*arrays)
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run(*arrays)
        samples.append(1e3 * (time.perf_counter() - start))
    return float(np.median(samples))


def ratio(latencies: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Round by round: how much time against the reference, below 1 is faster."""
    ratios = np.array(latencies) / np.array(reference)
    low, median, high = np.percentile(ratios, (10, 50, 90))
    return Ratio(float(median), float(low), float(high))


def outputs(run: Run, batches: list[Inputs]) -> list[list[np.ndarray]]:
    """The outputs for every batch."""
    return [run(*(tensor.numpy() for tensor in batch)) for batch in batches]


def sqnr_db(reference: list[list[np.ndarray]], other: list[list[np.ndarray]]) -> float:
    """10 log10(sum ref^2 / sum (out - ref)^2) over all outputs of all batches; inf where they are equal."""
    signal = noise = 0.0
    for ref_batch, out_batch in zip(reference, other, strict=True):
        for ref, out in zip(ref_batch, out_batch, strict=True):
            exact = ref.astype(np.float64)
            signal += float(np.square(exact).sum())
            noise += float(np.square(out.astype(np.float64) - exact).sum())
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def environment() -> str:
    """Date, processor, threads and versions: the line above every table."""
    import onnxruntime

    flags = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        flags = ", ".join(flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if flag in text)
    when = time.strftime("%Y-%m-%d")
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    machine = f"{platform.machine()} ({flags}), {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{when}, {machine}, {versions}"


def progress(text: str) -> None:
    """One line of progress, with the time, on standard error."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
