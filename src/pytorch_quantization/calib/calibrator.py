"""Old import name: see :class:`qdq.calib.calibrator.Calibrator`."""

from qdq.calib.calibrator import Calibrator as _Calibrator

__all__ = ["_Calibrator"]
