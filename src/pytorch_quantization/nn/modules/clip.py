"""Old import name: see :mod:`qdq.clip`."""

from qdq.clip import Clip

__all__ = ["Clip"]
