"""The arguments of `qdq.recover`: what they may be, and what they mean."""

from __future__ import annotations

import json
import math
import numbers
import re
from pathlib import Path
from typing import Any

from ..atomic_file import obstacle, path_of
from ..errors import DataError, QdqError, RecipeError
from ..recipe import Recipe
from .journal import statistics_path

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def seconds_of(budget: Any) -> float:
    """The budget in seconds.

    Raises:
        RecipeError: it is no time.
    """
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(s|min|h)\s*", budget)
        if found:
            return float(found[1]) * _UNITS[found[2]]
    elif _float(budget) >= 0:
        return _float(budget)
    raise RecipeError(f'budget must be seconds or text such as "90s", "10min" or "1h", not {budget!r}')


def check_target(target: Any) -> float:
    """The share of the float model's metric.

    Raises:
        QdqError: it is none.
    """
    if not 0 < _float(target) <= 1:
        raise QdqError(
            f"target must be a share of the float model's metric, above 0 and at most 1, not {target!r}; the runtime "
            "is deploy_target"
        )
    return _float(target)


def check_path(journal: Any) -> Path:
    """Where the journal is, or is to be.

    Raises:
        QdqError, DataError: no file can be there.
    """
    path = path_of(journal, "journal")
    reason = obstacle(path) or obstacle(statistics_path(path))
    if reason is not None:
        raise DataError(f"the journal {str(path)!r} cannot be written: {reason}")
    beside = statistics_path(path)
    if beside.exists() and not path.exists():
        raise DataError(
            f"{str(beside)!r} is there without its journal {str(path)!r}, which would write over it: remove or move "
            "it, or give another path"
        )
    return path


def check_json(recipe: Recipe) -> None:
    """Refuses a recipe that a journal cannot hold.

    Raises:
        RecipeError: it holds a value that is no plain data.
    """
    try:
        json.dumps(recipe.to_dict())
    except (TypeError, ValueError) as error:
        raise RecipeError(f"recipe holds a value that a journal cannot: {error}") from error


def _float(value: Any) -> float:
    """A real number as a float; NaN for anything else, and for an integer beyond all floats."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
