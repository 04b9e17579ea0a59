"""`InputValues`: what is remembered of the tensor that linears read, while the float model runs over the samples."""

from __future__ import annotations

import torch
from torch import Tensor


class InputValues:
    """Extremes of every channel (the last dimension), and some of the vectors.

    Attributes:
        low, high: [channels], float64: the least and the largest value; zeros before anything was seen.
        others: the same of all vectors but `rows`: what is chosen by their extremes can be tried on `rows` without
            knowing them.
        rows: [vectors, channels]: evenly spaced ones of every batch, at most every second one.

    Args:
        count: so many vectors of a batch are kept, or about half of them; 0 keeps none, and `others` are not looked at.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.low, self.high = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        self.others = self.low, self.high
        self._rows: list[Tensor] = []
        self._seen = 0

    @property
    def maxima(self) -> Tensor:
        """[channels], float64: the largest magnitude."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def other_maxima(self) -> Tensor:
        """[channels], float64: the largest magnitude outside of `rows`."""
        return torch.maximum(self.others[0].abs(), self.others[1].abs())

    @property
    def rows(self) -> Tensor:
        """[vectors, channels]."""
        return torch.cat(self._rows) if self._rows else torch.zeros(0, len(self.low))

    def observe(self, x: Tensor) -> None:
        """Takes in a batch, [..., channels]."""
        x = x.detach().reshape(-1, x.shape[-1])
        if not len(self.low):
            # The ranges of quantizers hold zero, so it counts as seen.
            self.low = self.high = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            self.others = self.low, self.high
        self.low, self.high = _with(x, self.low, self.high)
        if not self.count or not len(x):
            return
        spacing = max(2, -(-len(x) // self.count))
        # Batches of one vector are taken by turns as well.
        kept = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        kept[-self._seen % spacing :: spacing] = True
        self._seen += len(x)
        self._rows.append(x[kept])
        self.others = _with(x[~kept], *self.others)


def _with(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Extremes that take in more vectors."""
    if not len(x):
        return low, high
    least, most = x.aminmax(dim=0)
    return torch.minimum(low, least.double()), torch.maximum(high, most.double())
