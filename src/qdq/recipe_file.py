"""Files of recipes: YAML and TOML, read to plain data and written from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import RecipeError


def yaml_of(data: Mapping[str, Any]) -> str:
    """Plain data as YAML, in the order of its keys."""
    import yaml  # when used: it costs a sixth of qdq's import

    return yaml.safe_dump(dict(data), sort_keys=False)


def data_in_yaml(text: str) -> Any:
    """What a YAML text holds, an empty mapping if it is nothing.

    Raises:
        RecipeError: not YAML.
    """
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
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
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"the recipe is not valid TOML: {error}") from error


_READERS = {".yaml": data_in_yaml, ".yml": data_in_yaml, ".toml": data_in_toml}


def data_in_file(path: Path) -> Any:
    """What a file holds, by the ending of its name.

    Raises:
        RecipeError: the file is missing or of another kind.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise RecipeError(f"recipe file {str(path)!r} must end in .yaml, .yml or .toml")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"recipe file {str(path)!r} cannot be read: {error.strerror}") from error
    return reader(text)
