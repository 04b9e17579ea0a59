"""The import names of the ``pytorch_quantization`` toolkit, served by :mod:`qdq`."""

from qdq import __version__

from . import calib, nn, tensor_quant

__all__ = ["__version__", "calib", "nn", "tensor_quant"]
