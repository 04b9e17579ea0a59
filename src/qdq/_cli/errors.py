"""How a command ends: exit codes, one readable line on stderr, a traceback only on request."""

from __future__ import annotations

import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import typer

OK = 0
FAILED = 1
USAGE = 2
INTERRUPTED = 130

_PACKAGE_OF_MODULE = {"PIL": "pillow", "sklearn": "scikit-learn"}
_Command = TypeVar("_Command", bound=Callable[..., Any])


class CommandError(Exception):
    """The job could not be done (exit code 1)."""

    exit_code = FAILED


class UsageError(CommandError):
    """The command was called wrongly: an unknown name, a missing file, a malformed argument (exit code 2)."""

    exit_code = USAGE


def one_line(error: BaseException) -> str:
    """The error as one line: its message for our own errors, class and message for others'."""
    text = " ".join(str(error).split())
    own = isinstance(error, CommandError) or type(error).__module__.partition(".")[0] == "qdq"
    if own and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def guarded(command: _Command) -> _Command:
    """Wraps a command that takes ``debug``: every exception becomes one line on stderr and an exit code.

    0 is left to the command itself, 1 is a job that failed, 2 a command called wrongly, 130 an interrupt.
    """

    @functools.wraps(command)
    def wrapper(*args: Any, debug: bool = False, **kwargs: Any) -> Any:
        try:
            return command(*args, debug=debug, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            code, line = INTERRUPTED, "interrupted"
        except BrokenPipeError:
            raise
        except Exception as error:
            code, line = getattr(error, "exit_code", FAILED), one_line(error)
            if debug:
                traceback.print_exc(file=sys.stderr)
        print(f"qdq: error: {line}" if code != INTERRUPTED else f"qdq: {line}", file=sys.stderr)
        raise typer.Exit(code)

    return wrapper  # type: ignore[return-value]


def is_importable(module: str) -> bool:
    """Whether a top-level module is installed, without importing it."""
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def require(module: str, extra: str, purpose: str) -> None:
    """Raises :class:`CommandError` which names the extra to install unless ``module`` can be imported."""
    if not is_importable(module):
        package = _PACKAGE_OF_MODULE.get(module, module)
        raise CommandError(f"{purpose} needs {package}, which is not installed: pip install 'qdq[{extra}]'")
