"""The Pareto front of metric, size and latency."""

from __future__ import annotations

import math
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from qdq.recipe import Recipe
from qdq.recovery.result import Rung, pareto_front

RECIPE = Recipe()
VALUES = st.none() | st.integers(0, 3)
RUNGS = st.lists(
    st.builds(
        lambda metric, size, ratio: Rung("r", RECIPE, metric, size, ratio, error=None if metric is not None else "E"),
        VALUES.map(lambda v: None if v is None else float(v)),
        VALUES,
        VALUES.map(lambda v: None if v is None else float(v)),
    ),
    max_size=7,
)


def costs(rung: Rung) -> tuple[float, float, float]:
    assert rung.metric is not None
    sizes = [math.inf if v is None else v for v in (rung.size, rung.latency_ratio)]
    return -rung.metric, sizes[0], sizes[1]


def dominates(one: Rung, other: Rung) -> bool:
    a, b = costs(one), costs(other)
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


@given(RUNGS)
def test_the_front_is_what_nothing_dominates(rungs: list[Rung]) -> None:
    front = pareto_front(rungs)
    measured = [rung for rung in rungs if rung.metric is not None]
    assert all(any(rung is other for other in measured) for rung in front)
    assert not any(dominates(a, b) for a, b in product(measured, front))
    # Whatever is left out is dominated by, or equal to, one on the front.
    for rung in measured:
        assert any(costs(rung) == costs(other) or dominates(other, rung) for other in front)
    assert len({costs(rung) for rung in front}) == len(front)
    positions = [next(i for i, r in enumerate(rungs) if r is rung) for rung in front]
    assert positions == sorted(positions)
    # Of equal ones the first.
    for rung in front:
        assert next(r for r in measured if costs(r) == costs(rung)) is rung
