"""`qdq.recover`: its path, its result, its budget, its arguments."""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import qdq
from fixtures import fashion
from fixtures.classifiers import accuracy, s2
from qdq.algorithms.equalization import Equalization
from qdq.algorithms.registry import ALGORITHMS
from qdq.constant_quantizers import WeightQuantizer
from qdq.graph.record import record_of
from qdq.recovery.journal import read_journal

PER_TENSOR = qdq.Recipe(weights=qdq.QuantDescriptor(8, narrow_range=True), calibration="max", algorithms=[])


def net() -> nn.Module:
    """Three layers, the channels of the first of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.get_parameter("0.weight").mul_(torch.tensor([1, 30, 0.02, 5, 0.1, 1]).reshape(-1, 1, 1, 1))
    return model.eval()


def data() -> list[torch.Tensor]:
    return list(torch.randn(24, 2, 8, 8, generator=torch.Generator().manual_seed(2)).split(8))


class Closeness:
    """1 for the float model, less the further away the outputs are: a metric that no quantized model brings to 1."""

    def __init__(self) -> None:
        self.inputs = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(3))
        self.wanted = net()(self.inputs).detach()
        self.calls = 0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        with torch.no_grad():
            return 1 / (1 + float((model(self.inputs) - self.wanted).square().sum() / self.wanted.square().sum()))


def recover(evaluate: Any, *, target: float = 1.0, **options: Any) -> qdq.Recovery:
    options = {"recipe": PER_TENSOR, "progress": False, **options}
    return qdq.recover(net(), data(), evaluate, target, **options)


@pytest.fixture
def quick() -> Iterator[None]:
    """Without the extra `onnx`: no file is made, which takes most of the time of small models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        yield


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[qdq.Recovery, Path]:
    """The whole ladder, and its journal."""
    path = tmp_path_factory.mktemp("recovery") / "journal.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        return recover(Closeness(), budget="1h", journal=path), path


def test_every_rung_is_tried_in_order(climbed: tuple[qdq.Recovery, Path]) -> None:
    found = climbed[0]
    assert [rung.name for rung in found.rungs] == [
        "as given",
        "calibration auto, SmoothQuant, GPTQ of small layers, bias correction",
        "equalization",
        "per-channel weights",
        "AdaRound of the worst layer",
        "AdaRound",
        "activations of the worst layer in float",
        "worst layer in float",
        "activations of the 2 worst layers in float",
        "2 worst layers in float",
        "fine-tuning",
    ]
    assert not found.reached and found.baseline == found.goal == 1
    metrics = [rung.metric for rung in found.rungs]
    assert found.metric == max(m for m in metrics if m is not None) > found.rungs[0].metric  # type: ignore[operator]
    assert all(rung.error is None and rung.seconds > 0 for rung in found.rungs)
    # Without the extra `onnx` neither is known.
    assert {(rung.size, rung.latency_ratio) for rung in found.rungs} == {(None, None)} and found.float_size is None
    # What does not raise the metric is not built upon.
    best = found.rungs[0]
    for rung in found.rungs[1:6]:
        assert set(best.recipe.algorithms) <= {*rung.recipe.algorithms, "gptq"}
        best = max(best, rung, key=lambda r: r.metric or 0.0)


def test_the_best_recipe_and_every_other_gives_the_same_model_again(climbed: tuple[qdq.Recovery, Path]) -> None:
    found = climbed[0]
    evaluate = Closeness()
    again = qdq.quantize(net(), data(), recipe=found.recipe, progress=False)
    for key, value in found.model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert torch.equal(again(evaluate.inputs), found.model(evaluate.inputs))
    for rung in found.rungs[::3]:
        # From the file's form of the recipe.
        recipe = qdq.Recipe.from_yaml(rung.recipe.to_yaml())
        assert evaluate(qdq.quantize(net(), data(), recipe=recipe, progress=False)) == rung.metric


def test_the_printed_path_and_plain_data(climbed: tuple[qdq.Recovery, Path]) -> None:
    found = climbed[0]
    lines = str(found).splitlines()
    assert len(lines) == 3 + len(found.rungs)
    assert lines[0].split() == ["rung", "metric", "of", "float", "size", "latency", "seconds"]
    assert lines[1].split() == ["float", "model", "1", "100.00", "%", "-", "1.00x"]
    assert [line.startswith("*") for line in lines[2:-1]] == [rung in found.front for rung in found.rungs]
    assert lines[-1].startswith("goal 1 not reached: ")
    plain = found.to_dict()
    assert plain["front"] == [rung.name for rung in found.front] and len(plain["rungs"]) == len(found.rungs)
    assert qdq.Recipe.from_dict(plain["recipe"]) == found.recipe


