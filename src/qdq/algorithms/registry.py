"""The algorithms by name, and those that a recipe asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RecipeError
from .adaround import AdaRound
from .algorithm import Algorithm
from .awq import AWQ
from .bias_correction import BiasCorrection
from .block_reconstruction import BlockReconstruction
from .equalization import Equalization
from .fine_tuning import FineTuning
from .gptq import GPTQ
from .smoothquant import SmoothQuant
from .weight_clipping import WeightClipping

ALGORITHMS: dict[str, type[Algorithm]] = {
    kind.name: kind
    for kind in (
        BiasCorrection,
        Equalization,
        SmoothQuant,
        AWQ,
        AdaRound,
        GPTQ,
        WeightClipping,
        BlockReconstruction,
        FineTuning,
    )
}


def algorithms_of(asked: Mapping[str, Mapping[str, Any]] | Sequence[str]) -> list[Algorithm]:
    """The algorithms that `Recipe.algorithms` names, with their options.

    Raises:
        RecipeError: an unknown algorithm or option (the known ones are listed), or a value that an option refuses.
    """
    named = asked if isinstance(asked, Mapping) else {name: {} for name in asked}
    return [_algorithm(name, options) for name, options in named.items()]


def _algorithm(name: str, options: Mapping[str, Any]) -> Algorithm:
    if name not in ALGORITHMS:
        raise RecipeError(f"algorithms: unknown algorithm {name!r}; known are {', '.join(sorted(ALGORITHMS))}")
    kind = ALGORITHMS[name]
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(options) - set(known), key=str)
    if unknown:
        told = f"its options are {', '.join(known)}" if known else "it has none"
        raise RecipeError(f"algorithms[{name!r}]: unknown option {unknown[0]!r}; {told}")
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"algorithms[{name!r}]: {error}") from error
