"""Old import name: see :mod:`qdq.nn.linear`."""

from qdq.nn.linear import QuantLinear

Linear = QuantLinear

__all__ = ["Linear", "QuantLinear"]