def test_layers_in_float_are_in_float(climbed: tuple[qdq.Recovery, Path]) -> None:
    rungs = {rung.name: rung for rung in climbed[0].rungs}
    (worst,) = set(rungs["worst layer in float"].recipe.exclude)
    count = {}
    for name in ("AdaRound", "activations of the worst layer in float", "worst layer in float"):
        model = qdq.quantize(net(), data(), recipe=rungs[name].recipe, progress=False)
        count[name] = sum(isinstance(m, WeightQuantizer) for m in model.modules())
        reads = [n for n in model.graph.nodes if any(str(i.target).startswith(worst) for i in n.all_input_nodes)]
        assert reads
    assert list(count.values()) == [3, 3, 2]


@pytest.mark.usefixtures("quick")
def test_an_interrupt_loses_the_current_rung_alone(climbed: tuple[qdq.Recovery, Path], tmp_path: Path) -> None:
    whole, journal = climbed[0], tmp_path / "j.json"

    class Interrupted(Closeness):
        def __init__(self, rungs: int) -> None:
            super().__init__()
            self.left = 1 + rungs

        def __call__(self, model: nn.Module) -> float:
            if self.calls == self.left:
                raise KeyboardInterrupt
            return super().__call__(model)

    with pytest.raises(KeyboardInterrupt):
        recover(Interrupted(2), budget="1h", journal=journal)
    with pytest.raises(KeyboardInterrupt):  # the batches are not looked at again
        qdq.recover(net(), None, Interrupted(4), 1.0, "1h", recipe=PER_TENSOR, journal=journal, progress=False)
    evaluate = Closeness()
    found = recover(evaluate, budget="1h", journal=journal)
    assert evaluate.calls == 1 + len(whole.rungs) - 6
    assert [(r.name, r.recipe, r.metric) for r in found.rungs] == [(r.name, r.recipe, r.metric) for r in whole.rungs]
    assert found.recipe == whole.recipe and found.metric == whole.metric
    assert torch.equal(found.model(evaluate.inputs), whole.model(evaluate.inputs))


def test_no_budget_gives_one_rung_with_size_and_latency(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "qdq.recovery"):
        found = recover(Closeness(), budget=0)
    (rung,) = found.rungs
    assert rung.name == "as given" and found.recipe == rung.recipe == PER_TENSOR and found.front == found.rungs
    assert rung.size and rung.latency_ratio and rung.latency_ratio > 0 and found.float_size
    assert f"{rung.size / 1024:.1f} KiB" in str(found) and f"{rung.latency_ratio:.2f}x" in str(found)
    assert "the budget is spent" in caplog.text and "as given: quantized in" in caplog.text


@pytest.mark.usefixtures("quick")
def test_a_finished_journal_is_read_and_nothing_tried(climbed: tuple[qdq.Recovery, Path]) -> None:
    whole, journal = climbed
    evaluate = Closeness()
    before = journal.read_bytes()
    found = recover(evaluate, journal=journal, budget=0)
    assert evaluate.calls == 1 and str(found) == str(whole) and journal.read_bytes() == before
    assert torch.equal(found.model(evaluate.inputs), whole.model(evaluate.inputs))


