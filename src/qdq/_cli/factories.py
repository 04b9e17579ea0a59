"""``file.py:name`` and ``package.module:name``: a function of the user's, found and called.

Both run the user's code, which the help texts say.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from qdq._cli.errors import CommandError, UsageError, one_line


def is_factory_spec(text: str) -> bool:
    """True for ``something:name`` with a Python name at the end (a drive letter and a path are none)."""
    head, colon, name = text.rpartition(":")
    return bool(colon and head) and name.isidentifier()


def load_callable(spec: str, *, argument: str) -> Callable[..., Any]:
    """Imports the module of ``spec`` and returns the callable it names.

    Args:
        spec: ``file.py:name`` or ``package.module:name``.
        argument: how the command line calls it (MODEL, --data, --eval), for messages.

    Raises:
        UsageError: malformed, no such file, module or name, or it is not callable.
        CommandError: the module raised an exception while it was imported.
    """
    head, colon, name = spec.rpartition(":")
    if not colon or not head or not name.isidentifier():
        raise UsageError(f"{argument} {spec!r} is neither file.py:name nor package.module:name")
    module = _from_file(head, argument) if head.endswith(".py") else _from_name(head, argument)
    try:
        found = getattr(module, name)
    except AttributeError:
        raise UsageError(f"{argument} {spec!r}: {head} defines no {name!r}") from None
    if not callable(found):
        raise UsageError(f"{argument} {spec!r}: {name} is a {type(found).__name__}, not a function to call")
    return found


def call(function: Callable[..., Any], spec: str, *args: Any, argument: str) -> Any:
    """Calls the user's function; an exception of its own becomes one line that says whose it is."""
    try:
        return function(*args)
    except (KeyboardInterrupt, CommandError):
        raise
    except Exception as error:
        raise CommandError(f"{argument} {spec!r} raised {type(error).__name__}: {one_line(error)}") from error


def _from_file(path_text: str, argument: str) -> ModuleType:
    path = Path(path_text).resolve()
    if not path.is_file():
        raise UsageError(f"{argument}: no such file: {path_text}")
    # One module per file, however often the command line names it (model and data may live in one file).
    name = f"_qdq_user_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # before execution: dataclasses and pickling look the module up
    _search_beside(path.parent)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise CommandError(f"{argument}: {path_text} cannot be imported: {type(error).__name__}: {error}") from error
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_name(name: str, argument: str) -> ModuleType:
    _search_beside(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(missing + "."):
            raise UsageError(f"{argument}: there is no module {missing!r} on the import path") from None
        raise CommandError(f"{argument}: {name} cannot be imported: it needs {missing!r}") from error
    except Exception as error:
        raise CommandError(f"{argument}: {name} cannot be imported: {type(error).__name__}: {error}") from error


def _search_beside(folder: Path) -> None:
    """The file's own folder (or the current one) comes first, as with ``python file.py``."""
    text = str(folder)
    if text not in sys.path:
        sys.path.insert(0, text)
