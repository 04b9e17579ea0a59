"""Old import name: see :mod:`qdq.train`."""

from qdq.train import freeze_parameters, group_parameters, match_parameters, quant_weight_inplace

__all__ = ["freeze_parameters", "group_parameters", "match_parameters", "quant_weight_inplace"]
