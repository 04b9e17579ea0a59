"""Old import name: see :mod:`qdq.calib.histogram` and :mod:`qdq.calib.weights`."""

from qdq.calib.histogram import HistogramCalibrator
from qdq.calib.weights import calibrate_weights

__all__ = ["HistogramCalibrator", "calibrate_weights"]
