"""`Recovery`: what `qdq.recover` tried, what it measured, and the best of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from ..recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Rung:
    """One recipe of the ladder, and what was measured with it.

    Attributes:
        name: what was changed.
        recipe: the whole recipe.
        metric: the user's, of the simulation; None where the rung failed.
        size: bytes of the exported file; None where the rung failed or the extra `onnx` is not installed.
        latency_ratio: latency of the file over that of the float model's file, timed in turn in the target's runtime:
            below 1 it is faster. None where it was not measured.
        seconds: to quantize, evaluate, export and time.
        error: why it failed, None where it did not.
    """

    name: str
    recipe: Recipe
    metric: float | None = None
    size: int | None = None
    latency_ratio: float | None = None
    seconds: float = 0.0
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON takes it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "recipe": self.recipe.to_dict()}


@dataclasses.dataclass(frozen=True, eq=False)
class Recovery:
    """The result of `qdq.recover`; printing it gives a table of the path.

    Attributes:
        model: the best one, as `qdq.quantize` returns it: that of the largest metric, of equal ones the first.
        recipe: makes the model again: `qdq.quantize(float_model, batches, recipe=recipe)` on the same batches.
        reached: whether `metric >= goal`.
        baseline: the metric of the float model.
        goal: target times baseline.
        metric: of `model`.
        rungs: all that was tried, in order.
        front: those rungs of which no other is at least as good in metric, size and latency and better in one.
        float_size: bytes of the float model's file; None without the extra `onnx`.
    """

    model: fx.GraphModule
    recipe: Recipe
    reached: bool
    baseline: float
    goal: float
    metric: float
    rungs: tuple[Rung, ...]
    front: tuple[Rung, ...]
    float_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """All but the model, as plain data; `front` holds the names of its rungs."""
        return {
            "reached": self.reached,
            "baseline": self.baseline,
            "goal": self.goal,
            "metric": self.metric,
            "float_size": self.float_size,
            "recipe": self.recipe.to_dict(),
            "rungs": [rung.to_dict() for rung in self.rungs],
            "front": [rung.name for rung in self.front],
        }

    def __str__(self) -> str:
        rows = [("", "rung", "metric", "of float", "size", "latency", "seconds")]
        rows.append(("", "float model", f"{self.baseline:.6g}", "100.00 %", _size(self.float_size), "1.00x", ""))
        for rung in self.rungs:
            mark = "*" if rung in self.front else ""
            if rung.metric is None:
                rows.append((mark, rung.name, "failed", "", "", "", f"{rung.seconds:.1f}"))
                continue
            share = f"{100 * rung.metric / self.baseline:.2f} %"
            latency = "-" if rung.latency_ratio is None else f"{rung.latency_ratio:.2f}x"
            rows.append(
                (mark, rung.name, f"{rung.metric:.6g}", share, _size(rung.size), latency, f"{rung.seconds:.1f}")
            )
        widths = [max(len(row[i]) for row in rows) for i in range(7)]
        lines = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        lines += [f"{rung.name} failed: {rung.error}" for rung in self.rungs if rung.error is not None]
        told = "reached" if self.reached else "not reached"
        lines.append(f"goal {self.goal:.6g} {told}: {self.metric:.6g}; * = on the front of metric, size and latency")
        return "\n".join(line.rstrip() for line in lines)


def pareto_front(rungs: Sequence[Rung]) -> tuple[Rung, ...]:
    """The rungs that no other dominates: as good in metric, size and latency, and better in one of them.

    A value that was not measured counts as the worst. Of rungs that are equal in all, the first stays.
    """
    measured = [rung for rung in rungs if rung.metric is not None]
    costs = [_costs(rung) for rung in measured]

    def dominated(i: int) -> bool:
        return any(
            all(a <= b for a, b in zip(costs[j], costs[i], strict=True)) and (costs[j] != costs[i] or j < i)
            for j in range(len(measured))
            if j != i
        )

    return tuple(rung for i, rung in enumerate(measured) if not dominated(i))


def _costs(rung: Rung) -> tuple[float, float, float]:
    assert rung.metric is not None
    size = math.inf if rung.size is None else rung.size
    return -rung.metric, size, math.inf if rung.latency_ratio is None else rung.latency_ratio


def _size(size: int | None) -> str:
    return "-" if size is None else f"{size / 1024:.1f} KiB"
