"""Old import name: see :mod:`qdq.calib`."""

from . import calibrator, histogram, max
from .histogram import HistogramCalibrator, calibrate_weights
from .max import MaxCalibrator

__all__ = ["HistogramCalibrator", "MaxCalibrator", "calibrate_weights", "calibrator", "histogram", "max"]
