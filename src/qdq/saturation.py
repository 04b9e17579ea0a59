"""Weight codes whose products with uint8 activations cannot saturate on x86 processors without VNNI.

There the kernels multiply with `vpmaddubsw`: two neighbouring products of uint8 and int8 are added in 16 bits, with
saturation (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2). A pair is safe when its codes have
different signs, or when their magnitudes add up to at most 128: 255 * 128 = 32640 < 2**15. Codes of 7 bits are
always safe, but few pairs of 8-bit codes are not, so it is enough to shrink those.

Which codes are neighbours is the kernel's choice. ONNX Runtime reorders a convolution's weight to
[spatial..., input channels] for one output channel, whichever layout the graph is in, and pairs from the first value
on; so does this module.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_PAIR = 128
# Offsets to the factor on amax, round by round: from 1 to 2 in quarters, then around the best.
_SEARCH = ((0.0, 0.25, 0.5, 0.75, 1.0), *((-(0.5**i), 0.5**i) for i in range(3, 7)))
# Values of one block: its temporaries stay in the cache.
_BLOCK = 1 << 17


def shrink_pairs(codes: Tensor, axis: int) -> Tensor:
    """The nearest codes of which no neighbouring pair can saturate.

    Args:
        codes: integers in a float dtype, or an integer one of more than 8 bits; `axis` holds the output channels.
        axis: output-channel axis.

    Returns:
        Codes of the same shape and dtype, none of larger magnitude.
    """
    rows = codes.movedim(axis, 0)
    walked = rows.movedim(1, -1) if rows.dim() > 2 else rows
    shrunk = _shrink(walked.reshape(rows.shape[0], -1)).reshape(walked.shape)
    return (shrunk.movedim(-1, 1) if rows.dim() > 2 else shrunk).movedim(0, axis)


def pair_safe_factor(rows: Tensor, amax: Tensor, bound: int) -> Tensor:
    """The factors on amax, from 1 to 2, whose codes, pairs shrunk, have about the least squared error.

    A larger amax makes codes smaller, so that fewer pairs are shrunk; at 2 none is. The error of a channel of n
    values is taken as n * step**2 / 12 for rounding, and for shrinking half the square of what a pair exceeds the
    limit by.

    Args:
        rows: weight with the output channels first.
        amax: of shape [channels], or [1] where the weight has one.
        bound: largest code.

    Returns:
        Factors of amax's shape.
    """
    size = rows.shape[0] if amax.numel() == 1 else max(1, _BLOCK // max(1, rows[0].numel()))
    blocks = zip(rows.split(size), amax.split(size), strict=True)
    return torch.cat([_search(block, of_block, bound) for block, of_block in blocks])


def _search(rows: Tensor, amax: Tensor, bound: int) -> Tensor:
    walked = rows.movedim(1, -1) if rows.dim() > 2 else rows
    sums = _pair_sums(walked.reshape(rows.shape[0], -1))
    count = rows[0].numel()
    if amax.numel() == 1:
        sums, count = sums.reshape(1, -1), rows.numel()
    factor, least = torch.ones_like(amax), torch.full_like(amax, float("inf"))
    for offsets in _SEARCH:
        centre = factor
        for offset in offsets:
            candidate = (centre + offset).clamp(1.0, 2.0)
            step = amax * candidate / bound
            excess = torch.relu(sums - LARGEST_PAIR * step[:, None])
            error = step.square() * (count / 12) + excess.square_().sum(1) / 2
            better = error < least
            factor, least = torch.where(better, candidate, factor), torch.where(better, error, least)
    return factor


def _pair_sums(rows: Tensor) -> Tensor:
    """Magnitudes of the sums of neighbouring values of one sign; 0 where the signs differ."""
    width = rows.shape[1] // 2 * 2
    first, second = rows[:, 0:width:2], rows[:, 1:width:2]
    return (first + second).abs_().mul_(first * second > 0)


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
