"""Old import name: see :mod:`qdq.nn.conv` and :mod:`qdq.nn.conv_transpose`."""

from qdq.nn.conv import QuantConv1d, QuantConv2d, QuantConv3d, QuantConvNd
from qdq.nn.conv_transpose import (
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantConvTransposeNd,
)

Conv1d = QuantConv1d
Conv2d = QuantConv2d
Conv3d = QuantConv3d
ConvTranspose1d = QuantConvTranspose1d
ConvTranspose2d = QuantConvTranspose2d
ConvTranspose3d = QuantConvTranspose3d
_QuantConvNd = QuantConvNd
_QuantConvTransposeNd = QuantConvTransposeNd

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "_QuantConvNd",
    "_QuantConvTransposeNd",
]
