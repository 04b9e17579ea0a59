"""Reading a ``.pt2`` file (``torch.export.save``) without unpickling anything and without running its strings.

The loader of PyTorch unpickles weights and constants that an archive marks as pickled, legacy ``.pt`` members,
and sample inputs; it loads compiled libraries; it evaluates the expressions and parameter names in the
model's JSON. So the archive is read first, and what could run code is refused with the way out.
The layout is that of ``torch/export/pt2_archive``, as PyTorch 2.8 to 2.13 write it.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qdq._cli.errors import CommandError, UsageError

_log = logging.getLogger("qdq.cli")

_CONVERT = (
    "Load it where you trust it and save it again: "
    "program = torch.export.load(path); program.example_inputs = None; torch.export.save(program, path)"
)
_PICKLED_PREFIXES = ("custom_obj_", "opaque_obj_")
# Heads of the size expressions that torch.export prints (sympy's srepr form and PyTorch's own functions).
_EXPRESSION_HEADS = frozenset(
    "Symbol Integer Float Rational Add Mul Pow Mod Max Min Abs Eq Ne Lt Le Gt Ge And Or Not Piecewise ExprCondPair "
    "FloorDiv CleanDiv CeilDiv ModularIndexing PythonMod PowByNatural FloatPow FloatTrueDiv IntTrueDiv CeilToInt "
    "FloorToInt RoundToInt RoundDecimal ToFloat TruncToFloat TruncToInt Where BitwiseFn_bitwise_and "
    "BitwiseFn_bitwise_or LShift RShift Identity Equality Unequality StrictLessThan StrictGreaterThan LessThan "
    "GreaterThan Tuple floor ceiling sqrt OpaqueUnaryFn_sqrt NegativeOne One Zero Half".split()
)
_EXPRESSION_NAMES = frozenset({"True", "False", "true", "false", "oo", "int_oo"})
_EXPRESSION_NODES = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.BoolOp,
    ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip


def load_pt2(path: Path) -> Any:
    """The module in a ``.pt2`` file, ready to be called.

    Raises:
        UsageError: the file is missing, not an archive, or has members that only unpickling or running code reads.
        CommandError: PyTorch cannot load it.
    """
    import torch

    if not path.is_file():
        raise UsageError(f"MODEL: no such file: {path}")
    # Held in memory so that what is loaded is what was checked.
    buffer = io.BytesIO(path.read_bytes())
    _refuse_code(buffer, path)
    buffer.seek(0)
    try:
        program = torch.export.load(buffer)
    except Exception as error:
        raise CommandError(f"{path}: torch.export.load failed: {type(error).__name__}: {error}") from error
    try:
        return program.module(check_guards=False)  # guards are strings that PyTorch would execute
    except TypeError:  # before this argument existed there were no guard strings either
        return program.module()


def _refuse_code(buffer: io.BytesIO, path: Path) -> None:
    """Raises UsageError unless everything in the archive is plain data."""
    try:
        archive = zipfile.ZipFile(buffer)
    except zipfile.BadZipFile:
        raise UsageError(f"{path} is not a .pt2 archive (torch.export.save writes one)") from None
    with archive:
        names = archive.namelist()
        # Members live under one root folder that is named after the file.
        inner = {name: name.partition("/")[2] for name in names}
        if not any(part.startswith("models/") and part.endswith(".json") for part in inner.values()):
            raise UsageError(
                f"{path} has no models/*.json, so it is not a model that torch.export.save of PyTorch 2.8 "
                f"or later wrote; older files are pickles. {_CONVERT}"
            )
        for name, part in inner.items():
            _check_member(archive, name, part, path)


def _check_member(archive: zipfile.ZipFile, name: str, part: str, path: Path) -> None:
    if part.startswith(("data/aotinductor/", "data/executorch/")):
        raise UsageError(f"{path} holds compiled code ({part}); qdq needs the exported program alone")
    if part.startswith("data/sample_inputs/"):
        _check_sample_inputs(archive.read(name), part, path)
    elif part.startswith(("data/weights/", "data/constants/")):
        if part.endswith((".pt", ".pkl", ".pickle")):
            raise UsageError(f"{path} holds a pickled member ({part}), which qdq does not load. {_CONVERT}")
        if part.endswith(".json"):
            _check_payloads(_read_json(archive, name, path), part, path)
    elif part.startswith("models/") and part.endswith(".json"):
        _check_model(_read_json(archive, name, path), part, path)


def _read_json(archive: zipfile.ZipFile, name: str, path: Path) -> Any:
    try:
        return json.loads(archive.read(name))
    except ValueError:
        raise UsageError(f"{path}: {name} is not JSON; the archive is damaged") from None


def _check_payloads(config: Any, part: str, path: Path) -> None:
    for tensor, payload in config.get("config", {}).items():
        if payload.get("use_pickle") or str(payload.get("path_name", "")).startswith(_PICKLED_PREFIXES):
            raise UsageError(
                f"{path} holds {tensor!r} as a pickle ({part}), which qdq does not load. Replace tensor subclasses "
                "and custom objects by plain tensors and save it again with torch.export.save"
            )


def _check_sample_inputs(data: bytes, part: str, path: Path) -> None:
    """``torch.export.save`` pickles the example inputs. Plain tensors pass PyTorch's restricted unpickler; the rest
    is refused, because PyTorch's loader would go on with the unrestricted one."""
    import torch

    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        _log.debug("restricted unpickler on %s: %s", part, error)
        raise UsageError(
            f"{path}: the pickled sample inputs ({part}) hold more than plain tensors, and qdq does not unpickle. "
            f"{_CONVERT}"
        ) from None


def _check_model(model: Any, part: str, path: Path) -> None:
    for key, value in _walk(model):
        if key == "expr_str" and not is_plain_expression(value):
            raise UsageError(f"{path}: {part} holds the size expression {value!r}, which qdq will not evaluate")
        if key == "forward_arg_names":
            bad = [name for name in value or [] if not str(name).isidentifier() or keyword.iskeyword(str(name))]
            if bad:
                raise UsageError(f"{path}: {part} names a parameter {bad[0]!r}, which is not a Python name")


def is_plain_expression(text: Any) -> bool:
    """Whether ``text`` is a size expression: arithmetic over symbols and known functions, nothing that could run."""
    if not isinstance(text, str):
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _EXPRESSION_NODES):
            return False
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in _EXPRESSION_HEADS:
                return False
        elif isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
            # Only a symbol's name is a string, and sympy does not evaluate that one.
            if not isinstance(node.value, str) or not node.value.isidentifier():
                return False
        elif isinstance(node, ast.Name):
            known = node.id in _EXPRESSION_HEADS or node.id in _EXPRESSION_NAMES
            if not known and not (node.id[0] in "suz" and node.id.lstrip("suzf").isdigit()):
                return False
    return True


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of nested JSON."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item)
