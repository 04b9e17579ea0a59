"""A local search over which of two codes each weight takes, from a choice that is good already."""

from __future__ import annotations

import torch
from torch import Tensor

from .output_error import OutputError

# Of each channel, so many weights whose turn alone would cost least are tried together with every other one.
_PARTNERS = 16
# Values that are looked at in one go: temporaries of some 16 MB.
_CHUNK = 1 << 22
# Gains below this share of a channel's error are rounding errors of the sums.
_LEAST = 1e-5


def local_search(error: OutputError, codes: Tensor, other: Tensor, step: Tensor) -> Tensor:
    """Turns one choice of a channel, or two at once, as long as that lowers the error of its output.

    The error is a quadratic function of binary variables. Of all single turns the best one is made; where none gains,
    the best of pairs (1-opt and 2-opt search: Merz and Freisleben, "Greedy and Local Search Heuristics for
    Unconstrained Binary Quadratic Programming", Journal of Heuristics 8, 2002).

    Args:
        error: of the layer's output; one that keeps the Hessian.
        codes: of the shape of `error.rows`.
        other: what each code may be turned to, of the same shape; the code itself where there is no choice.
        step: step sizes, of the same shape.

    Returns:
        The codes, of the same shape.
    """
    groups, channels, width = error.rows.shape
    group = torch.arange(groups, device=codes.device).repeat_interleave(channels)
    change = codes * step - error.rows
    slope = (error.curvature(change) - error.correlation).flatten(0, 1)
    least = _LEAST * error.of(codes * step).clamp(min=0).flatten()
    turn = ((other - codes) * step).flatten(0, 1)
    turned = torch.zeros_like(turn, dtype=torch.bool)
    for rows in torch.arange(len(turn), device=turn.device).split(max(1, _CHUNK // (_PARTNERS * width))):
        turned[rows] = _search(error.hessian, group[rows], turn[rows], slope[rows], least[rows])
    return torch.where(turned.reshape(codes.shape), other, codes)


def _search(hessian: Tensor, group: Tensor, turn: Tensor, slope: Tensor, least: Tensor) -> Tensor:
    """Which choices to turn: [rows, width], bool.

    Args:
        hessian: [groups, width, width].
        group: of each row.
        turn: by how much the weight changes if its choice is turned, [rows, width].
        slope: half the derivative of the error.
        least: gain of each row that counts.
    """
    turned = torch.zeros_like(turn, dtype=torch.bool)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    live = torch.arange(len(turn), device=turn.device)
    # Every turn lowers the error, so this ends; the limit is for sums whose rounding errors are larger than thought.
    for _ in range(2 * turn.shape[1]):
        gains = turn[live] * (-2 * slope[live] - turn[live] * diagonal[group[live]])
        gain, index = gains.max(1)
        single = gain > least[live]
        pairs, partners, better = _best_pairs(hessian, group[live[~single]], turn[live[~single]], gains[~single])
        better = better > least[live[~single]]
        kept = single.clone()
        kept[~single] = better
        first, second = index.clone(), index.clone()
        first[~single], second[~single] = pairs, partners
        live, first, second, single = live[kept], first[kept], second[kept], single[kept]
        if not len(live):
            break
        for rows, at in ((live, first), (live[~single], second[~single])):
            slope[rows] += turn[rows, at, None] * hessian[group[rows], at]
            turn[rows, at] *= -1
            turned[rows, at] ^= True
    return turned


def _best_pairs(hessian: Tensor, group: Tensor, turn: Tensor, gains: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two choices of each row that gain most when turned together, and the gain."""
    count, width = min(_PARTNERS, turn.shape[1]), turn.shape[1]
    gains = gains.masked_fill(turn == 0, -torch.inf)
    top, tried = gains.topk(count, 1)
    together = 2 * turn.gather(1, tried)[..., None] * hessian[group[:, None], tried] * turn[:, None]
    both = (top[..., None] + gains[:, None] - together).scatter(2, tried[..., None], -torch.inf)
    gain, index = both.flatten(1).max(1)
    first = tried.gather(1, torch.div(index, width, rounding_mode="floor")[:, None])[:, 0]
    return first, index % width, gain
