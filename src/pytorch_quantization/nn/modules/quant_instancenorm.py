"""Old import name: see :mod:`qdq.nn.instance_norm`."""

from qdq.nn.instance_norm import QuantInstanceNorm1d, QuantInstanceNorm2d, QuantInstanceNorm3d

__all__ = ["QuantInstanceNorm1d", "QuantInstanceNorm2d", "QuantInstanceNorm3d"]
