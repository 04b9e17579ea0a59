"""The ladder of `qdq.recover`: the recipes that are tried, each built on the best one so far."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from ..constant_quantizers import CLIPPED_BITS
from ..descriptor import QuantDescriptor
from ..recipe import Recipe

# The order of application, also of what no rung adds: what moves factors between layers (each from what those before it
# left), then step sizes, codes, the biases that go with them, and training.
_ORDER = (
    "equalization",
    "smoothquant",
    "awq",
    "weight_clipping",
    "adaround",
    "gptq",
    "block_reconstruction",
    "bias_correction",
    "fine_tuning",
)
# Each sets the codes of a layer by itself. Behind AdaRound of some layers, GPTQ finds codes there and leaves them.
_ROUNDINGS = ("gptq", "adaround", "block_reconstruction")
# As rungs are named.
_NAMES = {"smoothquant": "SmoothQuant", "gptq": "GPTQ of small layers", "bias_correction": "bias correction"}
FULL_BITS = 8

# The names of a layer's weight, from the layer that costs most on.
Order = Sequence[Sequence[str]]


def climb(start: Recipe, best: Callable[[], Recipe], worst: Callable[[str], Order]) -> Iterator[tuple[str, Recipe]]:
    """The rungs, name and recipe. Each is made when it is asked for, from the best recipe by then.

    No recipe comes twice: a rung that would not change the best one, as that has what the rung adds, is left out.

    Args:
        start: the user's recipe, the first rung.
        best: the best recipe so far.
        worst: takes "rounding", "8 bits" or "float" and gives patterns of the layers that could be changed so, the
            worst first.
    """
    tried = [start]
    yield "as given", start
    for name, recipe in _rungs(best, worst):
        if not any(same_recipe(recipe, other) for other in tried):
            tried.append(recipe)
            yield name, recipe


def same_recipe(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes are written alike; the order of algorithms and overrides counts."""
    return json.dumps(one.to_dict(), default=repr) == json.dumps(other.to_dict(), default=repr)


def _rungs(best: Callable[[], Recipe], worst: Callable[[str], Order]) -> Iterator[tuple[str, Recipe]]:
    yield _like_the_default(best())
    yield "equalization", _add(best(), "equalization")
    yield "per-channel weights", _weights(best(), _per_channel)
    # Where codes are chosen already, those of a part of the layers would lose by it.
    order = () if _roundings(best(), of_all=True) else worst("rounding")
    if len(order) > 1:
        some = _first(order, math.ceil(len(order) / 4))
        yield f"AdaRound of the {_layers(len(some))}", _add(best(), "adaround", {"layers": some})
    yield "AdaRound", _everywhere(_add(best(), "adaround"), "adaround")
    if _has_few_bits(best()):
        base, order = best(), worst("8 bits")
        for count in _doubling(len(order)):
            yield f"8-bit weights of the {_layers(count)}", _with(base, _first(order, count), weights=_full_bits)
        yield "8-bit weights", _weights(best(), _full_bits)
    base, order = best(), worst("float")
    for count in _doubling(len(order)):
        names = _first(order, count)
        yield f"activations of the {_layers(count)} in float", _with(base, names, activations="float")
        yield f"{_layers(count)} in float", dataclasses.replace(base, exclude=(*base.exclude, *names))
    yield "fine-tuning", _add(best(), "fine_tuning")


def _like_the_default(recipe: Recipe) -> tuple[str, Recipe]:
    """The recipe with what `Recipe()` would have found its ranges by and improved them with; named by what is new."""
    default, changes = Recipe(), []
    if recipe.calibration != default.calibration:
        recipe = dataclasses.replace(recipe, calibration=default.calibration)
        changes.append(f"calibration {default.calibration}")
    clipped = recipe != _weights(recipe, _more_than_clipped)
    if recipe.weight_calibration != default.weight_calibration and clipped:
        recipe = dataclasses.replace(recipe, weight_calibration=default.weight_calibration)
        changes.append(f"weight calibration {default.weight_calibration}")
    for name, options in default.algorithms.items():  # type: ignore[union-attr]
        if name not in recipe.algorithms and not (name in _ROUNDINGS and _roundings(recipe)):
            recipe = _add(recipe, name, options)
            changes.append(_NAMES[name])
    return ", ".join(changes), recipe


