"""Old import name: see :mod:`qdq.quantizer`."""

from qdq.quantizer import TensorQuantizer

__all__ = ["TensorQuantizer"]
