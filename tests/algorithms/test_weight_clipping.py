"""Weight clipping: step sizes of less error in the layer's output, never of more."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from algorithms.layer_cases import (
    LAYERS,
    Measured,
    channel_errors,
    correlated,
    layer_model,
    measured,
    quantized,
    randn,
    weight_and_quantizer,
)
from algorithms.trained_nets import score
from qdq.algorithms.bias_correction import BiasCorrection
from qdq.algorithms.registry import algorithms_of
from qdq.algorithms.walk import LayerVisit, Walk
from qdq.algorithms.weight_clipping import WeightClipping
from qdq.errors import RecipeError


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_gains_and_no_step_size_loses(name: str) -> None:
    model, batches = layer_model(name)
    qmodel = quantized(model, batches, bits=3)
    weight, quantizer = weight_and_quantizer(qmodel)
    largest = quantizer.step_size.clone()
    visitor = measured(qmodel, batches, WeightClipping())
    (old,), (new,) = visitor.before.values(), visitor.after.values()
    if name == "transposed, grouped":  # both groups share the step sizes
        old, new = old.reshape(2, -1).sum(0), new.reshape(2, -1).sum(0)
    assert bool((new <= old * 1.001 + 1e-4).all())
    assert float(new.sum()) < 0.9 * float(old.sum())
    share = quantizer.step_size / largest
    assert bool((share <= 1).all() and (share > 0.39).all()) and len(share.unique()) >= 2  # not one factor for all
    assert torch.equal(weight_and_quantizer(qmodel)[0], weight)


def test_the_best_candidate_is_taken() -> None:
    model, batches = layer_model("grouped")
    qmodel = quantized(model, batches, bits=4)
    largest = weight_and_quantizer(qmodel)[1].step_size.clone()
    options = WeightClipping(candidates=4, least=0.7)

    class AllTried(Measured):
        def visit_layer(self, visit: LayerVisit) -> None:
            step = visit.layer.quantizer.step_size
            errors = []
            for factor in (1.0, 0.9, 0.8, 0.7):
                step.copy_(largest * factor)
                errors.append(channel_errors(visit))
            step.copy_(largest)
            self.expected = largest * torch.tensor([1.0, 0.9, 0.8, 0.7])[torch.stack(errors).argmin(0)]
            super().visit_layer(visit)

    visitor = AllTried(options)
    Walk(qmodel, [[x] for x in batches]).run([visitor], progress=False)
    torch.testing.assert_close(weight_and_quantizer(qmodel)[1].step_size, visitor.expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_step_size_for_the_tensor(bits: int) -> None:
    model, batches = layer_model("conv2d")
    qmodel = quantized(model, batches, bits=bits, axis=None)
    visitor = measured(qmodel, batches, WeightClipping())
    old, new = float(visitor.before["0.weight"].sum()), float(visitor.after["0.weight"].sum())
    assert new < old if bits < 8 else new <= old * 1.001
    assert weight_and_quantizer(qmodel)[1].step_size.dim() == 0


def test_blocks_of_input_channels() -> None:
    model, batches = layer_model("linear")
    qmodel = quantized(model, batches, weights={"block_size": 16})
    largest = weight_and_quantizer(qmodel)[1].step_size.clone()
    visitor = measured(qmodel, batches, WeightClipping())
    assert bool((visitor.after["0.weight"] <= visitor.before["0.weight"] * 1.001).all())
    assert float(visitor.after["0.weight"].sum()) < 0.8 * float(visitor.before["0.weight"].sum())
    share = weight_and_quantizer(qmodel)[1].step_size / largest
    assert not torch.equal(share[:, 0], share[:, 1])  # each block has its own


def test_pairs_that_must_not_saturate_and_step_sizes_that_are_small_already() -> None:
    model, batches = layer_model("conv2d")
    qmodel = quantized(model, batches, bits=8, reduce_range=True)
    visitor = measured(qmodel, batches, WeightClipping())
    assert bool((visitor.after["0.weight"] <= visitor.before["0.weight"] * 1.001 + 1e-4).all())
    again = quantized(model, batches, bits=3, weight_calibration="mse")
    visitor = measured(again, batches, WeightClipping())
    assert bool((visitor.after["0.weight"] <= visitor.before["0.weight"] * 1.001 + 1e-4).all())


def test_a_bias_still_fits_its_integers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(1e-6 * randn(4, 3, 3, 3))
        model.get_parameter("0.bias").copy_(torch.tensor([1000.0, 0.0, 1e-6, -1000.0]))
    batches = [correlated(4, 3, 8, 8)]
    qmodel = quantized(model, batches, bits=4)
    measured(qmodel, batches, WeightClipping())
    bias, quantizer = qmodel.get_parameter("0.bias"), weight_and_quantizer(qmodel)[1]
    step = quantizer.step_size.clone()
    quantizer.fit_bias(bias.detach(), qmodel.get_buffer("input_quantizer.step_size"))
    assert torch.equal(quantizer.step_size, step)


@pytest.mark.parametrize("net", ["S1", "S2"])
def test_trained_nets_gain(net: str) -> None:
    corrected, clipped = score(net, 4, [BiasCorrection()]), score(net, 4, [WeightClipping(), BiasCorrection()])
    assert clipped.sqnr > corrected.sqnr + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 1}, "candidates must be an integer of at least 2, not 1"),
        ({"least": 1.0}, "least must be a number above 0 and below 1, not 1.0"),
        ({"least": 0}, "least must be a number above 0 and below 1, not 0"),
        ({"positions": 0}, "positions must be an integer of at least 1, not 0"),
        ({"seed": "a"}, "seed must be an integer of at least 0, not 'a'"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightClipping(**options)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=message):
        algorithms_of({"weight_clipping": options})