@pytest.mark.usefixtures("quick")
def test_a_small_trained_net_reaches_its_target() -> None:
    """S2 from entropy ranges and one step size per weight, which cost it more than 5 %."""
    images, labels = fashion.load("test", limit=400)
    batches = list(fashion.load("train", limit=64)[0].split(32))
    model, recipe = s2(), qdq.Recipe(weights=PER_TENSOR.weights, calibration="entropy", algorithms=[])
    before = copy.deepcopy(model.state_dict())

    def evaluate(m: nn.Module) -> float:
        return accuracy(m, images, labels)

    found = qdq.recover(model, batches, evaluate, 0.99, recipe=recipe, progress=False)
    first = found.rungs[0].metric
    assert first is not None and first < 0.95 * found.baseline
    assert found.reached and found.metric >= 0.99 * found.baseline and "reached: " in str(found)
    assert evaluate(found.model) == found.metric and record_of(found.model).recipe == found.recipe
    assert all(rung.metric is not None and rung.metric < found.goal for rung in found.rungs[:-1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.usefixtures("quick")
def test_nothing_is_printed_without_progress(capfd: pytest.CaptureFixture[str]) -> None:
    recover(Closeness(), budget=0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("convert", [torch.tensor, lambda v: torch.tensor([[v]]), float])
def test_metrics_may_be_tensors_and_the_model_stays_as_it_is(convert: Callable[[float], Any]) -> None:
    closeness = Closeness()

    def evaluate(model: nn.Module) -> Any:
        value = closeness(model)
        model.train().double()
        assert math.isclose(closeness(model.float()), value, rel_tol=1e-3)
        return convert(value)

    found = recover(evaluate, target=0.5, budget=0)
    assert type(found.metric) is float and found.rungs[0].metric == found.metric


def after_the_float_model(value: Any) -> Callable[[nn.Module], Any]:
    values = iter([1.0])
    return lambda model: next(values, value)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (lambda m: True, "must return a number, larger for a better model; for the float model it returned True"),
        (lambda m: None, "for the float model it returned None"),
        (lambda m: torch.ones(2), "for the float model it returned tensor"),
        (lambda m: torch.tensor(1j), "for the float model it returned tensor"),
        (lambda m: math.nan, "returned nan for the float model: a share of it .* such as 1 / loss"),
        (lambda m: -1.5, "returned -1.5 for the float model"),
        (lambda m: 0, "returned 0.0 for the float model"),
        (after_the_float_model(torch.tensor(math.inf)), "evaluate returned inf"),
        (after_the_float_model(False), "for the rung 'as given' it returned False"),
        (3, "evaluate must be a callable that takes a model, not int"),
    ],
)
def test_metrics_that_are_none(evaluate: Any, message: str) -> None:
    with pytest.raises(qdq.QdqError, match=message):
        recover(evaluate)


@pytest.mark.usefixtures("quick")
@pytest.mark.usefixtures("quick")
def test_a_later_rung_that_fails_is_recorded() -> None:
    closeness = Closeness()

    def evaluate(model: nn.Module) -> float:
        return closeness(model) if closeness.calls < 2 else math.nan

    found = recover(evaluate, budget="1h")
    assert found.metric == found.rungs[0].metric and found.recipe == PER_TENSOR
    told = "QdqError: evaluate returned nan for the rung {!r}: it must be finite"
    assert [rung.error for rung in found.rungs[1:]] == [told.format(rung.name) for rung in found.rungs[1:]]
    assert found.front == found.rungs[:1]
    assert "equalization failed: QdqError: evaluate returned nan" in str(found)


@pytest.mark.usefixtures("quick")
def test_whatever_fails_in_a_later_rung_is_recorded_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Equalization):
        def prepare(self, *args: Any) -> Any:
            raise RuntimeError("stack expects a non-empty TensorList")

    monkeypatch.setitem(ALGORITHMS, "equalization", Broken)
    journal = tmp_path / "j.json"
    found = recover(Closeness(), budget="1h", journal=journal)
    rungs = {rung.name: rung for rung in found.rungs}
    assert rungs["equalization"].error == "RuntimeError: stack expects a non-empty TensorList"
    assert rungs["equalization"].metric is None and rungs["fine-tuning"].metric is not None
    assert "equalization failed, which is recorded" in caplog.text and "Traceback" in caplog.text
    again = recover(Closeness(), budget="1h", journal=journal)
    assert str(again) == str(found)
    # That of the first rung is raised as it is.
    with pytest.raises(RuntimeError, match="non-empty"):
        recover(Closeness(), recipe=qdq.Recipe(algorithms=["equalization"]))


@pytest.mark.usefixtures("quick")
def test_a_model_whose_output_is_an_answer_keeps_what_was_found(tmp_path: Path) -> None:
    model = nn.Sequential(net(), Answer()).eval()

    def evaluate(m: nn.Module) -> float:
        return 0.5 if isinstance(getattr(m, "model", None), fx.GraphModule) else 1.0

    for _ in range(2):
        found = qdq.recover(
            model, data(), evaluate, budget="1h", recipe=PER_TENSOR, progress=False, journal=tmp_path / "j"
        )
        assert found.rungs[-1].name == "fine-tuning" and not found.reached and found.metric == 0.5


class Answer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(-1)


@pytest.mark.usefixtures("quick")
def test_what_the_metric_raises_is_raised(tmp_path: Path) -> None:
    closeness, journal = Closeness(), tmp_path / "j.json"

    def evaluate(model: nn.Module) -> float:
        if closeness.calls == 2:
            raise RuntimeError("the test set is gone")
        return closeness(model)

    with pytest.raises(RuntimeError, match="the test set is gone"):
        recover(evaluate, budget="1h", journal=journal)
    assert len(read_journal(journal).rungs) == 1


@pytest.mark.usefixtures("quick")
def test_every_model_that_is_evaluated_is_in_eval_mode() -> None:
    seen: list[bool] = []

    def evaluate(model: nn.Module) -> float:
        seen.extend([model.training, model.eval().training, model.train().eval().training])
        return 1.0

    recover(evaluate, budget=0)
    assert seen == [False] * 6


