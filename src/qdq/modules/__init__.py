"""Calibration and improvement of models of quantized modules (`qdq.nn`), apart from the modules themselves."""
