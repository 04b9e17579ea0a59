"""Exceptions of the library: one base class, so that a caller can catch all of them and nothing else."""

from __future__ import annotations


class QdqError(Exception):
    """Base of every error that qdq raises about the user's model, data, recipe or files."""


class CaptureError(QdqError, RuntimeError):
    """The model could not be captured as a graph by `torch.export`."""


class DataError(QdqError, ValueError):
    """The calibration or verification data cannot be used as they are."""


class RecipeError(QdqError, ValueError):
    """A recipe or target holds an unknown key, an unknown name or a value out of range."""


class CalibrationError(QdqError, RuntimeError):
    """A quantizer has no usable range."""


class ExportError(QdqError, RuntimeError):
    """The quantized model could not be written as ONNX."""


class RuntimeMissingError(QdqError, ImportError):
    """A part of qdq needs a package that is not installed."""


def need(module: str, extra: str, purpose: str) -> RuntimeMissingError:
    """The error for an optional dependency that is missing; it names the extra that brings it."""
    return RuntimeMissingError(f"{purpose} needs the package {module!r}: pip install 'qdq[{extra}]'")
