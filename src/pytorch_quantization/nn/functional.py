"""Old import name: see :mod:`qdq.clip`."""

from qdq.clip import ClipFunction, clip

__all__ = ["ClipFunction", "clip"]
