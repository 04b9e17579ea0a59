"""qdq: from a trained PyTorch model to a verified low-bit deployment."""

from .api import benchmark, explain, export_onnx, quantize, verify
from .descriptor import QuantDescriptor
from .errors import (
    CalibrationError,
    CaptureError,
    DataError,
    ExportError,
    QdqError,
    RecipeError,
    RuntimeMissingError,
)
from .graph.targets import Target
from .quantizer import TensorQuantizer
from .recipe import Override, Recipe

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CaptureError",
    "DataError",
    "ExportError",
    "Override",
    "QdqError",
    "QuantDescriptor",
    "Recipe",
    "RecipeError",
    "RuntimeMissingError",
    "Target",
    "TensorQuantizer",
    "benchmark",
    "explain",
    "export_onnx",
    "quantize",
    "verify",
]