def _doubling(most: int) -> Iterator[int]:
    """1, 2, 4 ... below `most`: all layers at once are not among them."""
    count = 1
    while count < most:
        yield count
        count *= 2


def _layers(count: int) -> str:
    return "worst layer" if count == 1 else f"{count} worst layers"


def _first(order: Order, count: int) -> list[str]:
    return list(dict.fromkeys(pattern for patterns in order[:count] for pattern in patterns))


def _add(recipe: Recipe, name: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe with one more algorithm at its place; the recipe itself where it has it."""
    if name in recipe.algorithms:
        return recipe
    known = _without(recipe, _roundings(recipe, of_all=True) if name in _ROUNDINGS else ())
    later = [index for index, other in enumerate(known) if other in _ORDER[_ORDER.index(name) :]]
    position = later[0] if later else len(known)
    items = list(known.items())
    return dataclasses.replace(recipe, algorithms=dict([*items[:position], (name, options or {}), *items[position:]]))


def _everywhere(recipe: Recipe, name: str) -> Recipe:
    """The recipe with an algorithm applied to all layers."""
    known = _without(recipe, set(_ROUNDINGS) - {name})
    options = {option: value for option, value in known[name].items() if option != "layers"}
    return dataclasses.replace(recipe, algorithms={**known, name: options})


def _without(recipe: Recipe, names: Collection[str]) -> dict[str, Mapping[str, Any]]:
    """The algorithms of a recipe but these, in order."""
    known = recipe.algorithms
    assert isinstance(known, Mapping)
    return {name: options for name, options in known.items() if name not in names}


def _roundings(recipe: Recipe, of_all: bool = False) -> list[str]:
    """The algorithms of a recipe that choose codes; `of_all` leaves out GPTQ of layers of few products alone."""
    known = recipe.algorithms
    assert isinstance(known, Mapping)
    found = [name for name in _ROUNDINGS if name in known]
    return [n for n in found if not (of_all and n == "gptq" and known[n].get("most_products") is not None)]


def _weights(recipe: Recipe, change: Callable[[QuantDescriptor], QuantDescriptor]) -> Recipe:
    """The recipe with all its descriptors of weights changed."""
    overrides = {
        pattern: dataclasses.replace(override, weights=change(override.weights)) if override.weights else override
        for pattern, override in recipe.overrides.items()
    }
    return dataclasses.replace(recipe, weights=change(recipe.weights), overrides=overrides)


def _with(
    recipe: Recipe,
    names: Sequence[str],
    weights: Callable[[QuantDescriptor], QuantDescriptor] | None = None,
    activations: str | None = None,
) -> Recipe:
    """The recipe with an override for each name, of the weight's descriptor or of the activations."""
    overrides = dict(recipe.overrides)
    for name in names:
        override = recipe.for_name(name)
        if weights is not None:
            override = dataclasses.replace(override, weights=weights(recipe.weights_for(name)))
        if activations is not None:
            override = dataclasses.replace(override, activations=activations)
        # All that holds for the layer, and last, so that it wins over the patterns before it.
        overrides.pop(name, None)
        overrides[name] = override
    return dataclasses.replace(recipe, overrides=overrides)


def _has_few_bits(recipe: Recipe) -> bool:
    return recipe != _weights(recipe, _full_bits)


def _full_bits(weights: QuantDescriptor) -> QuantDescriptor:
    return _changed(weights, num_bits=FULL_BITS)


def _more_than_clipped(weights: QuantDescriptor) -> QuantDescriptor:
    few = isinstance(weights.num_bits, int) and weights.num_bits <= CLIPPED_BITS
    return _full_bits(weights) if few else weights


def _per_channel(weights: QuantDescriptor) -> QuantDescriptor:
    return _changed(weights, axis=0) if weights.axis is None else weights


def _changed(descriptor: QuantDescriptor, **changes: Any) -> QuantDescriptor:
    return QuantDescriptor(**{**descriptor.dict(), **changes})
