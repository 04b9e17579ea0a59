"""Old import names: the helpers that published recipes use."""

from qdq.calib.calibrator import reduce_amax

from . import quant_logging

__all__ = ["quant_logging", "reduce_amax"]