class Free(nn.Module):
    """Takes an input by keyword that `forward` does not name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + others["shift"]


def test_inputs_in_free_keywords_are_measured_too() -> None:
    batches = [{"x": torch.randn(4, 4), "shift": torch.randn(4, 3)}]
    found = qdq.recover(Free().eval(), batches, lambda model: 1.0, budget=0, recipe=PER_TENSOR, progress=False)
    assert found.float_size and found.rungs[0].size and found.rungs[0].latency_ratio


@pytest.mark.usefixtures("quick")
def test_low_bits_take_their_own_rungs() -> None:
    recipe = qdq.Recipe(weights=qdq.QuantDescriptor(3, axis=0, narrow_range=True))
    found = recover(Closeness(), target=0.999, budget="1h", recipe=recipe)
    names = [rung.name for rung in found.rungs]
    assert "AdaRound of the worst layer" in names and "8-bit weights of the worst layer" in names
    assert names[:2] == ["as given", "equalization"]  # the default has all of the second rung
    rung = found.rungs[names.index("8-bit weights of the worst layer")]
    assert [o.weights.num_bits for o in rung.recipe.overrides.values() if o.weights] == [8]
    assert found.reached


def test_what_tuning_left_in_float_is_in_the_recipe() -> None:
    one = nn.Sequential(nn.Linear(4, 3)).eval()  # of few operations there are few placements to be timed
    recipe = qdq.Recipe(tune="latency", algorithms=[])
    found = qdq.recover(one, [torch.randn(4, 4)], lambda model: 1.0, budget=0, recipe=recipe, progress=False)
    assert found.recipe.tune is None
    assert record_of(found.model).recipe == found.recipe


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": 0}, qdq.QdqError, "target must be a share .*, not 0; the runtime is deploy_target"),
        ({"target": "tensorrt"}, qdq.QdqError, "not 'tensorrt'; the runtime is deploy_target"),
        ({"target": 1.1}, qdq.QdqError, "above 0 and at most 1, not 1.1"),
        ({"target": True}, qdq.QdqError, "not True"),
        ({"budget": "soon"}, qdq.RecipeError, "budget must be seconds or text such as \"90s\", .* not 'soon'"),
        ({"budget": -1}, qdq.RecipeError, "not -1"),
        ({"budget": True}, qdq.RecipeError, "not True"),
        ({"budget": math.nan}, qdq.RecipeError, "not nan"),
        ({"recipe": "r.yaml"}, qdq.RecipeError, "recipe must be a qdq.Recipe, not str; Recipe.load reads files"),
        ({"recipe": qdq.Recipe(algorithms=["magic"])}, qdq.RecipeError, "unknown algorithm 'magic'"),
        ({"recipe": qdq.Recipe(weights=qdq.QuantDescriptor(9))}, qdq.RecipeError, "2 to 8"),
        ({"deploy_target": "abacus"}, qdq.RecipeError, "unknown target 'abacus'"),
        ({"journal": 3}, qdq.QdqError, "journal must be a path, a str or os.PathLike, not int"),
        ({"journal": "."}, qdq.DataError, "it is a folder; give the path of a file"),
        ({"journal": "no/such/j.json"}, qdq.DataError, "j.json' cannot be written: the folder 'no/such' does not"),
        ({"target": 10**400}, qdq.QdqError, "above 0 and at most 1, not 1000"),
        ({"budget": 10**400}, qdq.RecipeError, "budget must be seconds or text"),
        (
            {"recipe": qdq.Recipe(tune="latency"), "deploy_target": "tensorrt"},
            qdq.RecipeError,
            "tune='latency' needs target 'onnxruntime', not 'tensorrt'",
        ),
    ],
)
def test_arguments_are_checked_before_any_work(options: Any, error: type[Exception], message: str) -> None:
    evaluate = Closeness()
    with pytest.raises(error, match=message):
        recover(evaluate, **options)
    assert evaluate.calls == 0


def test_models_are_checked() -> None:
    with pytest.raises(qdq.QdqError, match="model must be a torch.nn.Module, not list"):
        qdq.recover([], data(), Closeness())  # type: ignore[arg-type]
    quantized = qdq.quantize(net(), data(), progress=False)
    with pytest.raises(qdq.QdqError, match="is quantized: pass the float model"):
        qdq.recover(quantized, data(), Closeness())
    with pytest.raises(qdq.RecipeError, match="recipe holds a value that a journal cannot"):
        recover(Closeness(), journal="j.json", recipe=qdq.Recipe(reduce_range=np.True_))  # type: ignore[arg-type]
