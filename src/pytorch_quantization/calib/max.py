"""Old import name: see :mod:`qdq.calib.max`."""

from qdq.calib.max import MaxCalibrator

__all__ = ["MaxCalibrator"]
