"""The ladder of `qdq.recover`: which rungs there are, and what each changes, without a model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from qdq.algorithms.registry import ALGORITHMS
from qdq.descriptor import QuantDescriptor
from qdq.recipe import Recipe
from qdq.recovery.ladder import climb

RANGES = Recipe(weights=QuantDescriptor(8, narrow_range=True), calibration="max", algorithms=[])


def rungs(start: Recipe, layers: Sequence[str] = (), kept: bool = True) -> dict[str, Recipe]:
    """The rungs by name, where each is the best when it is tried, or where the start stays it."""
    out: dict[str, Recipe] = {}
    for name, recipe in climb(
        start, lambda: list(out.values())[-1 if kept else 0], lambda change: [[layer] for layer in layers]
    ):
        assert name and name not in out
        out[name] = recipe
    return out


def test_the_default_recipe_has_what_the_second_rung_adds() -> None:
    assert list(rungs(Recipe())) == ["as given", "equalization", "AdaRound", "fine-tuning"]


def test_from_ranges_alone_every_algorithm_finds_its_place() -> None:
    tried = rungs(RANGES)
    assert list(tried) == [
        "as given",
        "calibration auto, SmoothQuant, GPTQ of small layers, bias correction",
        "equalization",
        "per-channel weights",
        "AdaRound",
        "fine-tuning",
    ]
    like_the_default = tried["calibration auto, SmoothQuant, GPTQ of small layers, bias correction"]
    assert (like_the_default.calibration, like_the_default.algorithms) == (Recipe().calibration, Recipe().algorithms)
    assert like_the_default.weights == RANGES.weights
    assert list(tried["fine-tuning"].algorithms) == [
        "equalization",
        "smoothquant",
        "adaround",
        "bias_correction",
        "fine_tuning",
    ]
    assert set(tried["fine-tuning"].algorithms) <= set(ALGORITHMS)


@pytest.mark.parametrize(
    ("recipe", "second"),
    [
        (Recipe(calibration="mse"), "calibration auto"),
        (Recipe(weight_calibration="max"), "equalization"),
        (Recipe(weights=QuantDescriptor(4, axis=0), weight_calibration="max"), "weight calibration auto"),
        (Recipe(weights=QuantDescriptor(7, axis=0), weight_calibration="max"), "equalization"),
        (Recipe(algorithms=["bias_correction"]), "SmoothQuant, GPTQ of small layers"),
        (Recipe(algorithms=["adaround", "bias_correction"]), "SmoothQuant"),
        (Recipe(algorithms=["smoothquant", "gptq"]), "bias correction"),
        (Recipe(algorithms=[]), "SmoothQuant, GPTQ of small layers, bias correction"),
        (Recipe(algorithms={"bias_correction": {}, "gptq": {}, "smoothquant": {"alpha": 0.7}}), "equalization"),
        (Recipe(algorithms=["equalization", "smoothquant", "bias_correction"]), "GPTQ of small layers"),
    ],
)
def test_only_what_is_lacking_is_tried_and_named(recipe: Recipe, second: str) -> None:
    for kept in (True, False):
        tried = rungs(recipe, kept=kept)
        assert list(tried)[1] == second
        texts = [one.to_yaml() for one in tried.values()]
        assert len(set(texts)) == len(texts)
    assert tried[second].algorithms.keys() >= recipe.algorithms.keys()  # type: ignore[union-attr]


def test_algorithms_of_the_user_keep_their_order_and_options() -> None:
    user = {"awq": {}, "gptq": {"damping": 0.1}, "bias_correction": {}}
    tried = rungs(Recipe(algorithms=user), kept=False)
    assert list(tried["SmoothQuant"].algorithms) == ["smoothquant", "awq", "gptq", "bias_correction"]
    assert tried["SmoothQuant"].algorithms["gptq"] == {"damping": 0.1}  # type: ignore[call-overload]
    # Of the algorithms that set the codes of a layer there can be one.
    assert list(tried["AdaRound"].algorithms) == ["awq", "adaround", "bias_correction"]


def test_adaround_of_the_user_is_spread_over_all_layers_alone() -> None:
    tried = rungs(Recipe(algorithms={"adaround": {"steps": 50, "layers": ["a"]}}), ["a", "b", "c"])
    assert not any("AdaRound of" in name for name in tried)
    assert tried["AdaRound"].algorithms["adaround"] == {"steps": 50}  # type: ignore[call-overload]
    assert "AdaRound" not in rungs(Recipe(algorithms={"adaround": {"steps": 50}}), ["a", "b", "c"])


@pytest.mark.parametrize("rounding", ["gptq", "block_reconstruction"])
def test_where_all_codes_are_chosen_those_of_some_layers_are_not(rounding: str) -> None:
    tried = rungs(Recipe(algorithms=[rounding]), ["a", "b", "c"], kept=False)
    assert "AdaRound" in tried and not any("AdaRound of" in name for name in tried)


def test_each_algorithm_is_added_at_its_place_among_all_others() -> None:
    order = [
        *("equalization", "smoothquant", "awq"),
        *("weight_clipping", "adaround", "gptq", "block_reconstruction", "bias_correction", "fine_tuning"),
    ]
    assert set(order) == set(ALGORITHMS)
    for name, lacking in (("equalization", 0), ("fine-tuning", 8), ("SmoothQuant", 1), ("bias correction", 7)):
        others = order[:lacking] + order[lacking + 1 :]
        tried = rungs(Recipe(algorithms=others), kept=False)
        assert list(tried[name].algorithms) == order
    # What scales the weights comes before what has looked at their sizes.
    tried = rungs(Recipe(algorithms=["awq"]))
    assert list(tried["equalization"].algorithms) == ["equalization", "smoothquant", "awq", "gptq", "bias_correction"]
    few = rungs(Recipe(algorithms=["awq", "weight_clipping", "block_reconstruction"]), kept=False)
    assert list(few["AdaRound"].algorithms) == ["awq", "weight_clipping", "adaround"]


def test_weights_of_few_bits_and_the_worst_layers_take_rungs_of_their_own() -> None:
    few = Recipe(weights=QuantDescriptor(4, axis=0, narrow_range=True))
    assert list(rungs(few, ["a", "b", "c"], kept=False)) == [
        "as given",
        "equalization",
        "AdaRound of the worst layer",
        "AdaRound",
        "8-bit weights of the worst layer",
        "8-bit weights of the 2 worst layers",
        "8-bit weights",
        "activations of the worst layer in float",
        "worst layer in float",
        "activations of the 2 worst layers in float",
        "2 worst layers in float",
        "fine-tuning",
    ]
    # A quarter of the layers first.
    many = rungs(Recipe(), list("abcdefghi"))
    assert many["AdaRound of the 3 worst layers"].algorithms["adaround"] == {"layers": ["a", "b", "c"]}  # type: ignore[call-overload]
    assert many["AdaRound"].algorithms["adaround"] == {}  # type: ignore[call-overload]
    # GPTQ of small layers stays beside AdaRound of others, behind it, and has nothing to do beside that of all.
    names = ["equalization", "smoothquant", "adaround", "gptq", "bias_correction"]
    assert list(many["AdaRound of the 3 worst layers"].algorithms) == names
    assert list(many["AdaRound"].algorithms) == [name for name in names if name != "gptq"]
    # Once weights have 8 bits there is nothing of theirs to be raised.
    assert "8-bit weights" not in rungs(Recipe(), ["a", "b", "c"])
