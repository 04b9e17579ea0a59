"""Files of recipes: YAML and TOML, read to plain data and written from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RecipeError


def yaml_of(data: Mapping[str, Any]) -> str:
    """Plain data as YAML, in the order of its keys."""
    import yaml  # when used: it costs a sixth of qdq's import

    return yaml.safe_dump(_plain(data), sort_keys=False)


def data_in_yaml(text: str) -> Any:
    """What a YAML text holds, an empty mapping if it is nothing.

    Raises:
        RecipeError: not YAML.
    """
    import yaml

    try:
        data = yaml.safe_load(text)
    except RecursionError as error:
        raise RecipeError("the recipe is not valid YAML: it is nested too deep") from error
    except Exception as error:  # PyYAML lets pass what its constructors raise of a malformed date or number
        raise RecipeError(f"the recipe is not valid YAML: {error}") from error
    return {} if data is None else data


def data_in_toml(text: str) -> dict[str, Any]:
    """What a TOML text holds.

    Raises:
        RecipeError: not TOML.
    """
    try:
        import tomllib  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # pyright: ignore[reportMissingImports]
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise RecipeError("the recipe is not valid TOML: it is nested too deep") from error
    except ValueError as error:
        raise RecipeError(f"the recipe is not valid TOML: {error}") from error


_READERS = {".yaml": data_in_yaml, ".yml": data_in_yaml, ".toml": data_in_toml}


def data_in_file(path: Path) -> Any:
    """What a file holds, by the ending of its name.

    Raises:
        RecipeError: the file is missing, is of another kind, or does not hold what its ending says.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise RecipeError(f"recipe file {str(path)!r} must end in .yaml, .yml or .toml")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"recipe file {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe file {str(path)!r} is not text in UTF-8: {error}") from error
    try:
        return reader(text)
    except RecipeError as error:
        raise RecipeError(f"recipe file {str(path)!r}: {error}") from error


def _plain(value: Any) -> Any:
    """A value without the numbers of NumPy, which YAML does not know."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
