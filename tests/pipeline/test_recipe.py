"""Recipes: what they take, what files of them hold, and what they refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qdq
from qdq import Override, QuantDescriptor, Recipe, RecipeError
from qdq.recipe import CALIBRATION_METHODS, matches

PER_TENSOR = QuantDescriptor(num_bits=4, axis=None, narrow_range=True)
FIXED = QuantDescriptor(num_bits=8, amax=2.5)

bits = st.integers(2, 16) | st.just((4, 3))
weights = st.builds(
    lambda bits, axis: QuantDescriptor(num_bits=bits, axis=axis, narrow_range=True),
    bits,
    st.sampled_from([None, 0, (0,)]),
)
activations = st.builds(
    lambda bits, amax, unsigned: QuantDescriptor(bits, calib_method="histogram", amax=amax, unsigned=unsigned),
    bits,
    st.none() | st.floats(0.125, 100.0, width=32),
    st.booleans(),
)
methods = st.sampled_from(CALIBRATION_METHODS)
names = st.text("abc.*?[]012_ äß'\"#:", min_size=1, max_size=12)
overrides = st.dictionaries(
    names,
    st.just(float)
    | st.builds(
        Override,
        quantize=st.just(True),
        weights=st.none() | weights,
        activations=st.none() | activations,
        calibration=st.none() | methods,
    ),
    max_size=3,
)
recipes = st.builds(
    Recipe,
    weights=weights,
    activations=activations,
    calibration=methods,
    percentile=st.floats(50.5, 100.0),
    weight_calibration=st.sampled_from(["auto", "max", "mse"]),
    overrides=overrides,
    exclude=st.lists(names, max_size=3).map(tuple),
    attention=st.sampled_from([None, True, False]),
    reduce_range=st.sampled_from([None, True, False, "auto"]),
)
few = settings(max_examples=80, deadline=None, derandomize=True)


@few
@given(recipes)
def test_yaml_and_plain_data_give_an_equal_recipe_back(recipe: Recipe) -> None:
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.to_dict()["version"] == 1


def test_the_default_recipe_is_an_empty_file() -> None:
    assert Recipe().to_dict() == {"version": 1}
    assert Recipe.from_yaml("") == Recipe.from_toml("") == Recipe.from_dict({}) == Recipe()


YAML = """
version: 1
weights: {num_bits: 4}
calibration: percentile
percentile: 99.9
exclude: ["*.head", fc]
overrides:
  "stem.*": float
  "blocks.0": {weights: {num_bits: 4, axis: null}, calibration: max}
  "blocks.1": {activations: {amax: 6}}
