"""The import names of the ``pytorch_quantization`` toolkit, served by :mod:`qdq`."""

from qdq import __version__ as _qdq_version

from . import calib, nn, quant_modules, tensor_quant, utils
from .quant_modules import deactivate, enable_onnx_export, initialize

# Code in the field compares with the last published version, 2.2.1.
__version__ = f"2.3.0+qdq.{_qdq_version}"

__all__ = [
    "__version__",
    "calib",
    "deactivate",
    "enable_onnx_export",
    "initialize",
    "nn",
    "quant_modules",
    "tensor_quant",
    "utils",
]
