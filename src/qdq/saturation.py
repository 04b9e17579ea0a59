"""Weight codes whose products with uint8 activations cannot saturate on x86 processors without VNNI.

There the kernels multiply with `vpmaddubsw`: two neighbouring products of uint8 and int8 are added in 16 bits, with
saturation (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2). A pair is safe when its codes have
different signs, or when their magnitudes add up to at most 128: 255 * 128 = 32640 < 2**15. Codes of 7 bits are
always safe, but few pairs of 8-bit codes are not, so it is enough to shrink those.

Which codes are neighbours is the kernel's choice. ONNX Runtime walks a convolution's weight with channels last where
it has moved the graph to that layout, and with channels first otherwise: both are kept safe.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_PAIR = 128


def shrink_pairs(codes: Tensor, axis: int) -> Tensor:
    """The nearest codes of which no neighbouring pair can saturate.

    Args:
        codes: integers in a float dtype, or an integer one of more than 8 bits; `axis` holds the output channels.
        axis: output-channel axis.

    Returns:
        Codes of the same shape and dtype, none of larger magnitude.
    """
    rows = codes.movedim(axis, 0)
    if rows.dim() > 2:
        last = rows.movedim(1, -1)
        rows = _shrink(last.reshape(rows.shape[0], -1)).reshape(last.shape).movedim(-1, 1)
    rows = _shrink(rows.reshape(rows.shape[0], -1)).reshape(rows.shape)
    return rows.movedim(0, axis)


def _shrink(rows: Tensor) -> Tensor:
    width = rows.shape[1] // 2 * 2
    first, second = rows[:, 0:width:2], rows[:, 1:width:2]
    out = rows.clone()
    if torch.compiler.is_compiling():  # how many pairs are unsafe depends on values, which a traced graph must not
        out[:, 0:width:2], out[:, 1:width:2] = _safe(first, second)
        return out
    where = (((first + second).abs() > LARGEST_PAIR) & (first * second > 0)).nonzero(as_tuple=True)
    if where[0].numel():
        out[:, 0:width:2][where], out[:, 1:width:2][where] = _safe(first[where], second[where])
    return out


def _safe(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of codes, those of one sign whose magnitudes add up to too much made smaller, the larger code first."""
    excess = ((one + two).abs() - LARGEST_PAIR).clamp(min=0) * (one * two > 0)
    half = torch.div(excess, 2, rounding_mode="floor")
    larger = one.abs() >= two.abs()
    return (
        one - one.sign() * torch.where(larger, excess - half, half),
        two - two.sign() * torch.where(larger, half, excess - half),
    )
