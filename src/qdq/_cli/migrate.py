"""`qdq migrate`: finds the old package in files and folders, shows what would change, and rewrites on request."""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import io
import logging
import os
import shutil
import stat
import tempfile
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from qdq._cli.errors import FAILED, OK, USAGE
from qdq._cli.import_table import OLD_PACKAGE
from qdq._cli.old_imports import Finding, Migration, migrate_text

_log = logging.getLogger(__name__)
_SKIPPED = {"build", "dist", "node_modules", "site-packages", "__pycache__"}
_MARKS_OF_ENVIRONMENTS = ("pyvenv.cfg", "conda-meta")
_COLOURS = {"+": "green", "-": "red", "@": "cyan"}


@dataclass(frozen=True)
class _Source:
    """A file as it was read."""

    path: Path
    data: bytes
    encoding: str
    text: str

    @property
    def module(self) -> str:
        """The last part of the name by which other files import it."""
        path = self.path.resolve()
        return path.parent.name if self.is_package else path.stem

    @property
    def is_package(self) -> bool:
        """Whether other files import it by the name of its folder."""
        return self.path.name == "__init__.py"

    @functools.cached_property
    def tree(self) -> ast.Module | None:
        """The syntax tree, if the file has one."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(self.text)
        except (SyntaxError, ValueError, RecursionError):
            return None


@dataclass
class _Outcome:
    """What was found in all files."""

    code: int = OK
    changed: int = 0
    imports: int = 0
    uses: int = 0
    left: list[tuple[Path, Finding]] = field(default_factory=list)


def migrate(paths: Sequence[Path], *, write: bool, console: Console) -> int:
    """Lists every import and use of the old package in `paths`, with a unified diff, and rewrites them if `write`.

    Args:
        paths: Python files, and folders that are searched for `*.py`.
        write: replace the files, each in one step, with their encoding, line ends and mode kept.
        console: where the list and the diffs go; what failed goes to the log.

    Returns:
        0 if nothing is to be rewritten, or all of it was; 1 if something would be rewritten or a file failed; 2 if a
        path does not exist. What is left as it is does not count.
    """
    outcome = _Outcome()
    sources = [source for source in (_read(path, outcome) for path in _files(paths, outcome)) if source is not None]
    for source in sources:
        if OLD_PACKAGE in source.text:
            _migrate_file(source, sources, write, outcome, console)
    for path, finding in outcome.left:
        _say(console, f"{path}:{finding.line}: left: {finding.old}: {finding.new}")
    _say(console, _summary(outcome, write))
    if outcome.changed and not write:
        outcome.code = max(outcome.code, FAILED)
    return outcome.code


def _migrate_file(
    source: _Source, sources: Iterable[_Source], write: bool, outcome: _Outcome, console: Console
) -> None:
    """Lists what is in one file, shows how it changes, and writes it if asked to."""
    try:
        taken = _taken(source, sources)
        migration = migrate_text(source.text, taken)
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        _fail(outcome, f"{source.path}{line}", f"cannot be read as Python: {reason}")
        return
    for finding in migration.findings:
        if finding.kind != "left":
            arrow = ":" if finding.kind == "note" else " ->"
            _say(console, f"{source.path}:{finding.line}: {finding.kind}: {finding.old}{arrow} {finding.new}")
    remaining = migration
    if migration.text != source.text:
        for line in _diff(source, migration):
            console.print(line, markup=False, highlight=False, soft_wrap=True, style=_COLOURS.get(line[0]))
        if not write or _write(source, migration, outcome):
            outcome.changed += 1
            outcome.imports += sum(finding.kind == "import" for finding in migration.findings)
            outcome.uses += sum(finding.kind == "use" for finding in migration.findings)
            if write:
                remaining = migrate_text(migration.text, taken)  # whose lines are those of the new file
    outcome.left += [(source.path, finding) for finding in remaining.findings if finding.kind == "left"]


def _diff(source: _Source, migration: Migration) -> Iterator[str]:
    before, after = (list(io.StringIO(text, newline="")) for text in (source.text, migration.text))
    for line in difflib.unified_diff(before, after, str(source.path), str(source.path)):
        yield line.rstrip("\r\n")
        if not line.endswith(("\n", "\r")):
            yield "\\ No newline at end of file"


def _summary(outcome: _Outcome, write: bool) -> str:
    found = f"{_count(outcome.imports, 'import')}, {_count(outcome.uses, 'use')}"
    files = _count(outcome.changed, "file")
    if not outcome.changed:
        text = "nothing to rewrite"
    else:
        text = f"{files} rewritten ({found})" if write else f"{files} to rewrite ({found}); --write does it"
    left = len(outcome.left)
    return text + (f"; {left} left as listed: {OLD_PACKAGE} serves {'it' if left == 1 else 'them'}" if left else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _fail(outcome: _Outcome, what: Path | str, reason: str, code: int = FAILED) -> None:
    _log.error("%s: %s", what, reason)
    outcome.code = max(outcome.code, code)


# Files.


def _files(paths: Sequence[Path], outcome: _Outcome) -> Iterator[Path]:
    """The Python files of `paths`, each once; those that are not looked into are named."""
    seen: set[Path] = set()
    for given in paths:
        for path in _below(given, outcome):
            resolved = path.resolve()
            if resolved in seen:
                continue
            seen.add(resolved)
            if path.suffix == ".ipynb":
                _note_notebook(path, outcome)
            elif _in_old_package(resolved):
                outcome.left.append((path, Finding(1, "left", OLD_PACKAGE, "a file of the old package itself")))
            else:
                yield path


def _below(given: Path, outcome: _Outcome) -> Iterable[Path]:
    try:
        mode = given.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        _fail(outcome, given, "no such file or folder", USAGE)
        return ()
    except OSError as error:
        _fail(outcome, given, error.strerror or str(error))
        return ()
    if stat.S_ISDIR(mode):
        return _walk(given, outcome)
    if stat.S_ISREG(mode):
        return (given,)
    _fail(outcome, given, "neither a file nor a folder", USAGE)
    return ()


def _walk(folder: Path, outcome: _Outcome) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        _fail(outcome, error.filename, error.strerror or str(error))

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not _is_skipped(Path(root, name)))
        paths = (Path(root, name) for name in sorted(files) if name.endswith((".py", ".ipynb")))
        yield from (path for path in paths if not _is_special(path))


def _is_special(path: Path) -> bool:
    """Whether it is a pipe, a socket or a device, whose reading may never end."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False  # the reading will name the reason


