"""Old import name: see :mod:`qdq.nn.quantized_module`."""

from qdq.nn.quantized_module import QuantInputMixin, QuantMixin, pop_quant_desc_in_kwargs

__all__ = ["QuantInputMixin", "QuantMixin", "pop_quant_desc_in_kwargs"]
