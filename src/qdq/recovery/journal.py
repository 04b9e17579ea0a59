"""The journal of `qdq.recover`: what was measured so far, in a JSON file, with the statistics beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..atomic_file import replaced_at_once
from ..batches import Inputs
from ..calib.statistics import Statistics
from ..calib.storage import load, save
from ..errors import DataError, RecipeError
from ..graph.targets import TARGETS, Target
from ..recipe import Recipe
from .ladder import same_recipe
from .result import Rung

FORMAT, VERSION = "qdq.recovery", 2
# The metric of the float model may differ by as much from call to call: sums in another order.
_TOLERANCE = 1e-6


@dataclasses.dataclass
class Journal:
    """All that a later call needs to go on.

    Attributes:
        model: fingerprint of the float model.
        recipe: as given.
        start: the first rung's: the same, with what `tune` left in float.
        deploy_target: what tells the target from others (`target_text`).
        target: the share of the float model's metric that is asked for.
        baseline: the metric of the float model.
        example_inputs: dtypes, shapes and fixed values of those given, as text; None for none.
        dynamic_shapes: as given, as text; None for none.
        float_size: bytes of the float model's file.
        orders: what was changed -> patterns of the layers, the worst first.
        rungs: evaluated.
        statistics: SHA-256 of the file of statistics.
    """

    model: str
    recipe: Recipe
    start: Recipe
    deploy_target: str
    target: float
    baseline: float
    example_inputs: str | None = None
    dynamic_shapes: str | None = None
    float_size: int | None = None
    orders: dict[str, list[list[str]]] = dataclasses.field(default_factory=dict)
    rungs: list[Rung] = dataclasses.field(default_factory=list)
    statistics: str = ""

    def check(self, path: Path, wanted: dict[str, Any]) -> None:
        """Compares what the journal was made for with what is asked for now, by the names of its attributes.

        Raises:
            DataError: they differ; the first difference is named.
        """
        for name, value in wanted.items():
            known = getattr(self, name)
            if name == "recipe":
                same = same_recipe(known, value)
            elif name == "baseline":
                same = math.isclose(known, value, rel_tol=_TOLERANCE)
            else:
                same = known == value
            if not same:
                told = f": {known} in the journal, now {value}"
                what = {
                    "model": "another float model (its parameters, buffers, modules or their settings differ)",
                    "baseline": f"another metric of the float model{told}",
                    "recipe": "another recipe",
                    "target": f"another target{told}",
                    "deploy_target": f"another deploy_target{told}",
                    "example_inputs": f"other example_inputs{told}",
                    "dynamic_shapes": f"other dynamic_shapes{told}",
                }[name]
                raise DataError(
                    f"the journal {str(path)!r} is of {what}: give another path, or remove the file to begin anew"
                )


def statistics_path(path: Path) -> Path:
    """Where the statistics lie that belong to a journal: by its whole name, as `run.int8` and `run.int4` are two."""
    return path.with_name(f"{path.name}.statistics.safetensors")


def example_text(inputs: Inputs) -> str:
    """What a graph captured with such inputs depends on: dtypes, shapes, and the values of what is no tensor."""

    def text(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return repr(value)

    args, kwargs = pytree.tree_map(text, inputs)
    return ", ".join([*map(str, args), *(f"{key}={value}" for key, value in kwargs.items())])


def target_text(target: Target) -> str:
    """What tells targets apart: the name of one of `TARGETS`; else name and digest of all but what is for people."""
    if TARGETS.get(target.name) == target:
        return target.name
    rules = tuple(dataclasses.replace(rule, note="") for rule in target.rules)
    fields = repr(dataclasses.replace(target, rules=rules, reference=""))
    return f"{target.name}, custom ({hashlib.sha256(fields.encode()).hexdigest()[:16]})"


def begin_journal(path: Path, journal: Journal, statistics: Statistics) -> None:
    """Writes a new journal, which gets the SHA-256 of its statistics, and the statistics beside it: both or neither.

    Raises:
        DataError: a file cannot be written.
    """
    beside = save(statistics, statistics_path(path))
    try:
        journal.statistics = _digest(beside)
        write_journal(path, journal)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def remove_journal(path: Path) -> None:
    """Removes a journal and its statistics."""
    for file in (path, statistics_path(path)):
        file.unlink(missing_ok=True)


def restore_statistics(path: Path, journal: Journal) -> Statistics:
    """The statistics that belong to a journal.

    Raises:
        DataError: their file is missing, is damaged, or is that of another run.
    """
    beside = statistics_path(path)
    statistics = load(beside)
    if _digest(beside) != journal.statistics:
        raise DataError(f"{str(beside)!r} is not the file that the journal {str(path)!r} was made with; remove both")
    return statistics


def write_journal(path: Path, journal: Journal) -> None:
    """Writes the journal; the file is put in place at once.

    Raises:
        DataError: the path cannot be written.
    """
    fields = {f.name: getattr(journal, f.name) for f in dataclasses.fields(journal)}
    fields |= {name: getattr(journal, name).to_dict() for name in ("recipe", "start")}
    fields |= {"rungs": [rung.to_dict() for rung in journal.rungs]}
    text = json.dumps({"format": FORMAT, "version": VERSION, **fields}, indent=1)
    try:
        with replaced_at_once(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"the journal {str(path)!r} cannot be written: {error.strerror or error}") from error


def read_journal(path: Path) -> Journal:
    """Reads what `write_journal` wrote.

    Raises:
        DataError: it cannot be read, is damaged, is no journal, or is of a version that is not known here.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"the journal {str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the journal {str(path)!r} is damaged: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DataError(f"{str(path)!r} is no journal of qdq.recover")
    if data.get("version") != VERSION:
        raise DataError(
            f"the journal {str(path)!r} has version {data.get('version')!r}, which is not known here; this qdq reads "
            f"version {VERSION}"
        )
    try:
        return _journal(data)
    except KeyError as error:
        raise DataError(f"the journal {str(path)!r} is damaged: it lacks {error}") from error
    except (_Damaged, RecipeError) as error:
        raise DataError(f"the journal {str(path)!r} is damaged: {error}") from error