def _is_skipped(folder: Path) -> bool:
    name = folder.name
    generated = name.startswith(".") or name in _SKIPPED or name.endswith(".egg-info")
    return generated or any(os.path.exists(folder / mark) for mark in _MARKS_OF_ENVIRONMENTS)


def _in_old_package(path: Path) -> bool:
    return any(parent.name == OLD_PACKAGE and (parent / "__init__.py").is_file() for parent in path.parents)


def _note_notebook(path: Path, outcome: _Outcome) -> None:
    try:
        mentioned = OLD_PACKAGE.encode() in path.read_bytes()
    except OSError as error:
        _fail(outcome, path, error.strerror or str(error))
        return
    if mentioned:
        reason = "notebooks are not rewritten; pytorch_quantization serves them"
        outcome.left.append((path, Finding(1, "left", OLD_PACKAGE, reason)))


def _read(path: Path, outcome: _Outcome) -> _Source | None:
    try:
        data = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return _Source(path, data, encoding, data.decode(encoding))
    except OSError as error:
        _fail(outcome, path, error.strerror or str(error))
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        if OLD_PACKAGE.encode() in data:
            _fail(outcome, path, f"cannot be decoded: {error}")
    return None


def _write(source: _Source, migration: Migration, outcome: _Outcome) -> bool:
    """Replaces a file in one step; a link stays a link."""
    target = source.path.resolve()
    try:
        if not os.access(target, os.W_OK):
            raise PermissionError("permission denied")
        if target.read_bytes() != source.data:
            raise OSError("changed while it was read")
        handle, draft = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(migration.text.encode(source.encoding))
            shutil.copymode(target, draft)
            with contextlib.suppress(OSError):  # root keeps the owner; for others it is the same
                shutil.chown(draft, target.stat().st_uid, target.stat().st_gid)
            os.replace(draft, target)
        except BaseException:
            os.unlink(draft)
            raise
    except (OSError, UnicodeEncodeError) as error:
        _fail(outcome, source.path, f"not written: {getattr(error, 'strerror', None) or error}")
        return False
    return True


# Names that files take from each other.


def _taken(source: _Source, sources: Iterable[_Source]) -> set[str]:
    """The names that other files take from this one: `from utils import quant_nn`, `utils.quant_nn`."""
    taken: set[str] = set()
    for other in sources:
        # `from . import name` does not spell the name of the folder.
        if other is not source and (source.is_package or source.module in other.text) and other.tree is not None:
            taken.update(_names_from(source.module, other.tree, other.path))
    if "*" in taken and source.tree is not None:  # then any name that the file binds
        taken.update(_imported_names(source.tree))
    return taken


def _imported_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)


def _names_from(module: str, tree: ast.Module, path: Path) -> Iterator[str]:
    """The names that a file takes from the module whose name ends in `module`."""
    called = {module}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            called.update(a.asname for a in node.names if a.asname and a.name.rpartition(".")[2] == module)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            within = (node.module or "").rpartition(".")[2]
            if not within and node.level:
                within = path.resolve().parents[node.level - 1].name
            if within == module:
                yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            base = node.value
            last = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", None)
            if last in called:
                yield node.attr
