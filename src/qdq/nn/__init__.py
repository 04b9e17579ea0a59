"""Quantized layers (module level); so far the learnable clip and the quantizer that layers are made of."""

from ..clip import Clip
from ..quantizer import TensorQuantizer

__all__ = ["Clip", "TensorQuantizer"]