class _Damaged(Exception):
    """Says what is wrong."""


def _journal(data: dict[str, Any]) -> Journal:
    texts = {key: _kept(data, key, str) for key in ("model", "deploy_target", "statistics")}
    # Journals of before these could be given lack them.
    texts |= {key: _kept({key: data.get(key)}, key, str, True) for key in ("example_inputs", "dynamic_shapes")}
    orders = _kept(data, "orders", dict)
    for order in orders.values():
        lists = isinstance(order, list) and all(isinstance(patterns, list) for patterns in order)
        if not lists or not all(patterns and all(isinstance(p, str) for p in patterns) for patterns in order):
            raise _Damaged("'orders' holds other than lists of patterns")
    rungs = [_rung(rung) for rung in _kept(data, "rungs", list)]
    if rungs and rungs[0].metric is None:
        raise _Damaged("the first rung has no metric")  # its failure is raised, never recorded
    return Journal(
        **texts,
        recipe=Recipe.from_dict(_kept(data, "recipe", dict)),
        start=Recipe.from_dict(_kept(data, "start", dict)),
        target=_number(data, "target"),
        baseline=_number(data, "baseline"),
        float_size=_kept(data, "float_size", int, optional=True),
        orders=orders,
        rungs=rungs,
    )


def _rung(data: Any) -> Rung:
    if not isinstance(data, dict):
        raise _Damaged("a rung is no object")
    error = _kept(data, "error", str, optional=True)
    metric = None if data["metric"] is None else _number(data, "metric")
    if (metric is None) == (error is None):
        raise _Damaged("a rung has neither a metric nor an error, or both")
    return Rung(
        name=_kept(data, "name", str),
        recipe=Recipe.from_dict(_kept(data, "recipe", dict)),
        metric=metric,
        size=_kept(data, "size", int, optional=True),
        latency_ratio=None if data["latency_ratio"] is None else _number(data, "latency_ratio"),
        seconds=_number(data, "seconds"),
        error=error,
    )


def _kept(data: dict[str, Any], key: str, kind: type, optional: bool = False) -> Any:
    value = data[key]
    if type(value) is not kind and not (optional and value is None):
        raise _Damaged(f"{key!r} is {value!r}")
    return value


def _number(data: dict[str, Any], key: str) -> float:
    value = data[key]
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:  # an integer beyond all floats
        number = math.nan
    if not math.isfinite(number):
        raise _Damaged(f"{key!r} is {value!r}")
    return number


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
