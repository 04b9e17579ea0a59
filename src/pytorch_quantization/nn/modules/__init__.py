"""Old import names of the modules."""

from . import clip, tensor_quantizer

__all__ = ["clip", "tensor_quantizer"]
