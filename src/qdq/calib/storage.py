"""Statistics in a file: `save` and `load`. The format is described in docs/statistics.md."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic_file import is_file, obstacle, path_of, replaced_at_once
from ..errors import DataError
from .collectors import HistogramCollector
from .statistics import Inputs, Statistics

logger = logging.getLogger(__name__)

FORMAT, VERSION = "qdq.statistics", 1
# Of every histogram that a calibration pass collects: histograms of one quantizer are merged, so they have to agree.
_NUM_BINS = HistogramCollector().num_bins
_PLAIN = (type(None), bool, int, float, str)


def save(statistics: Any, path: str | os.PathLike[str]) -> Path:
    """Writes statistics to a safetensors file, which is put in place at once.

    Args:
        statistics: a `Statistics`, or a model that `qdq.quantize` returned, whose statistics are meant.
        path: of the file; its folder must exist.

    Returns:
        The path.

    Raises:
        QdqError: `path` is no path.
        DataError: not statistics, no statistics in the model, inputs that are no tensors, tuples, lists, dicts, numbers
            or strings, or a path that cannot be written.
    """
    found = statistics if isinstance(statistics, Statistics) else _of_model(statistics)
    tensors: dict[str, Tensor] = {}
    histograms = {}
    for name, seen in found.histograms.items():
        key = f"histogram/{len(histograms)}"
        tensors[key] = seen.counts
        histograms[name] = {"counts": key, **_fields_of(seen)}
    samples = [_described(inputs, tensors, f"batch {i}") for i, inputs in enumerate(found.samples)]
    header = {"format": FORMAT, "version": VERSION, "histograms": histograms, "samples": samples}
    if found.model is not None:
        header["model"] = found.model
    path = path_of(path)
    check_writable(path)
    try:
        with replaced_at_once(path) as temporary:
            save_file(tensors, temporary, metadata={"qdq": json.dumps(header)})
    except (OSError, SafetensorError) as error:  # the latter for what happens while it writes, such as a full disk
        raise DataError(f"{str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return path


def check_writable(path: Path) -> None:
    """Raises:
    DataError: no file can be written at `path`, or it would replace a device or a pipe.
    """
    reason = obstacle(path)
    if reason is not None:
        raise DataError(f"{str(path)!r} cannot be written: {reason}")


def load(path: str | os.PathLike[str]) -> Statistics:
    """Reads what `save` wrote. Nothing in the file is executed.

    Returns:
        The statistics, all tensors on the CPU. Where the file does not say of which float model they are (files of
        earlier versions), the log has a warning, and `model` is None: nothing then checks that yours is it.

    Raises:
        QdqError: `path` is no path.
        DataError: the file is missing, is damaged, is no statistics file, or is of a version that is not known here.
    """
    path = path_of(path)
    if not is_file(path):
        raise DataError(f"there is no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("qdq")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise DataError(f"{str(path)!r} cannot be read as safetensors: {error}") from error
    if text is None:
        raise DataError(f"{str(path)!r} is no statistics file: its metadata have no entry 'qdq'")
    try:
        header = json.loads(text)
        found = _read(header, tensors)
    except _Damaged as error:
        raise DataError(f"{str(path)!r}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{str(path)!r} has a damaged header: {error}") from error
    if found.model is None:
        logger.warning(
            "%r does not say which float model it is of (an earlier qdq wrote it): whether yours is it is not checked",
            str(path),
        )
    return found


class _Damaged(Exception):
    """Says what is wrong."""


def _need(condition: bool, told: str) -> None:
    if not condition:
        raise _Damaged(told)


def _of_model(model: Any) -> Statistics:
    # The record of qdq.graph.record, which imports this package.
    meta = getattr(model, "meta", None) if isinstance(model, torch.nn.Module) else None
    found = getattr(meta.get("qdq"), "statistics", None) if isinstance(meta, dict) else None
    if not isinstance(found, Statistics):
        raise DataError(f"expected Statistics or a model that qdq.quantize returned, not {type(model).__name__}")
    return found


def _fields_of(seen: HistogramCollector) -> dict[str, Any]:
    # As hexadecimal text: exact, and infinite before data.
    return {
        "min": seen.min.hex(),
        "max": seen.max.hex(),
        "total": seen.total,
        "nonfinite": seen.nonfinite,
        "zeros": seen.zeros,
        "num_bins": seen.num_bins,
        "first": seen.first,
        "exponent": seen.exponent,
    }


def _described(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """A value as plain data, its tensors put into `tensors`."""
    if isinstance(value, Tensor):
        key = f"sample/{len(tensors)}"
        tensors[key] = value.detach().cpu().contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise DataError(f"{where} holds a dict with keys that are no strings, which cannot be saved")
        return {"dict": {key: _described(item, tensors, where) for key, item in value.items()}}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_described(item, tensors, where) for item in value]}
    if isinstance(value, _PLAIN):
        return {"float": value.hex()} if isinstance(value, float) else {"value": value}
    raise DataError(f"{where} holds a {type(value).__name__}, which cannot be saved")


def _read(header: Any, tensors: dict[str, Tensor]) -> Statistics:
    _need(isinstance(header, dict) and header.get("format") == FORMAT, "its header is not that of a statistics file")
    version = header.get("version")
    _need(version == VERSION, f"version {version!r} is not known here; this qdq reads version {VERSION}")
    histograms, samples = header.get("histograms"), header.get("samples")
    if not isinstance(histograms, dict) or not isinstance(samples, list):
        raise _Damaged("its header lacks histograms or samples")
    model = header.get("model")
    _need(
        model is None or (isinstance(model, str) and re.fullmatch("[0-9a-f]{64}", model) is not None),
        f"its model is {model!r}, which is no SHA-256",
    )
    found = {name: _histogram(name, fields, tensors) for name, fields in histograms.items()}
    return Statistics(found, [_inputs(i, sample, tensors) for i, sample in enumerate(samples)], model)


def _histogram(name: str, fields: Any, tensors: dict[str, Tensor]) -> HistogramCollector:
    where = f"the histogram of {name!r}"
    _need(isinstance(fields, dict), f"{where} is damaged")
    counts = tensors.get(str(fields.get("counts")))
    whole = ("total", "nonfinite", "zeros", "num_bins", "first", "exponent")
    numbers = {key: fields.get(key) for key in whole}
    _need(all(type(n) is int for n in numbers.values()), f"{where} lacks a whole number")
    low, high = (_float(fields.get(key), where) for key in ("min", "max"))
    assert all(isinstance(n, int) for n in numbers.values())
    total, nonfinite, zeros, num_bins, first, exponent = (int(n) for n in numbers.values())  # type: ignore[arg-type]
    _need(isinstance(counts, Tensor) and counts.dtype == torch.int64 and counts.dim() == 1, f"{where} lacks counts")
    assert isinstance(counts, Tensor)
    _need(num_bins == _NUM_BINS and counts.numel() <= num_bins, f"{where} has an impossible number of bins")
    _need(bool((counts >= 0).all()) and int(counts.sum()) == total, f"{where} has counts that are not {total} in all")
    _need(0 <= zeros <= total and nonfinite >= 0 and -126 <= exponent < 1024, f"{where} has an impossible number")
    _need(nonfinite == 0, f"{where} counts {nonfinite} NaN or infinite values, with which nothing can be calibrated")
    finite = math.isfinite(low) and math.isfinite(high) and low <= high
    _need(finite if total else (low, high) == (math.inf, -math.inf), f"{where} has no finite range")
    bins = HistogramCollector(num_bins)  # which follow from the range alone
    if total:
        bins.collect(torch.tensor([low, high], dtype=torch.float64))
    same = (bins.first, bins.exponent, bins.counts.numel()) == (first, exponent, counts.numel())
    _need(same, f"{where} has a range that its bins do not cover")
    _need(zeros <= (int(counts[-first]) if total else 0), f"{where} has more zeros than the bin of zero holds")
    return HistogramCollector.restored(
        num_bins=num_bins,
        counts=counts,
        first=first,
        exponent=exponent,
        zeros=zeros,
        total=total,
        nonfinite=nonfinite,
        low=low,
        high=high,
    )


def _float(text: Any, where: str) -> float:
    try:
        return float.fromhex(text)
    except (TypeError, ValueError, OverflowError):
        raise _Damaged(f"{where} has the number {text!r}") from None


def _inputs(index: int, described: Any, tensors: dict[str, Tensor]) -> Inputs:
    value = _value(described, tensors, f"batch {index}")
    fits = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], dict)
    _need(fits, f"batch {index} does not hold arguments and keyword arguments")
    return value


def _value(described: Any, tensors: dict[str, Tensor], where: str) -> Any:
    _need(isinstance(described, dict) and len(described) == 1, f"{where} is damaged")
    kind, content = next(iter(described.items()))
    if kind == "tensor":
        _need(content in tensors if isinstance(content, str) else False, f"{where} lacks its tensor {content!r}")
        return tensors[content]
    if kind == "dict":
        _need(isinstance(content, dict), f"{where} is damaged")
        return {key: _value(item, tensors, where) for key, item in content.items()}
    if kind in ("tuple", "list"):
        _need(isinstance(content, list), f"{where} is damaged")
        items: Iterator[Any] = (_value(item, tensors, where) for item in content)
        return tuple(items) if kind == "tuple" else list(items)
    if kind == "float":
        return _float(content, where)
    _need(kind == "value" and isinstance(content, (type(None), bool, int, str)), f"{where} is damaged")
    return content
