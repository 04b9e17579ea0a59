"""Solvers: which amax, as pure functions of a histogram of absolute values.

``counts`` (n bins) and ``edges`` (n + 1, ascending) may come from any collector. Every solver finds the value that its
definition names, whatever the number of candidates: a closed form over prefix sums ranks all of them at once, and the
definition itself decides among those that the closed form cannot tell apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import E4M3, IntFormat
from ..kernels.reference import scaled_float_fake_quantize, symmetric_fake_quantize

# Elements of the largest temporary matrix (candidates by levels or by bins).
_BLOCK = 1 << 18
# Above this many levels the prefix sums save nothing over the bins themselves.
_MANY_LEVELS = 512


def _histogram(counts: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 on the CPU, where the search is fastest.

    Raises:
        ValueError: no data, or shapes or values that are no histogram.
    """
    if counts.dim() != 1 or edges.dim() != 1 or edges.numel() != counts.numel() + 1:
        raise ValueError(
            "counts must be 1-d and edges have one value more, got shapes "
            f"{tuple(counts.shape)} and {tuple(edges.shape)}"
        )
    h, e = counts.detach().to("cpu", torch.float64), edges.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(e).all() and (h >= 0).all() and (e[1:] >= e[:-1]).all()):
        raise ValueError("edges must be finite and ascending, and counts must not be negative")
    if not bool(h.sum() > 0):
        raise ValueError("the histogram holds no data: run the calibration batches first")
    return h, e


def _candidates(num_bins: int, start_bin: int, stride: int, stop: int) -> Tensor:
    if start_bin < 0 or stride < 1:
        raise ValueError(f"start_bin must be at least 0 and stride at least 1, got {start_bin} and {stride}")
    # Fewer bins than start_bin: the whole range is the only candidate.
    return torch.arange(min(start_bin, stop - 1), stop, stride, dtype=torch.int64)


