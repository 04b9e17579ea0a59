"""A layer as matrix products, and the error of its output as a function of the weight."""

from __future__ import annotations

import pytest
import torch

from algorithms.layer_cases import LAYERS, channel_errors, layer_model, quantized, randn
from qdq.algorithms.layer_matrix import LayerMatrix
from qdq.algorithms.output_error import OutputError
from qdq.algorithms.rounding import limit_rows
from qdq.algorithms.walk import LayerVisit, TensorVisit, Walk


class _Checks:
    def __init__(self) -> None:
        self.visited = 0

    def visit_tensor(self, visit: TensorVisit) -> None:
        pass

    def visit_layer(self, visit: LayerVisit) -> None:
        self.visited += 1
        x, weight = visit.inputs[0], visit.weight
        result = visit.layer.run(x, weight, None)
        matrix = LayerMatrix(visit.layer, weight)
        rows = matrix.rows(weight)
        assert torch.equal(matrix.weight(rows), weight)
        count = matrix.positions(x)
        assert count * rows.shape[0] * rows.shape[1] == result.numel()
        some = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: count // 2]
        product = matrix.patches(x, some) @ rows.transpose(1, 2)
        torch.testing.assert_close(product, matrix.results(result, some), rtol=1e-4, atol=1e-4)

        error = OutputError(visit)
        stored = matrix.rows(visit.layer.quantizer(weight))
        torch.testing.assert_close(error.of(stored).flatten().double(), channel_errors(visit), rtol=1e-3, atol=1e-3)
        assert error.count == sum(matrix.positions(x) for x in visit.inputs)
        drawn = OutputError(visit, positions=error.count // 2)
        assert error.count // 2 <= drawn.count < error.count
        few = OutputError(visit, positions=2)  # keeps patches, not their sums
        summed = few.curvature(rows)
        torch.testing.assert_close(summed, rows @ few.hessian, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_products_give_what_the_layer_gives(name: str) -> None:
    model, batches = layer_model(name)
    checks = _Checks()
    Walk(quantized(model, batches), [[x] for x in batches]).run([checks], progress=False)
    assert checks.visited == 1


@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped", "conv1d"])
def test_whatever_lies_within_the_limits_is_stored_as_it_is(name: str) -> None:
    model, batches = layer_model(name)
    qmodel = quantized(model, batches, bits=8, reduce_range=True)

    class Draws(_Checks):
        def visit_layer(self, visit: LayerVisit) -> None:
            self.visited += 1
            quantizer, weight = visit.layer.quantizer, visit.weight
            assert quantizer.pairs_axis is not None
            quantizer.step_size.mul_(0.7)  # so that more pairs come near the limit
            error = OutputError(visit)
            least, most = limit_rows(visit, error)
            nearest = torch.round(error.matrix.rows(weight / quantizer.step_for(weight)))
            # What quantization makes of the weight lies within them, but for rounding of what a pair shares.
            stored = error.matrix.rows(quantizer.codes(weight).float())
            assert bool((stored >= least - 1).all() and (stored <= most + 1).all())
            assert bool((nearest > most).any() or (nearest < least).any())
            extremes = [least, most, torch.where(nearest > 0, most, least)]
            for seed in range(20):
                share = randn(*least.shape, seed=seed).sigmoid()
                extremes.append(torch.round(least + share * (most - least)))
            for codes in extremes:
                asked = error.matrix.weight(codes)
                assert torch.equal(quantizer.codes(asked * quantizer.step_for(weight)).float(), asked)

    draws = Draws()
    Walk(qmodel, [[x] for x in batches]).run([draws], progress=False)
    assert draws.visited == 1
