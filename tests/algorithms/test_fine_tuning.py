"""Fine-tuning: the output comes nearer to the float model's, in the same way every time, or nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qdq
from algorithms.layer_cases import layer_model, randn
from fixtures import fashion
from fixtures.classifiers import s2
from qdq.algorithms.fine_tuning import FineTuning
from qdq.algorithms.registry import algorithms_of
from qdq.constant_quantizers import WeightQuantizer
from qdq.graph.record import record_of


def tuned(model: nn.Module, batches: Any, bits: int = 4, axis: int | None = 0, **options: Any) -> list[nn.Module]:
    """Quantized without and with fine-tuning, from the same statistics."""
    weights = qdq.QuantDescriptor(bits, axis=axis, narrow_range=True)
    data, models = batches, []
    for algorithms in ({}, {"fine_tuning": options}):
        ranges = {"calibration": "max", "weight_calibration": "max"}
        recipe = qdq.Recipe(weights=weights, algorithms=algorithms, **ranges)  # type: ignore[arg-type]
        models.append(qdq.quantize(model, data, recipe=recipe, progress=False))
        data = record_of(models[-1]).statistics
    return models


@torch.no_grad()
def error(qmodel: nn.Module, model: nn.Module, batches: Any) -> float:
    return sum(float((qmodel(x) - model(x)).square().sum()) for x in batches)


@pytest.mark.parametrize("name", ["linear, more dimensions", "conv2d", "depthwise, two each", "transposed, grouped"])
def test_no_kind_of_layer_gets_worse(name: str) -> None:
    model, batches = layer_model(name)
    plain, trained = tuned(model, batches, steps=30)
    assert error(trained, model, batches) <= error(plain, model, batches)


def test_a_trained_net_gains_on_images_not_seen() -> None:
    model = s2()
    batches = list(fashion.load("train", limit=32)[0].split(16))
    images = fashion.load("test")[0][:125].split(125)
    plain, trained = tuned(model, batches, bits=3, steps=15)
    assert error(trained, model, images) < 0.7 * error(plain, model, images)


def two_inputs() -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor, *, shift: torch.Tensor) -> dict[str, Any]:
            hidden = torch.relu(self.a(x)) + shift
            return {"logits": self.c(torch.relu(self.b(hidden))), "answer": hidden.argmax(1)}

    model = Net().eval()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * randn(*parameter.shape, seed=index))
    batches = [{"x": randn(16, 6, seed=i), "shift": randn(16, 8, seed=9 + i)} for i in range(5)]
    return model, batches


def test_keywords_integer_outputs_and_one_step_size_and_the_same_result_again() -> None:
    model, batches = two_inputs()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain, trained = tuned(model, batches, bits=4, axis=None, steps=40, learning_rate=0.05)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(7)
        _, again = tuned(model, batches, bits=4, axis=None, steps=40, learning_rate=0.05)

    def of(m: nn.Module) -> float:
        with torch.no_grad():
            return sum(float((m(**b)["logits"] - model(**b)["logits"]).square().sum()) for b in batches)

    assert of(trained) < 0.9 * of(plain)
    for key, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
        if "quantizer" in key and "bias" not in key:
            assert torch.equal(value, plain.state_dict()[key]), key  # ranges and step sizes stay
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in [*model.parameters(), *trained.parameters()])
    assert all(m.enabled for m in trained.modules() if isinstance(m, WeightQuantizer))


def test_what_gets_worse_is_not_kept() -> None:
    model, batches = layer_model("linear")
    plain, trained = tuned(model, batches, bits=8, steps=3, learning_rate=1000.0)
    assert all(torch.equal(v, trained.state_dict()[key]) for key, v in plain.state_dict().items())


def test_a_model_without_layers_is_left_alone() -> None:
    recipe = qdq.Recipe(algorithms=["fine_tuning"])
    model = nn.Sequential(nn.ReLU())
    assert torch.equal(
        qdq.quantize(model, [randn(2, 3)], recipe=recipe, progress=False)(randn(2, 3)), randn(2, 3).relu()
    )


def test_outputs_that_no_weight_moves_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.fc(x).argmax(-1), x * 2

    plain, trained = tuned(Decides().eval(), [randn(16, 8)])
    assert all(torch.equal(v, trained.state_dict()[key]) for key, v in plain.state_dict().items())
    assert "fine_tuning leaves the weights as they are: no float output depends on them" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, not 0"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0, not 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, not -1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuning(**options)
    with pytest.raises(qdq.RecipeError, match=message):
        algorithms_of({"fine_tuning": options})
