"""Old import name: see :class:`qdq.TensorQuantizer` and :class:`qdq.clip.Clip`."""

from . import modules
from .modules.clip import Clip
from .modules.tensor_quantizer import TensorQuantizer

__all__ = ["Clip", "TensorQuantizer", "modules"]
