"""Training of quantized networks: parameters by name pattern, and weights replaced by their quantized values."""

from __future__ import annotations

from .parameters import freeze_parameters, group_parameters, match_parameters, quant_weight_inplace

__all__ = ["freeze_parameters", "group_parameters", "match_parameters", "quant_weight_inplace"]
