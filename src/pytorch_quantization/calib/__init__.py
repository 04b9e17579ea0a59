"""Old import name: see :mod:`qdq.calib`."""

from qdq.calib import HistogramCalibrator, MaxCalibrator

__all__ = ["HistogramCalibrator", "MaxCalibrator"]
