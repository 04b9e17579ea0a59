"""Whether a recipe can be carried out for a target: told before any data is looked at."""

from __future__ import annotations

from .algorithms.algorithm import Algorithm
from .algorithms.registry import algorithms_of
from .graph.targets import Target, check_activation_bits
from .recipe import Recipe
from .tuning.latency import check_tunable


def check_for_target(recipe: Recipe, target: Target) -> list[Algorithm]:
    """Refuses a recipe that `qdq.quantize` could not apply to any model.

    Returns:
        The recipe's algorithms.

    Raises:
        RecipeError: bits that no file stores or that the target does not take, an unknown algorithm or option of one,
            or `tune` for another target than ONNX Runtime.
        RuntimeMissingError: the recipe has `tune`, and onnxruntime is not installed.
    """
    recipe.check_deployable()
    check_activation_bits(target, recipe)
    check_tunable(recipe, target)
    return algorithms_of(recipe.algorithms)
