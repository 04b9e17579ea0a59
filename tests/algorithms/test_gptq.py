"""GPTQ: the codes of a direct implementation in float64, and a smaller error of every layer and of the whole net."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qdq
from algorithms.layer_cases import (
    LAYERS,
    assert_on_grid,
    correlated,
    layer_model,
    measured,
    quantized,
    randn,
    weight_and_quantizer,
)
from algorithms.trained_nets import score
from qdq.affine_quantizer import AffineQuantizer
from qdq.algorithms.bias_correction import BiasCorrection
from qdq.algorithms.gptq import GPTQ
from qdq.algorithms.registry import ALGORITHMS, algorithms_of
from qdq.errors import CalibrationError, RecipeError


def directly(rows: Tensor, hessian: Tensor, step: Tensor, bound: int, damping: float, descending: bool) -> Tensor:
    """One group in float64: the inverse Hessian itself, from which each column is eliminated after its turn."""
    left, step, hessian = rows.double().clone(), step.double(), hessian.double().clone()
    diagonal = hessian.diagonal().clone()
    hessian += damping * diagonal.mean() * torch.eye(len(hessian), dtype=torch.float64)
    for dead in (diagonal == 0).nonzero().flatten():
        hessian[dead, dead] = 1.0
    columns = list(range(len(hessian)))
    if descending:
        columns.sort(key=lambda j: -float(diagonal[j]))
    inverse = torch.linalg.inv(hessian)
    codes = torch.zeros_like(left)
    for j in columns:
        codes[:, j] = torch.round(left[:, j] / step[:, j]).clamp(-bound, bound)
        error = (left[:, j] - codes[:, j] * step[:, j]) / inverse[j, j]
        left -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j, None] * inverse[j] / inverse[j, j]
    return codes.float()


@pytest.mark.parametrize("block_size", [1, 7, 128])
@pytest.mark.parametrize("order", ["descending", "given"])
def test_codes_are_those_of_a_direct_implementation(block_size: int, order: str) -> None:
    groups, channels, width, bound = 3, 5, 40, 7
    rows = randn(groups, channels, width, seed=1)
    x = correlated(groups, 200, width, seed=2)
    x[1, :, [3, 8]] = 0.0  # dead in one group
    hessian = x.transpose(1, 2) @ x
    step = (rows.abs().amax(2, keepdim=True) / bound).expand_as(rows)
    limit = torch.full_like(rows, bound)
    got = GPTQ(block_size=block_size, order=order).codes(rows, hessian, step, -limit, limit)
    nearest = torch.round(rows / step)
    for g in range(groups):
        expected = directly(rows[g], hessian[g], step[g], bound, 0.01, order == "descending")
        assert torch.equal(got[g], expected)
        assert not torch.equal(got[g], nearest[g])
    assert torch.equal(got[1][:, [3, 8]], nearest[1][:, [3, 8]])


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_gains_and_no_channel_loses(name: str) -> None:
    model, batches = layer_model(name)
    qmodel = quantized(model, batches, bits=3)
    step = weight_and_quantizer(qmodel)[1].step_size.clone()
    visitor = measured(qmodel, batches, GPTQ())
    (old,), (new,) = visitor.before.values(), visitor.after.values()
    assert bool((new <= old * 1.001 + 1e-4).all())
    assert float(new.sum()) < 0.95 * float(old.sum())
    assert_on_grid(qmodel)
    assert torch.equal(weight_and_quantizer(qmodel)[1].step_size, step)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [0, None])
def test_any_bits_per_channel_and_per_tensor(bits: int, axis: int | None) -> None:
    model, batches = layer_model("grouped")
    qmodel = quantized(model, batches, bits=bits, axis=axis)
    visitor = measured(qmodel, batches, GPTQ())
    (old,), (new,) = visitor.before.values(), visitor.after.values()
    assert float(new.sum()) < float(old.sum())
    assert_on_grid(qmodel)


def test_blocks_of_input_channels() -> None:
    model, batches = layer_model("linear")
    qmodel = quantized(model, batches, weights={"block_size": 16})
    visitor = measured(qmodel, batches, GPTQ())
    assert float(visitor.after["0.weight"].sum()) < 0.8 * float(visitor.before["0.weight"].sum())
    assert_on_grid(qmodel)


@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped"])
def test_pairs_that_must_not_saturate_stay_safe(name: str) -> None:
    model, batches = layer_model(name)
    qmodel = quantized(model, batches, bits=8, reduce_range=True)
    assert weight_and_quantizer(qmodel)[1].pairs_axis is not None
    visitor = measured(qmodel, batches, GPTQ())
    assert bool((visitor.after["0.weight"] <= visitor.before["0.weight"] * 1.001 + 1e-4).all())
    assert float(visitor.after["0.weight"].sum()) < float(visitor.before["0.weight"].sum())
    assert_on_grid(qmodel)


def test_layers_of_more_products_or_with_few_positions_can_be_left_alone() -> None:
    model, batches = layer_model("grouped")
    width = weight_and_quantizer(quantized(model, batches, bits=3))[0][0].numel()
    unlimited = quantized(model, batches, bits=3)
    measured(unlimited, batches, GPTQ())
    for most, gains in ((width - 1, False), (width, True)):
        qmodel = quantized(model, batches, bits=3)
        before, _ = weight_and_quantizer(qmodel)
        measured(qmodel, batches, GPTQ(most_products=most))
        after, _ = weight_and_quantizer(qmodel)
        assert torch.equal(after, weight_and_quantizer(unlimited)[0] if gains else before)
    # Eight vectors for each of a row's products are enough, one fewer is not.
    linear = nn.Sequential(nn.Linear(6, 40)).eval()
    for count, changes in ((47, False), (48, True)):
        vectors = [correlated(count, 6)]
        qmodel = quantized(linear, vectors, bits=3)
        before, _ = weight_and_quantizer(qmodel)
        measured(qmodel, vectors, GPTQ(most_products=32))
        assert torch.equal(weight_and_quantizer(qmodel)[0], before) is not changes
    # As many must be looked at.
    qmodel = quantized(linear, vectors, bits=3)
    measured(qmodel, vectors, GPTQ(most_products=32, positions=47))
    assert torch.equal(weight_and_quantizer(qmodel)[0], before)


def test_so_many_samples_are_asked_for() -> None:
    """Each costs a pass of both models. Those whose factors are found before the walk want none."""
    assert (GPTQ().walk_samples, GPTQ(most_products=32).walk_samples) == (128, 64)
    wanted = {name: kind().walk_samples for name, kind in ALGORITHMS.items()}
    assert {name for name, samples in wanted.items() if not samples} == {"smoothquant", "equalization", "awq"}
    assert max(algorithm.walk_samples for algorithm in algorithms_of(qdq.Recipe().algorithms)) == 64


def test_by_default_small_layers_alone_get_other_codes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    # Smooth images: what the codes of a kernel are off by in sum is what counts.
    batches = [randn(16, 8, 1, 1, seed=s) + 0.1 * randn(16, 8, 12, 12, seed=10 + s) for s in range(5)]
    unseen = batches.pop()
    small = {"0": {"weights": {"num_bits": 4}}}  # so that its weight counts for more than the activations
    with_it, without = (
        qdq.quantize(model, batches, recipe=recipe, progress=False)
        for recipe in (
            qdq.Recipe(overrides=small),
            qdq.Recipe(overrides=small, algorithms=["smoothquant", "bias_correction"]),
        )
    )
    assert torch.equal(with_it.get_parameter("2.weight"), without.get_parameter("2.weight"))
    assert torch.equal(without.get_parameter("0.weight"), model.get_parameter("0.weight"))
    assert_on_grid(with_it)
    with torch.no_grad():
        wanted = model(unseen)
        errors = [float((qmodel(unseen) - wanted).square().sum()) for qmodel in (with_it, without)]
    assert errors[0] < 0.9 * errors[1]


def test_a_weight_that_is_read_in_float_too_keeps_its_values() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 16)
            self.head = nn.Linear(16, 50)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.words(x)
            return y, self.head(y)

    torch.manual_seed(0)
    model = Tied().eval()
    batches = [torch.randint(0, 50, (32, 12), generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    for algorithms in (qdq.Recipe().algorithms, ["adaround"], ["gptq"]):
        qmodel = qdq.quantize(
            model, batches, recipe=qdq.Recipe(exclude=("words",), algorithms=algorithms), progress=False
        )
        assert qmodel.get_submodule("head.weight_quantizer") is not None
        with torch.no_grad():
            assert torch.equal(qmodel(batches[0])[0], model(batches[0])[0])


@pytest.mark.parametrize("seed", range(8))
def test_inputs_too_small_for_squares_are_no_inputs(seed: int) -> None:
    linear = nn.Linear(16, 8)
    nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(seed))
    vectors = [1e-22 * correlated(256, 16, seed=seed)]
    qmodel = qdq.quantize(nn.Sequential(linear).eval(), vectors, progress=False)
    assert bool(torch.isfinite(qmodel(vectors[0])).all())


@pytest.mark.parametrize("independent", [True, False])
def test_codes_of_small_layers_hold_on_inputs_that_calibration_did_not_see(independent: bool) -> None:
    """With as few positions as are taken: little is lost where there is nothing to gain, and much gained elsewhere."""
    ratios = []
    for seed in range(5):
        x = randn(8 * 16 + 5000, 16, seed=seed) if independent else correlated(8 * 16 + 5000, 16, seed=seed)
        seen, unseen = x[: 8 * 16], x[8 * 16 :]
        model = nn.Sequential(nn.Linear(16, 64)).eval()
        exact = nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(seed)).detach()
        qmodel, errors = quantized(model, [seen]), []
        for chosen in (False, True):
            if chosen:
                measured(qmodel, [seen], GPTQ(most_products=16))
            weight, quantizer = weight_and_quantizer(qmodel)
            errors.append(float(((quantizer(weight) - exact) @ unseen.T).square().sum()))
        ratios.append(errors[1] / errors[0])
    assert max(ratios) < (1.15 if independent else 0.9)


def test_inputs_that_are_always_zero() -> None:
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    batches = [correlated(32, 8)]
    batches[0][:, [1, 5]] = 0.0
    qmodel = quantized(model, batches)
    before, quantizer = weight_and_quantizer(qmodel)
    nearest = quantizer.codes(before)
    measured(qmodel, batches, GPTQ())
    after, _ = weight_and_quantizer(qmodel)
    assert torch.equal(quantizer.codes(after)[:, [1, 5]], nearest[:, [1, 5]])
    silent = quantized(nn.Sequential(nn.Linear(8, 4)).eval(), [torch.zeros(4, 8)])
    measured(silent, [torch.zeros(4, 8)], GPTQ())
    assert_on_grid(silent)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inputs_that_are_not_finite_leave_the_layer_as_it_is(value: float) -> None:
    model, batches = layer_model("linear")
    qmodel = quantized(model, batches)
    before, _ = weight_and_quantizer(qmodel)
    quantizer = qmodel.get_submodule("input_quantizer")
    assert isinstance(quantizer, AffineQuantizer)
    quantizer.enabled = False  # which would cut it off
    batches[0][3, 5] = value
    measured(qmodel, batches, GPTQ())
    assert torch.equal(weight_and_quantizer(qmodel)[0], before)


def test_damping_that_is_too_small_for_the_inputs_is_told_with_the_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 8)).eval()
    batches = [randn(512, 1) @ randn(1, 64, seed=1)]
    told = "gptq: the inputs of layer '0.weight' leave its Hessian singular with damping=1e-30: raise it"
    with pytest.raises(CalibrationError, match=told):
        measured(quantized(model, batches), batches, GPTQ(damping=1e-30))
    with pytest.raises(CalibrationError, match=r"with damping=1e\+308: lower it \(0.01 is the default\)"):
        measured(quantized(model, batches), batches, GPTQ(damping=1e308))


@pytest.mark.parametrize("net", ["S1", "S2"])
def test_trained_nets_gain(net: str) -> None:
    corrected = score(net, 4, [BiasCorrection()])
    chosen = score(net, 4, [GPTQ(), BiasCorrection()])
    assert chosen.sqnr > corrected.sqnr + 3
    assert chosen.accuracy >= chosen.in_float * 0.98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping must be a number above 0, not 0.0"),
        ({"block_size": 0}, "block_size must be an integer of at least 1, not 0"),
        ({"order": "random"}, "order must be 'descending' or 'given', not 'random'"),
        ({"positions": 0}, "positions must be an integer of at least 1, not 0"),
        ({"most_products": 0}, "most_products must be an integer of at least 1, not 0"),
        ({"seed": 0.5}, "seed must be an integer of at least 0, not 0.5"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTQ(**options)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=message):
        algorithms_of({"gptq": options})