def percentile_amax(counts: Tensor, edges: Tensor, percentile: float = 99.99) -> float:
    """The edge ``edges[i]`` of the first bin i whose cumulative share of the counts reaches ``percentile / 100``.

    Raises:
        ValueError: ``percentile`` outside 0..100; no data.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be in the range 0 to 100, got {percentile}")
    h, e = _histogram(counts, edges)
    share = torch.cumsum(h, 0) / h.sum()
    index = int(torch.searchsorted(share, torch.tensor(percentile / 100, dtype=torch.float64)))
    return float(e[min(index, h.numel() - 1)])


def mse_amax(
    counts: Tensor,
    edges: Tensor,
    num_bits: int | tuple[int, int] = 8,
    unsigned: bool = False,
    *,
    stride: int = 1,
    start_bin: int = 128,
) -> float:
    """The bin centre that, as amax, gives the smallest count-weighted squared error of fake-quantizing all centres.

    Candidates are the centres from ``start_bin`` in steps of ``stride``; the first of equals wins.
    ``num_bits`` may be ``(4, 3)`` for E4M3.

    Raises:
        ValueError: no data; ``stride`` or ``start_bin`` out of range.
    """
    h, e = _histogram(counts, edges)
    centres = (e[1:] + e[:-1]) / 2
    amax = centres[_candidates(h.numel(), start_bin, stride, h.numel())]
    used = h > 0
    x, weights = centres[used], h[used]
    fmt = E4M3 if isinstance(num_bits, tuple) else IntFormat(num_bits, unsigned, narrow_range=True)

    def exact(candidates: Tensor) -> Tensor:
        errors = []
        for block in candidates.split(max(1, _BLOCK // x.numel())):
            if isinstance(fmt, IntFormat):
                fake = symmetric_fake_quantize(x.expand(block.numel(), -1), block[:, None], fmt)
            else:
                fake = scaled_float_fake_quantize(x.expand(block.numel(), -1), block[:, None], fmt)
            errors.append((fake - x).square_() @ weights)
        return torch.cat(errors)

    if isinstance(fmt, IntFormat) and 0 < fmt.bound <= _MANY_LEVELS:
        errors = _squared_errors(x, weights, amax, fmt.bound)
        amax = amax[errors <= errors.min() + 1e-12 * (weights @ x.square())]
    return float(amax[torch.argmin(exact(amax))]) if amax.numel() > 1 else float(amax)


def _prefix(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), torch.cumsum(values, 0)])


def _squared_errors(x: Tensor, weights: Tensor, amax: Tensor, bound: int) -> Tensor:
    """The error of every candidate ``amax``: per level q the values round to, sum w x^2 - 2 q sum w x + q^2 sum w."""
    power0, power1, power2 = (_prefix(weights * x**k) for k in range(3))
    levels = torch.arange(bound + 1, dtype=torch.float64)
    errors = []
    for block in amax.split(max(1, _BLOCK // (bound + 1))):
        step = block[:, None] / bound
        ends = torch.searchsorted(x, ((levels[:-1] + 0.5) * step).contiguous())
        ends = torch.nn.functional.pad(ends, (1, 0), value=0)
        ends = torch.nn.functional.pad(ends, (0, 1), value=x.numel())
        sum0, sum1, sum2 = (power[ends].diff(dim=1) for power in (power0, power1, power2))
        q = levels * step
        errors.append((sum2 - 2 * q * sum1 + q * q * sum0).sum(1))
    return torch.cat(errors)


def entropy_amax(
    counts: Tensor,
    edges: Tensor,
    num_bits: int = 8,
    unsigned: bool = False,
    *,
    stride: int = 1,
    start_bin: int = 128,
) -> float:
    """The edge that, as amax, loses the least information (Kullback-Leibler divergence).

    Bin 0 first takes the count of bin 1. For each candidate i (``start_bin``, ... n in steps of ``stride``) the
    reference distribution is ``counts[:i]`` with everything beyond added to its last bin. The quantized one is
    ``counts[:i]`` grouped into ``2**(num_bits - 1 + unsigned)`` levels of equal width, the count of each level spread
    evenly over those of its bins that are not empty. The last of equals wins, and the result is ``edges[i]``.
    Method: S. Migacz, "8-bit Inference with TensorRT", GTC 2017.

    Raises:
        ValueError: no data; ``stride`` or ``start_bin`` out of range.
        TypeError: ``num_bits`` is not an integer.
    """
    fmt = IntFormat(num_bits, unsigned)
    num_levels = 2 ** max(0, fmt.magnitude_bits)
    h, e = _histogram(counts, edges)
    if h.numel() > 1:
        h = torch.cat([h[1:2], h[1:]])
    if not bool(h.sum() > 0):  # nothing beyond bin 0: it is the whole range
        return float(e[1])
    candidates = _candidates(h.numel(), max(1, start_bin), stride, h.numel() + 1)
    divergences = _divergences(h, candidates, num_levels)
    best = divergences.min()
    if bool(torch.isinf(best)):  # all are equally bad
        return float(e[candidates[-1]])
    near = candidates[divergences <= best + 1e-9]
    exact = torch.tensor([_divergence(h, int(i), num_levels) for i in near], dtype=torch.float64)
    return float(e[near[exact == exact.min()][-1]])


def _divergences(h: Tensor, candidates: Tensor, num_levels: int) -> Tensor:
    """The divergence of every candidate in closed form.

    With P and Q summing to T and S: KL = (sum P log P - sum P log Q) / T - log T + log S. The first sum is a prefix
    sum but for the last bin; the second needs, per level, its count and its number of bins that are not empty.
    """
    total = h.sum()
    sum_h, sum_used, sum_hlogh = _prefix(h), _prefix((h > 0).to(h.dtype)), _prefix(torch.xlogy(h, h))
    columns = min(num_levels, h.numel())
    result = []
    for block in candidates.split(max(1, _BLOCK // columns)):
        levels = block.clamp(max=num_levels)[:, None]  # fewer bins than levels: every bin is a level
        k = torch.minimum(torch.arange(columns + 1)[None, :], levels)
        starts = (k * block[:, None] + levels - 1) // levels
        level, used = sum_h[starts].diff(dim=1), sum_used[starts].diff(dim=1)
        p_log_q = torch.xlogy(level, level / used.clamp(min=1)).sum(1)
        # What lies beyond was added to the last bin, which belongs to the last level.
        last = h[block - 1]
        beyond = total - sum_h[block]
        index = levels - 1
        last_q = (level.gather(1, index) / used.gather(1, index).clamp(min=1))[:, 0]
        last_q = torch.where(last > 0, last_q, 0.0)
        p_log_q = p_log_q + torch.xlogy(beyond, last_q)
        p_log_p = sum_hlogh[block] - torch.xlogy(last, last) + torch.xlogy(last + beyond, last + beyond)
        kl = (p_log_p - p_log_q) / total - torch.log(total) + torch.log(sum_h[block])
        result.append(torch.where(sum_h[block] > 0, kl, torch.inf))
    return torch.cat(result)


def _divergence(h: Tensor, i: int, num_levels: int) -> Tensor:
    """The divergence of candidate ``i`` by its definition."""
    p = h[:i].clone()
    p[-1] += h[i:].sum()
    group = torch.arange(i) * min(num_levels, i) // i
    used = h[:i] > 0
    level = torch.zeros(num_levels, dtype=h.dtype).index_add_(0, group, h[:i])
    members = torch.zeros(num_levels, dtype=h.dtype).index_add_(0, group, used.to(h.dtype))
    q = torch.where(used, (level / members.clamp(min=1))[group], 0.0)
    p, q = p / p.sum(), q / q.sum()
    return torch.where(p > 0, p * torch.log(p / q), 0.0).sum()
