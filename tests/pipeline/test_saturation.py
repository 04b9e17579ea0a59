"""Weights whose products saturate at 16 bits on x86 without VNNI, and biases that overflow 32 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

import qdq
from pipeline.helpers import deploy, initializers, run_file, run_model, sqnr_db
from qdq.constant_quantizers import BIAS_CODE_LIMIT, BiasQuantizer, WeightQuantizer
from qdq.cpuinfo import has_vnni
from qdq.saturation import LARGEST_PAIR, shrink_pairs

few = settings(max_examples=150, deadline=None, derandomize=True)
codes = hnp.arrays(
    np.int8,
    hnp.array_shapes(min_dims=2, max_dims=5, min_side=1, max_side=5),
    elements=st.integers(-127, 127),
)


def pairs(rows: Tensor) -> Tensor:
    """Neighbouring codes [.., 2] of each row; an odd last one has no neighbour."""
    return rows[:, : rows.shape[1] // 2 * 2].reshape(rows.shape[0], -1, 2)


def largest_sum(weight: Tensor, axis: int) -> int:
    """The largest |sum| of two neighbours of one output channel, spatial positions first and input channels last."""
    rows = weight.movedim(axis, 0).to(torch.int64)
    walked = pairs((rows.movedim(1, -1) if rows.dim() > 2 else rows).flatten(1))
    return int(walked.sum(-1).abs().max()) if walked.numel() else 0


@few
@given(codes, st.data())
def test_shrunk_pairs_cannot_saturate_and_nothing_grows(array: np.ndarray, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, array.ndim - 1))
    weight = torch.from_numpy(array).float()
    shrunk = shrink_pairs(weight, axis)
    assert shrunk.shape == weight.shape and shrunk.dtype == weight.dtype
    assert largest_sum(shrunk, axis) <= LARGEST_PAIR
    # 255 * the sum of a safe pair stays inside 16 bits.
    assert 255 * LARGEST_PAIR < 2**15
    assert (shrunk.abs() <= weight.abs()).all()
    assert (shrunk * weight >= 0).all()
    assert torch.equal(shrink_pairs(shrunk, axis), shrunk)
    if largest_sum(weight, axis) <= LARGEST_PAIR:
        assert torch.equal(shrunk, weight)


@given(hnp.arrays(np.int8, (1, 2), elements=st.integers(-127, 127)))
@few
def test_the_nearest_safe_pair_is_taken(array: np.ndarray) -> None:
    """Against a search of all pairs: no safe pair is nearer in the larger of the two changes."""
    weight = torch.from_numpy(array).float()
    a, b = (int(v) for v in weight[0])
    found = shrink_pairs(weight, 0)[0]
    change = float((found - weight[0]).abs().sum())
    assert change == (max(abs(a + b) - LARGEST_PAIR, 0) if a * b > 0 else 0)


def adversarial(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Half of the weights in [0.7, 1], the others 0: with inputs at the top of their range every sum saturates."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            large = 0.7 + 0.3 * torch.rand(parameter.shape, generator=generator)
            keep = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.copy_(torch.where(keep, large, torch.zeros(())))
            if parameter.dim() == 1:
                parameter.zero_()
    return layer.eval()


ADVERSARIAL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv 3x3": (lambda: nn.Conv2d(16, 16, 3, padding=1), (16, 8, 8)),
    "conv 1x1": (lambda: nn.Conv2d(16, 16, 1), (16, 8, 8)),
    "conv of 3 channels": (lambda: nn.Conv2d(3, 16, 3), (3, 8, 8)),
    "grouped": (lambda: nn.Conv2d(16, 16, 3, groups=4), (16, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, groups=16), (16, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 16, 5), (8, 32)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 3), (4, 6, 6, 6)),
    "linear 2d": (lambda: nn.Linear(64, 16), (64,)),
    "linear 3d": (lambda: nn.Linear(64, 16), (5, 64)),
    "two convolutions": (
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2)),
        (8, 10, 10),
    ),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_weights_do_not_saturate_with_a_reduced_range(name: str, tmp_path: Path) -> None:
    build, shape = ADVERSARIAL[name]
    model = adversarial(build())
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1)).clamp(min=0.6)
    recipe = qdq.Recipe(calibration="max", reduce_range=True)
    deployed = deploy(model, [x], tmp_path / "m.onnx", recipe=recipe)
    assert deployed.fidelity.sqnr_db > 60, str(deployed.fidelity)
    # Safe weights are worth little if they are no longer the weights.
    assert sqnr_db(run_model(model, [x]), run_file(deployed.path, [x])) > 30
    for array in initializers(deployed.path).values():
        if array.dtype == np.int8 and array.ndim > 1 and name != "depthwise":
            axis = 1 if name == "linear 3d" else 0  # stored transposed
            assert largest_sum(torch.tensor(array), axis) <= LARGEST_PAIR


def test_full_range_saturates_here_and_verify_names_the_cause(tmp_path: Path) -> None:
    if has_vnni() is not False:
        pytest.skip("only x86 processors without VNNI saturate")
    model = adversarial(nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)))
    x = torch.rand(4, 16, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(min=0.6)
    recipe = qdq.Recipe(calibration="max", reduce_range=False)
    deployed = deploy(model, [x], tmp_path / "m.onnx", recipe=recipe)
    assert deployed.fidelity.sqnr_db < 40
    assert "has no VNNI" in deployed.fidelity.cause and "saturate at 16 bits" in deployed.fidelity.cause
    assert "Recipe(reduce_range=True)" in str(deployed.fidelity)


def test_weights_that_are_safe_as_they_are_lose_nothing() -> None:
    weight = 0.4 * torch.rand(8, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    # One large value a channel, the rest below a half: no pair passes 128.
    weight[:, 0, 0, 0], weight[:, 0, 0, 1], weight[:, 1, 0, 0] = 1.0, 0.0, 0.0
    safe, plain = WeightQuantizer("safe", 8, 0, 8, pairs_axis=0), WeightQuantizer("plain", 8, 0, 8)
    for quantizer in (safe, plain):
        quantizer.fit(weight, "max")
    errors = [(q(weight) - weight).square().flatten(1).sum(1) for q in (safe, plain)]
    assert (errors[0] <= errors[1]).all()


@pytest.mark.parametrize("axis", [0, None])
def test_a_weight_quantizer_prefers_larger_steps_over_shrunk_pairs_where_they_err_less(axis: int | None) -> None:
    weight = torch.ones(4, 16) * 0.9
    weight[:, ::3] = 1.0
    safe, plain = WeightQuantizer("safe", 8, axis, 4, pairs_axis=0), WeightQuantizer("plain", 8, axis, 4)
    safe.fit(weight, "max")
    plain.fit(weight, "max")
    assert (safe.step_size >= plain.step_size).all()
    assert (safe.step_size <= 2 * plain.step_size + 1e-9).all()
    assert largest_sum(safe.codes(weight), 0) <= LARGEST_PAIR
    assert sqnr_db([weight.numpy()], [safe(weight).numpy()]) > 35
    # The simulation is what the codes say, and gradients pass.
    trained = weight.clone().requires_grad_()
    safe(trained).sum().backward()
    assert torch.equal(trained.grad, torch.ones_like(weight))


# Biases.


@pytest.mark.parametrize(
    ("build", "shape"),
    [(lambda: nn.Conv2d(4, 3, 3), (4, 8, 8)), (lambda: nn.Linear(8, 3), (8,))],
    ids=["conv", "linear"],
)
@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_huge_bias_over_tiny_weights_enlarges_the_step(
    build: Callable[[], nn.Module], shape: tuple[int, ...], per_tensor: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer = build()
    with torch.no_grad():
        layer.weight[0] *= 1e-6  # type: ignore[operator]
        layer.weight[1] = 0  # type: ignore[operator]
        layer.bias[:] = torch.tensor([50.0, -80.0, 1.0])  # type: ignore[index]
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    weights = qdq.QuantDescriptor(num_bits=8, axis=None if per_tensor else 0, narrow_range=True)
    deployed = deploy(
        nn.Sequential(layer, nn.ReLU()).eval(), [x], tmp_path / "m.onnx", recipe=qdq.Recipe(weights=weights)
    )
    steps = deployed.qmodel.get_submodule("0.weight_quantizer").step_size
    if not per_tensor:
        input_step = float(deployed.qmodel.get_submodule("input_quantizer").step_size)
        assert (80.0 / (input_step * steps[1].double()) <= BIAS_CODE_LIMIT * 1.0001).all()
        largest = layer.weight[2].detach().abs().max().item()  # type: ignore[index]
        assert largest * 0.999 <= steps[2].item() * 127 <= largest * 2.001  # its bias fits: it keeps its own range
    stored = [a for a in initializers(deployed.path).values() if a.dtype == np.int32 and a.any()]
    assert len(stored) == 1 and np.abs(stored[0].astype(np.int64)).max() <= BIAS_CODE_LIMIT
    assert deployed.fidelity.sqnr_db > 60, str(deployed.fidelity)
    outputs = run_file(deployed.path, [x])[0]
    assert np.allclose(outputs[:, 0].mean(), 50.0, atol=0.5) and not outputs[:, 1].any()


def test_bias_codes_are_clamped_and_their_gradient_passes() -> None:
    quantizer = BiasQuantizer("bias")
    bias = torch.tensor([1e9, -1e9, 0.3], requires_grad=True)
    codes = quantizer.codes(bias, torch.tensor(0.01), torch.tensor([1e-9, 1e-9, 0.01]))
    assert codes.dtype == torch.int32 and codes.tolist() == [BIAS_CODE_LIMIT, -BIAS_CODE_LIMIT, 3000]
    quantizer(bias, torch.tensor(0.01), torch.tensor(0.01)).sum().backward()
    assert torch.equal(bias.grad, torch.ones(3))
