"""Old import name: see :mod:`qdq.train`."""

from . import helper

__all__ = ["helper"]
