"""The journal of `qdq.recover`: what it refuses, and that no interrupt damages it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qdq
from qdq.graph.targets import ONNXRUNTIME

RECIPE = qdq.Recipe(calibration="max", algorithms=[])
ALTERED = dataclasses.replace(ONNXRUNTIME, matmul_nbits=False)


def net(factor: float = 1.0) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.linspace(-1, factor, parameter.numel()).sin().reshape(parameter.shape) + index / 9)
    return model.eval()


def recover(
    journal: Path,
    *,
    model: nn.Module | None = None,
    value: float = 1.0,
    falling: bool = False,
    evaluated: list[nn.Module] | None = None,
    **options: Any,
) -> qdq.Recovery:
    """One rung: the metric is a number by itself; or all, where it is less for every model but the float one."""
    options = {"target": 0.99, "recipe": RECIPE, **options}
    data = [torch.linspace(-1, 1, 32).reshape(8, 4)]

    def evaluate(m: nn.Module) -> float:
        if evaluated is not None:
            evaluated.append(m)
        return value / 2 if falling and not isinstance(m, nn.Sequential) else value

    return qdq.recover(net() if model is None else model, data, evaluate, journal=journal, progress=False, **options)


@pytest.fixture
def without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # without files it is quick


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("journal") / "j.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)  # without files it is quick
        assert recover(path).reached
    return path


@pytest.fixture
def journal(made: Path, tmp_path: Path) -> Path:
    for file in made.parent.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path / made.name


def test_it_is_versioned_json_with_the_statistics_beside_it(journal: Path) -> None:
    data = json.loads(journal.read_text())
    assert data["format"] == "qdq.recovery" and data["version"] == 2
    assert qdq.Recipe.from_dict(data["rungs"][0]["recipe"]) == qdq.Recipe.from_dict(data["start"]) == RECIPE
    assert sorted(p.name for p in journal.parent.iterdir()) == ["j.json", "j.json.statistics.safetensors"]
    assert qdq.calib.load(journal.with_name("j.json.statistics.safetensors")).samples
    assert recover(journal).rungs[0].metric == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": net(0.5)},
            r"is of another float model \(its parameters, .* differ\): give another path, or remove",
        ),
        ({"value": 2.0}, "is of another metric of the float model: 1.0 in the journal, now 2.0"),
        ({"recipe": qdq.Recipe()}, "is of another recipe"),
        ({"target": 0.5}, "is of another target: 0.99 in the journal, now 0.5"),
        ({"dynamic_shapes": "static"}, "is of other dynamic_shapes: None in the journal, now 'static'"),
        ({"example_inputs": torch.ones(2, 4)}, r"is of other example_inputs: None in the journal, now float32\[2, 4\]"),
        ({"deploy_target": "tensorrt"}, "is of another deploy_target: onnxruntime in the journal, now tensorrt"),
        ({"deploy_target": ALTERED}, r"now onnxruntime, custom \([0-9a-f]{16}\)"),
    ],
)
def test_it_is_for_the_same_arguments(journal: Path, options: dict[str, Any], message: str) -> None:
    before = journal.read_bytes()
    with pytest.raises(qdq.DataError, match=message):
        recover(journal, **options)
    assert journal.read_bytes() == before


def test_a_recipe_that_does_not_fit_leaves_none(tmp_path: Path, without_files: None) -> None:
    journal = tmp_path / "j.json"
    with pytest.raises(qdq.CalibrationError, match="lower it"):
        recover(journal, recipe=qdq.Recipe(algorithms={"gptq": {"damping": 1e308}}))
    assert list(tmp_path.iterdir()) == []
    # An error of the user's own is none of the recipe.
    calls = 0

    def evaluate(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise qdq.CalibrationError("of the user's own")
        return 1.0

    data = [torch.linspace(-1, 1, 32).reshape(8, 4)]
    recipe = qdq.Recipe(algorithms=["gptq"])
    with pytest.raises(qdq.CalibrationError, match="of the user's own"):
        qdq.recover(net(), data, evaluate, journal=journal, progress=False, recipe=recipe)
    assert qdq.recover(net(), None, evaluate, journal=journal, progress=False, recipe=recipe).reached


def test_one_of_before_example_inputs_and_dynamic_shapes_is_read(journal: Path) -> None:
    data = json.loads(journal.read_text())
    assert data.pop("example_inputs") is None and data.pop("dynamic_shapes") is None
    journal.write_text(json.dumps(data))
    assert recover(journal).reached


def changed(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(fields)


def in_rung(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["rungs"][0].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(format="x"), "is no journal of qdq.recover"),
        (changed(version=7), "has version 7, which is not known here; this qdq reads version 2"),
        (lambda data: data.pop("baseline"), "is damaged: it lacks 'baseline'"),
        (lambda data: data["rungs"][0].pop("metric"), "is damaged: it lacks 'metric'"),
        (changed(target="much"), "is damaged: 'target' is 'much'"),
        (changed(baseline=float("nan")), "is damaged: 'baseline' is nan"),
        (changed(baseline=10**400), "is damaged: 'baseline' is 1000"),
        (in_rung(seconds=10**400), "is damaged: 'seconds' is 1000"),
        (changed(model=3), "is damaged: 'model' is 3"),
        (changed(dynamic_shapes=3), "is damaged: 'dynamic_shapes' is 3"),
        (changed(float_size="1"), "is damaged: 'float_size' is '1'"),
        (changed(orders={"float": ["a"]}), "is damaged: 'orders' holds other than lists of patterns"),
        (changed(orders={"float": [[]]}), "is damaged: 'orders' holds other than lists of patterns"),
        (in_rung(metric=None, error="E"), "is damaged: the first rung has no metric"),
        (changed(orders={"float": [[3]]}), "is damaged: 'orders' holds other than lists of patterns"),
        (changed(recipe={"colour": "red"}), "is damaged: .*'colour'"),
        (changed(start=[]), r"is damaged: 'start' is \[\]"),
        (changed(rungs=[3]), "is damaged: a rung is no object"),
        (in_rung(metric=None), "is damaged: a rung has neither a metric nor an error, or both"),
        (in_rung(error="E"), "is damaged: a rung has neither a metric nor an error, or both"),
        (in_rung(name="first"), "rung 0 of the journal .* is 'first', where this qdq tries 'as given'"),
        (in_rung(recipe={"version": 1}), "with its own recipe: it is of another version, or damaged"),
        (lambda data: data["rungs"].append(data["rungs"][0]), "holds more rungs than this qdq tries"),
        (changed(statistics="0"), "is not the file that the journal .* was made with; remove both"),
    ],
)
def test_damage_is_told(journal: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    data = json.loads(journal.read_text())
    change(data)
    journal.write_text(json.dumps(data))
    with pytest.raises(qdq.DataError, match=message):
        recover(journal)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null"])
def test_what_is_no_json_is_told(journal: Path, content: bytes) -> None:
    journal.write_bytes(content)
    with pytest.raises(qdq.DataError, match="is damaged|is no journal"):
        recover(journal)


def test_statistics_that_are_gone_are_told(journal: Path) -> None:
    journal.with_name("j.json.statistics.safetensors").unlink()
    with pytest.raises(qdq.DataError, match="statistics"):
        recover(journal)


def test_a_journal_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any, target: Any) -> None:
        if str(target).endswith(".json"):
            raise PermissionError(13, "Permission denied")
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(qdq.DataError, match=r"the journal .* cannot be written: Permission denied"):
        recover(tmp_path / "j.json")
    assert list(tmp_path.iterdir()) == []
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(qdq.DataError, match="pipe' cannot be written: it is a device or a pipe"):
            recover(tmp_path / "pipe", evaluated=[])


def test_a_folder_that_cannot_be_written_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    evaluated: list[nn.Module] = []
    with pytest.raises(qdq.DataError, match=r"j.json' cannot be written: Read-only file system"):
        recover(tmp_path / "j.json", evaluated=evaluated)
    assert evaluated == []


@pytest.mark.usefixtures("without_files")
def test_journals_of_one_stem_have_statistics_of_their_own(tmp_path: Path) -> None:
    paths = [tmp_path / "run.int8", tmp_path / "run.int4"]
    for path, factor in ((paths[0], 1.0), (paths[1], 0.5), (paths[0], 1.0)):
        assert recover(path, model=net(factor)).reached
    assert len(list(tmp_path.iterdir())) == 4


def test_statistics_without_a_journal_are_not_written_over(tmp_path: Path) -> None:
    own = tmp_path / "j.json.statistics.safetensors"
    own.write_bytes(b"mine")
    with pytest.raises(qdq.DataError, match="is there without its journal .*j.json', which would write over it"):
        recover(tmp_path / "j.json", evaluated=[])
    assert own.read_bytes() == b"mine"


@pytest.mark.usefixtures("without_files")
def test_a_recipe_that_does_not_fit_leaves_no_journal(tmp_path: Path) -> None:
    evaluated: list[nn.Module] = []
    for wrong in (qdq.Recipe(exclude=("nope",)), qdq.Recipe(overrides={"nope": "float"})):
        with pytest.raises(qdq.RecipeError, match="'nope' matches no module"):
            recover(tmp_path / "j.json", evaluated=evaluated, recipe=wrong)
    assert list(tmp_path.iterdir()) == [] and evaluated == []
    with pytest.raises(qdq.RecipeError, match="nope"):
        recover(tmp_path / "j.json", recipe=qdq.Recipe(algorithms={"adaround": {"layers": ["nope"]}}))
    assert list(tmp_path.iterdir()) == []
    assert recover(tmp_path / "j.json", recipe=qdq.Recipe(calibration="max", exclude=("2",))).reached


@pytest.mark.usefixtures("without_files")
def test_an_order_that_failed_unexpectedly_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise MemoryError("once")

    path = tmp_path / "j.json"
    with monkeypatch.context() as patch:
        patch.setattr("qdq.recovery.climbing.sensitivity", fail)
        with pytest.raises(MemoryError, match="once"):
            recover(path, falling=True, budget="1h")
    before = json.loads(path.read_text())
    assert before["orders"] == {} and before["rungs"]
    recover(path, falling=True, budget="0s")
    assert json.loads(path.read_text())["rungs"] == before["rungs"]


def test_a_journal_that_cannot_be_read_is_told(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(qdq.DataError, match="cannot be read: Permission denied"):
        recover(journal)
