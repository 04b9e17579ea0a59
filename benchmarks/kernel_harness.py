"""Times of calls whose contenders take turns, with their data in the processor's caches or out of them."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdq.kernels import engine

_UNKNOWN_CACHE = 64 << 20
_MOST_CALLS = 5000
_PROBE = torch.empty(0)


@dataclass(frozen=True)
class Contender:
    """One way to do the same thing.

    `role` says what it is compared as: "ours", "reference" (ours on the reference engine), "formula", "torch", "floor",
    "compiled" or "other". `engine` is forced while it runs; None leaves the choice to qdq.
    """

    label: str
    role: str
    run: Callable[[], Any]
    engine: str | None = None


@dataclass(frozen=True)
class Plan:
    """How long to measure: `seconds` in all, but at least and at most so many rounds.

    A sample is one call, or, while the data stay in the cache, as many calls as last `sample_seconds`.
    """

    seconds: float
    least_rounds: int
    most_rounds: int
    sample_seconds: float = 1e-3


@dataclass(frozen=True)
class Measured:
    """Milliseconds per call, one sample a round; and, by label, why a contender could not run."""

    samples: dict[str, np.ndarray]
    calls: dict[str, int]
    skipped: dict[str, str]


class CacheWalk:
    """Reads and writes a buffer of twice the last-level cache, so that nothing else stays in it."""

    def __init__(self, device: str = "cpu") -> None:
        size = max(_UNKNOWN_CACHE, 2 * last_level_cache()) if device == "cpu" else 256 << 20
        self._buffer = torch.zeros(size // 4, dtype=torch.float32, device=device)

    def __call__(self) -> None:
        self._buffer.add_(1.0)


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor; 0 where the system does not tell."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text(encoding="ascii").strip()
            unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1)
            sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes)


def measure(
    contenders: Sequence[Contender], plan: Plan, walk: CacheWalk | None = None, device: str = "cpu"
) -> Measured:
    """Rounds in which every contender has one turn, in random order.

    With `walk` each call finds its data out of the cache; the walk is not timed. Without, one call that is not timed
    goes before each sample. Engines are switched outside of what is timed.
    """
    clock = _on_cuda if device.startswith("cuda") else _on_cpu
    once, skipped = {}, {}
    for contender in contenders:
        try:
            once[contender.label] = _first(contender, clock)
        except Exception as error:  # a peer may not know a dtype or not compile; the others go on
            skipped[contender.label] = describe(error)
    ready = [contender for contender in contenders if contender.label in once]
    calls = {label: _calls(seconds, plan, walk) for label, seconds in once.items()}
    round_seconds = sum(once[label] * (calls[label] + (walk is None)) for label in once)
    if walk is not None:
        walk()
        round_seconds += len(ready) * clock(walk, 1)
    rounds = min(plan.most_rounds, max(plan.least_rounds, math.ceil(plan.seconds / max(round_seconds, 1e-9))))
    samples: dict[str, list[float]] = {contender.label: [] for contender in ready}
    shuffle = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for contender in shuffle.sample(ready, len(ready)):
                with _forced(contender.engine):
                    (contender.run if walk is None else walk)()
                    seconds = clock(contender.run, calls[contender.label])
                samples[contender.label].append(1e3 * seconds / calls[contender.label])
    finally:
        gc.enable()
    return Measured({label: np.array(values) for label, values in samples.items()}, calls, skipped)


def describe(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]


def _first(contender: Contender, clock: Callable[[Callable[[], Any], int], float]) -> float:
    """Seconds of a call once it is warm."""
    with _forced(contender.engine):
        contender.run()
        return min(clock(contender.run, 1) for _ in range(3))


def _calls(seconds: float, plan: Plan, walk: CacheWalk | None) -> int:
    return 1 if walk is not None else max(1, min(_MOST_CALLS, math.ceil(plan.sample_seconds / max(seconds, 1e-7))))


def _forced(name: str | None) -> contextlib.AbstractContextManager[Any]:
    if name is not None:
        return engine.forced(name)
    engine.for_tensor(_PROBE)  # the first call after a forced engine decides anew, which is not to be timed
    return contextlib.nullcontext()


def _on_cpu(run: Callable[[], Any], calls: int) -> float:
    if calls == 1:
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        del result  # what it frees is not timed, as little as the loop below can help it
        return seconds
    steps = range(calls)
    start = time.perf_counter()
    for _ in steps:
        run()
    return time.perf_counter() - start


def _on_cuda(run: Callable[[], Any], calls: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3