attention: true
"""
TOML = """
version = 1
calibration = "percentile"
percentile = 99.9
exclude = ["*.head", "fc"]
attention = true
weights = {num_bits = 4}
[overrides]
"stem.*" = "float"
"blocks.0" = {weights = {num_bits = 4}, calibration = "max"}
"blocks.1" = {activations = {amax = 6}}
"""


def check(recipe: Recipe, axis: Any) -> None:
    # What a file does not say about a descriptor keeps the default, the axis above all.
    assert recipe.weights == QuantDescriptor(num_bits=4, axis=0, narrow_range=True)
    assert (recipe.calibration, recipe.percentile, recipe.attention) == ("percentile", 99.9, True)
    assert recipe.exclude == ("*.head", "fc")
    assert recipe.overrides["stem.*"] == Override(quantize=False)
    assert recipe.overrides["blocks.0"].weights == QuantDescriptor(num_bits=4, axis=axis, narrow_range=True)
    assert recipe.overrides["blocks.0"].calibration == "max"
    assert float(recipe.overrides["blocks.1"].activations.amax) == 6.0


def test_yaml_and_toml_by_hand(tmp_path: Path) -> None:
    check(Recipe.from_yaml(YAML), None)
    check(Recipe.from_toml(TOML), 0)
    for name, text in (("r.yaml", YAML), ("r.YML", YAML), ("r.toml", TOML)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        check(Recipe.load(tmp_path / name), 0 if name.endswith("toml") else None)
        check(Recipe.load(str(tmp_path / name)), 0 if name.endswith("toml") else None)


def test_float_the_type_and_the_word_keep_a_module_in_float() -> None:
    for value in (float, "float", Override(quantize=False)):
        assert Recipe(overrides={"a": value}).for_name("a") == Override(quantize=False)


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().calibration = "max"  # type: ignore[misc]


def test_later_patterns_win_and_fields_merge() -> None:
    recipe = Recipe(
        overrides={
            "*": Override(calibration="max", weights=PER_TENSOR),
            "a.*": Override(calibration="entropy"),
            "a.b": Override(activations=FIXED),
        }
    )
    assert recipe.for_name("c") == Override(calibration="max", weights=PER_TENSOR)
    assert recipe.for_name("a.c") == Override(calibration="entropy", weights=PER_TENSOR)
    assert recipe.for_name("a.b.weight") == Override(calibration="entropy", weights=PER_TENSOR, activations=FIXED)
    assert Recipe(overrides={"a": Override()}, exclude=("a",)).for_name("a").quantize is False
    assert Recipe(overrides={"a": float}).for_name("b", "c") == Override()
    assert Recipe(overrides={"a": float}, exclude=["b"]).patterns() == ["a", "b"]


def test_an_override_may_bring_a_module_back() -> None:
    recipe = Recipe(overrides={"*": float, "head": Override(quantize=True)})
    assert recipe.for_name("head").quantize is True
    assert recipe.for_name("body").quantize is False


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("head", "head", True),
        ("head", "head.0.weight", True),
        ("head", "heads", False),
        ("head", "body.head", False),
        ("*.head", "body.head.fc.weight", True),
        ("*.head", "head", False),
        ("blocks.?.conv", "blocks.3.conv.weight", True),
        ("blocks.[01].*", "blocks.2.conv", False),
        ("Head", "head", False),
    ],
)
def test_patterns_name_a_module_and_everything_inside_it(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"weights": 8}, "weights must be a QuantDescriptor, not int"),
    (
        {"weights": QuantDescriptor(num_bits=1)},
        r"weights.num_bits must be an integer from 2 to 16, or \(4, 3\) for E4M3",
    ),
    ({"weights": QuantDescriptor(num_bits=17)}, r"weights.num_bits must be an integer from 2 to 16, .*, not 17"),
    ({"weights": QuantDescriptor(axis=1)}, "weights.axis must be 0 .per output channel. or None .per tensor., not 1"),
    ({"weights": QuantDescriptor(unsigned=True)}, "weights.unsigned must be False"),
    (
        {"weights": QuantDescriptor(fake_quant=False)},
        "weights: fake_quant=False, learn_amax and scale_amax have no mean",
    ),
    ({"weights": QuantDescriptor(amax=1.0)}, "weights.amax must be None: the amax of a weight is taken from"),
    ({"activations": "int8"}, 'activations must be a QuantDescriptor or "float", not str'),
    ({"activations": QuantDescriptor(num_bits=1)}, "activations.num_bits must be an integer from 2 to 16, .* not 1"),
    ({"activations": QuantDescriptor(num_bits=17)}, "activations.num_bits must be an integer from 2 to 16, .* not 17"),
    ({"activations": QuantDescriptor(axis=0)}, "activations.axis must be None: the targets take one range"),
    ({"activations": QuantDescriptor(amax=[1.0, 2.0])}, "activations.amax must be one positive number"),
    ({"activations": QuantDescriptor(amax=0.0)}, "activations.amax must be one positive number"),
    ({"activations": QuantDescriptor(amax=float("inf"))}, "activations.amax must be one positive number"),
    ({"activations": QuantDescriptor(learn_amax=True)}, "activations: fake_quant=False, learn_amax and scale_amax"),
    ({"activations": QuantDescriptor(scale_amax=0.9)}, "activations: fake_quant=False, learn_amax and scale_amax"),
    ({"calibration": ["max"]}, r"calibration must be one of auto, .*, not \['max'\]"),
    ({"calibration": "kl"}, "calibration must be one of auto, max, percentile, mse, entropy, not 'kl'"),
    ({"weight_calibration": "entropy"}, "weight_calibration must be one of auto, max, mse, not 'entropy'"),
    ({"percentile": 50.0}, r"percentile must lie in \(50, 100\], not 50.0"),
    ({"percentile": 100.5}, r"percentile must lie in \(50, 100\], not 100.5"),
    ({"percentile": float("nan")}, r"percentile must lie in \(50, 100\], not nan"),
    ({"percentile": "99"}, "percentile must be a number, not '99'"),
    ({"percentile": True}, "percentile must be a number, not True"),
    ({"reduce_range": "yes"}, "reduce_range must be True, False or 'auto', not 'yes'"),
    ({"reduce_range": np.ones(2)}, r"reduce_range must be True, False or 'auto', not array"),
    ({"attention": "yes"}, "attention must be True, False or None, not 'yes'"),
    ({"tune": np.ones(2)}, r"tune must be 'latency' or None, not array"),
    ({"exclude": "*.head"}, "exclude must be a list of patterns, not the string"),
    ({"exclude": [1]}, "exclude must be a list of strings"),
    ({"exclude": 3}, "exclude must be a list"),
    ({"overrides": ["*.head"]}, "overrides must be a mapping, not list"),
    ({"exclude": (name for name in ["a", 1])}, "exclude must be a list of strings"),
    ({"overrides": {"a": Override(quantize="no")}}, r"overrides\['a'\].quantize must be True or False, not 'no'"),  # type: ignore[arg-type]
    ({"overrides": {"a": {1: 2, "b": 3}}}, r"unknown key 1 in overrides\['a'\]"),
    ({"overrides": {"a": {"activations": {"amax": 10**400}}}}, r"overrides\['a'\].activations: int too large"),
    ({"overrides": {"a": 4}}, r"overrides\['a'\] must be `float`, an Override or a mapping, not 4"),
    (
        {"overrides": {"a": {"bits": 4}}},
        r"unknown key 'bits' in overrides\['a'\]; known keys: weights, activations, cal",
    ),
    ({"overrides": {"a": {"calibration": "kl"}}}, r"overrides\['a'\].calibration must be one of auto"),
    (
        {"overrides": {"a": {"weights": {"num_bits": 32}}}},
        r"overrides\['a'\].weights.num_bits must be an integer from 2 to 16, .* not 32",
    ),
    ({"overrides": {"a": {"weights": 4}}}, r"overrides\['a'\].weights must be a mapping, not int"),
    ({"overrides": {"a": {"weights": {"bits": 4}}}}, r"overrides\['a'\].weights: .*bits"),
    (
        {"overrides": {"a": Override(activations=QuantDescriptor(num_bits=1))}},
        r"overrides\['a'\].activations.num_bits must be an integer from 2 to 16",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_values_out_of_range_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**fields)


ONLY_FOR_MODULES: list[tuple[dict[str, Any], str]] = [
    ({"weights": QuantDescriptor(num_bits=9)}, "^weights.num_bits must be an integer from 2 to 8, not 9$"),
    ({"weights": QuantDescriptor(num_bits=(4, 3))}, r"^weights.num_bits must be an integer from 2 to 8, not \(4, 3\)$"),
    (
        {"activations": QuantDescriptor(num_bits=4)},
        "^activations.num_bits must be 8 or 16, not 4: a file stores no other$",
    ),
    (
        {"activations": QuantDescriptor(num_bits=(4, 3))},
        r"^activations.num_bits must be 8 or 16, not \(4, 3\): a file stores no other$",
    ),
    (
        {"overrides": {"a": {"weights": {"num_bits": 16}}}},
        r"^overrides\['a'\].weights.num_bits must be an integer from 2 to 8, not 16$",
    ),
    (
        {"overrides": {"a": Override(activations=PER_TENSOR)}},
        r"^overrides\['a'\].activations.num_bits must be 8 or 16, not ",
    ),
]


@pytest.mark.parametrize(("fields", "message"), ONLY_FOR_MODULES, ids=lambda v: v if isinstance(v, str) else "")
def test_codes_that_no_target_computes_with_are_refused_at_the_door_of_quantize(
    fields: dict[str, Any], message: str
) -> None:
    recipe = Recipe(**fields)
    with pytest.raises(RecipeError, match=message):
        recipe.check_deployable()
    with pytest.raises(RecipeError, match=message):
        qdq.quantize(nn.Linear(2, 2), [torch.zeros(1, 2)], recipe=recipe)


def test_codes_of_a_deployment_pass() -> None:
    for bits in range(2, 9):
        Recipe(weights=QuantDescriptor(num_bits=bits), overrides={"a": float}).check_deployable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("calibrations: max", "unknown key 'calibrations' in recipe; known keys: weights, activations, calibration, p"),
        ("version: 2", "recipe version 2 is not known here; this qdq reads version 1"),
        ("- a\n- b", "a recipe must be a mapping, not list"),
        ("weights: 4", "weights must be a mapping, not int"),
        ("weights: {num_bits: 4, colour: red}", "weights: .*colour"),
        ("weights: {num_bits: four}", "weights: .*num_bits"),
        ("weights: {num_bits: [5, 2]}", r"weights: num_bits must be an integer, or \(4, 3\) for E4M3, got \(5, 2\)"),
        ("a: [", "the recipe is not valid YAML"),
        ("a: 2024-13-45", "the recipe is not valid YAML: month must be in"),
        ("a: !!int ''", "the recipe is not valid YAML"),
        ("[" * 3000, "the recipe is not valid YAML: it is nested too deep"),
        ("1: a\nb: c", "unknown key 1 in recipe; known keys"),
    ],
)
def test_files_with_mistakes_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(text)


def test_toml_with_mistakes_is_refused() -> None:
    with pytest.raises(RecipeError, match="the recipe is not valid TOML"):
        Recipe.from_toml("a = [")
    with pytest.raises(RecipeError, match="unknown key 'a' in recipe"):
        Recipe.from_toml("a = 1")


def test_paths_with_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="r.json' must end in .yaml, .yml or .toml"):
        Recipe.load(tmp_path / "r.json")
    with pytest.raises(RecipeError, match="r.yaml' cannot be read: No such file or directory"):
        Recipe.load(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="path must be that of a recipe file, not None"):
        Recipe.load(None)  # type: ignore[arg-type]
    for name, content, message in (
        ("r.yaml", "calibration: é".encode("latin-1"), "r.yaml' is not text in UTF-8"),
        ("r.toml", b"\x80\x00", "r.toml' is not text in UTF-8"),
        ("r.yaml", b"a: 2024-13-45", "r.yaml': the recipe is not valid YAML: month"),
        ("r.toml", b"a = 2024-13-45", "r.toml': the recipe is not valid TOML"),
        ("r.toml", b"a = " + b"[" * 3000, "r.toml': the recipe is not valid TOML: it is nested too deep"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            Recipe.load(tmp_path / name)


def test_patterns_may_come_one_by_one() -> None:
    names = ["features.0", "head"]
    for patterns in ((name for name in names), filter(None, names), map(str, names), dict.fromkeys(names)):
        assert Recipe(exclude=patterns).exclude == ("features.0", "head")  # type: ignore[arg-type]


def test_numbers_of_numpy_are_written_as_those_of_python() -> None:
    recipe = Recipe(
        calibration="percentile",
        percentile=np.float64(99.9),
        reduce_range=np.True_,  # type: ignore[arg-type]
        algorithms={"adaround": {"learning_rate": np.float64(0.5), "layers": [np.str_("a")]}},
    )
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
