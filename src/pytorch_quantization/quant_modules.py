"""Old import name: see :mod:`qdq.nn.replacement`; new code uses :func:`qdq.nn.quantize_modules`."""

from qdq.export.readiness import enable_onnx_export
from qdq.nn.replacement import QuantModuleReplacementHelper, deactivate, initialize

__all__ = ["QuantModuleReplacementHelper", "deactivate", "enable_onnx_export", "initialize"]
