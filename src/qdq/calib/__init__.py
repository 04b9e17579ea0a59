"""Calibration: collectors (what was seen) apart from solvers (which amax follows)."""

from __future__ import annotations

from .collectors import HistogramCollector, RangeCollector
from .histogram import HistogramCalibrator
from .max import MaxCalibrator
from .ranges import affine_range, channel_mse_amax
from .solvers import entropy_amax, mse_amax, percentile_amax
from .statistics import Statistics
from .storage import load, save
from .weights import calibrate_weights

__all__ = [
    "HistogramCalibrator",
    "HistogramCollector",
    "MaxCalibrator",
    "RangeCollector",
    "Statistics",
    "affine_range",
    "calibrate_weights",
    "channel_mse_amax",
    "entropy_amax",
    "load",
    "mse_amax",
    "percentile_amax",
    "save",
]
