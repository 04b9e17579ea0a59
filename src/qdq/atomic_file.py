"""Files that are put in place at once, so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import QdqError


def path_of(value: Any, name: str = "path") -> Path:
    """The argument `name` as a path.

    Raises:
        QdqError: it is none.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise QdqError(f"{name} must be a path, a str or os.PathLike, not {type(value).__name__}")
    return Path(value)


def obstacle(path: Path) -> str | None:
    """Why no file can be put at `path`, to be told before long work as well as after it; None where one can."""
    if "\0" in str(path):
        return "it holds a null character"
    try:
        return _obstacle(path)
    except OSError as error:  # such as a name that is too long
        return error.strerror or str(error)


def is_file(path: Path) -> bool:
    """Whether a file is there; False also for what cannot be the name of one."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _obstacle(path: Path) -> str | None:
    if path.is_dir():
        return "it is a folder; give the path of a file"
    if path.exists() and not path.is_file():
        return "it is a device or a pipe, which a file would replace"
    if not path.parent.is_dir():
        return f"the folder {str(path.parent)!r} does not exist"
    if path.exists() and not os.access(path, os.W_OK):
        return "permission denied"
    try:
        # Tried, as rights alone do not tell it: of the superuser, or of a file system that is read only.
        with tempfile.TemporaryFile(dir=path.parent):
            return None
    except PermissionError:
        return "permission denied"


@contextmanager
def replaced_at_once(path: Path) -> Iterator[Path]:
    """Gives a temporary file beside `path` to write to; it takes the place of `path` when the block ends.

    After an error or an interrupt in the block the temporary file is removed, and `path` is as it was.

    Raises:
        OSError: the folder cannot be written.
    """
    temporary = path.with_name(f".qdq-{secrets.token_hex(8)}")  # not longer for a long name, which could be too long
    # As open() makes files, with the permissions that the process and the folder give: asking for the process's umask
    # means to change it for a moment, for all threads.
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        yield temporary
        temporary.chmod(mode)  # who wrote may have put another file there
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to be told
            temporary.unlink()
        raise
