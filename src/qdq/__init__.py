"""qdq: from a trained PyTorch model to a verified low-bit deployment."""

from . import calib, functional, nn
from .analysis.fidelity import Fidelity
from .analysis.latency import Speed
from .analysis.sensitivity import Sensitivity
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
from .graph.explanation import Explanation
from .graph.targets import Target
from .modules.calibration import calibrating
from .modules.improvement import improve_modules
from .quantizer import TensorQuantizer
from .quantizer_sensitivity import sensitivity
from .recipe import Override, Recipe
from .recovery.climbing import recover
from .recovery.result import Recovery

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CaptureError",
    "DataError",
    "Explanation",
    "ExportError",
    "Fidelity",
    "Override",
    "QdqError",
    "QuantDescriptor",
    "Recipe",
    "RecipeError",
    "Recovery",
    "RuntimeMissingError",
    "Sensitivity",
    "Speed",
    "Target",
    "TensorQuantizer",
    "benchmark",
    "calib",
    "calibrating",
    "explain",
    "export_onnx",
    "functional",
    "improve_modules",
    "nn",
    "quantize",
    "recover",
    "sensitivity",
    "verify",
]
