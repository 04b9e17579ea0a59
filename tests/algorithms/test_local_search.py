"""The local search: an error that neither one turn nor two at once can lower."""

from __future__ import annotations

import itertools

import pytest
import torch

from algorithms.layer_cases import layer_model, quantized
from qdq.algorithms.local_search import local_search
from qdq.algorithms.output_error import OutputError
from qdq.algorithms.rounding import step_rows
from qdq.algorithms.walk import LayerVisit, TensorVisit, Walk


class _Search:
    visited = 0

    def visit_tensor(self, visit: TensorVisit) -> None:
        pass

    def visit_layer(self, visit: LayerVisit) -> None:
        self.visited += 1
        error = OutputError(visit)
        step = step_rows(visit, error)
        below = (error.rows / step).floor()
        nearest = torch.round(error.rows / step)
        other = 2 * below + 1 - nearest
        other[..., 0] = nearest[..., 0]  # no choice
        found = local_search(error, nearest, other, step)
        assert bool(((found == nearest) | (found == other)).all()) and torch.equal(found[..., 0], nearest[..., 0])
        start, least = error.of(nearest * step), error.of(found * step)
        assert float(least.sum()) < 0.8 * float(start.sum()) and bool((least <= start * 1.001).all())
        turned = nearest + other - found
        for places in itertools.chain.from_iterable(itertools.combinations(range(error.width), n) for n in (1, 2)):
            tried = found.clone()
            tried[..., list(places)] = turned[..., list(places)]
            assert bool((error.of(tried * step) >= least * 0.999 - 1e-3).all())


@pytest.mark.parametrize("name", ["conv1d", "grouped", "depthwise", "transposed 2d"])
def test_no_turn_and_no_two_turns_gain(name: str) -> None:
    model, batches = layer_model(name)
    search = _Search()
    Walk(quantized(model, batches, bits=3), [[x] for x in batches]).run([search], progress=False)
    assert search.visited == 1
