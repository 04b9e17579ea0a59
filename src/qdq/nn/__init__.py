"""Quantized layers: `torch.nn` modules that quantize their input and weight, and what they are made of."""

from ..clip import Clip
from ..quantizer import TensorQuantizer
from .attention import QuantMultiheadAttention
from .conv import QuantConv1d, QuantConv2d, QuantConv3d
from .conv_transpose import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from .conversion import dequantize_modules, quantize_modules
from .embedding import QuantEmbedding
from .gru import QuantGRU
from .instance_norm import QuantInstanceNorm1d, QuantInstanceNorm2d, QuantInstanceNorm3d
from .linear import QuantLinear
from .lstm import QuantLSTM, QuantLSTMCell
from .operations import QuantAdd, QuantConcat, QuantMatmul
from .pooling import (
    QuantAdaptiveAvgPool1d,
    QuantAdaptiveAvgPool2d,
    QuantAdaptiveAvgPool3d,
    QuantAvgPool1d,
    QuantAvgPool2d,
    QuantAvgPool3d,
    QuantMaxPool1d,
    QuantMaxPool2d,
    QuantMaxPool3d,
)
from .quantized_module import QuantInputMixin, QuantMixin, pop_quant_desc_in_kwargs

__all__ = [
    "Clip",
    "QuantAdaptiveAvgPool1d",
    "QuantAdaptiveAvgPool2d",
    "QuantAdaptiveAvgPool3d",
    "QuantAdd",
    "QuantAvgPool1d",
    "QuantAvgPool2d",
    "QuantAvgPool3d",
    "QuantConcat",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantEmbedding",
    "QuantGRU",
    "QuantInputMixin",
    "QuantInstanceNorm1d",
    "QuantInstanceNorm2d",
    "QuantInstanceNorm3d",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantLinear",
    "QuantMatmul",
    "QuantMaxPool1d",
    "QuantMaxPool2d",
    "QuantMaxPool3d",
    "QuantMixin",
    "QuantMultiheadAttention",
    "TensorQuantizer",
    "dequantize_modules",
    "pop_quant_desc_in_kwargs",
    "quantize_modules",
]
