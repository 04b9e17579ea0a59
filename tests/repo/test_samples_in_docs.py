"""The pages on single topics: their samples run as they stand, and their tables of options and defaults are true."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import qdq
from qdq.algorithms.registry import ALGORITHMS
from qdq.calib.statistics import Statistics

DOCS = Path(__file__).resolve().parents[2] / "docs"

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="not run from a source tree")

Names = dict[str, Any]


def domains(path: str) -> set[str]:
    return {node.domain for node in onnx.load(path).graph.node}


def recipes(names: Names, printed: str) -> None:
    assert domains("packed.onnx") == {"", "com.microsoft"}
    assert domains("standard.onnx") == {""}
    assert printed.count("SQNR") == 2
    assert qdq.verify(names["packed"], "packed.onnx", names["batches"], progress=False).sqnr_db > 60
    assert qdq.verify(names["standard"], "standard.onnx", names["batches"], progress=False).sqnr_db < 60


def sensitivity(names: Names, printed: str) -> None:
    text = (DOCS / "sensitivity.md").read_text(encoding="utf-8")
    table = text.partition("```\nquantized model")[2].partition("```")[0]
    quantizers = [line.split()[:4] for line in table.splitlines()[2:]]
    assert sorted(quantizers) == sorted(line.split()[:4] for line in printed.splitlines()[2:])
    assert names["found"].in_float == 1.0


def algorithms(names: Names, printed: str) -> None:
    assert names["qmodel"].get_submodule("0.weight_quantizer").num_bits == 4
    assert Path("model.onnx").is_file()


def recovery(names: Names, printed: str) -> None:
    assert "as given" in printed and Path("recovery.json").is_file()
    images = names["images"]
    assert names["rung"].metric == pytest.approx(names["evaluate"](names["qmodel"]))
    assert names["found"].model(images).shape == (len(images), 10)


def statistics(names: Names, printed: str) -> None:
    assert isinstance(names["statistics"], Statistics)
    assert qdq.explain(names["other"]).recipe.calibration == "entropy"


def latency_tuning(names: Names, printed: str) -> None:
    assert qdq.Recipe.from_yaml(printed) == qdq.explain(names["qmodel"]).recipe
    assert Path("model.onnx").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("check", [recipes, sensitivity, algorithms, recovery, statistics, latency_tuning])
def test_the_blocks_of_a_page_run_one_after_the_other(
    check: Callable[[Names, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = DOCS / f"{check.__name__}.md"
    names: Names = {"__name__": "__main__"}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for block in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            exec(compile(block, str(document), "exec"), names)
    check(names, out.getvalue())


def rows(page: str, first_cell: str) -> list[list[str]]:
    """The rows of the table whose heading begins with this cell."""
    text = (DOCS / page).read_text(encoding="utf-8")
    table = text[text.index(f"| {first_cell} |") :].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def plain(value: Any) -> str:
    """A default as the tables write it."""
    if value is None:
        return "all"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_options_of_every_algorithm_have_their_defaults() -> None:
    written: dict[str, dict[str, str]] = {}
    name = ""
    for algorithm, option, default, *_ in rows("algorithms.md", "algorithm"):
        name = algorithm.strip("`") or name
        written.setdefault(name, {})
        if option != "none":
            written[name][option.strip("`")] = default.strip("`")
    below = (DOCS / "algorithms.md").read_text(encoding="utf-8")
    assert "so many `positions` (16384)" in below and below.count("with a `seed` (0)") == 2
    for name, kind in ALGORITHMS.items():
        fields = {f.name: f.default for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
        for told_once, value in (("positions", 16384), ("seed", 0)):
            if told_once not in written[name]:
                assert fields.pop(told_once, value) == value
        assert written[name] == {option: plain(default) for option, default in fields.items()}
    assert set(written) == set(ALGORITHMS)


def test_the_fields_of_a_recipe_have_their_defaults() -> None:
    written = {row[0].strip("`"): row[1] for row in rows("recipes.md", "field")}
    recipe = qdq.Recipe()
    assert {field.name for field in dataclasses.fields(recipe)} <= set(written)
    for name in ("calibration", "percentile", "weight_calibration"):
        assert written[name].strip("`") == str(getattr(recipe, name))
    assert re.findall(r"`(\w+)`", written["algorithms"]) == list(recipe.algorithms)
    assert written["weights"] == f"{recipe.weights.num_bits} bits, `axis: {recipe.weights.axis}`"
    assert written["activations"] == "8 bits" and isinstance(recipe.activations, qdq.QuantDescriptor)
    assert (recipe.overrides, recipe.exclude) == ({}, ()) and written["overrides"] == written["exclude"] == "none"
    assert recipe.tune is recipe.attention is recipe.reduce_range is None
