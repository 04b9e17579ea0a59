"""`InputValues`: what is remembered of the tensor that linears read, while the float model runs over the samples."""

from __future__ import annotations

import torch
from torch import Tensor


class InputValues:
    """Extremes of every channel (the last dimension), and some of the vectors.

    Attributes:
        low, high: [channels], float64: the least and the largest value; zeros before anything was seen.
        rows: [vectors, channels]: evenly spaced ones of every batch.

    Args:
        count: so many vectors of a batch are kept.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.low, self.high = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        self._rows: list[Tensor] = []

    @property
    def maxima(self) -> Tensor:
        """[channels], float64: the largest magnitude."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def rows(self) -> Tensor:
        """[vectors, channels]."""
        return torch.cat(self._rows) if self._rows else torch.zeros(0, len(self.low))

    def observe(self, x: Tensor) -> None:
        """Takes in a batch, [..., channels]."""
        x = x.detach().reshape(-1, x.shape[-1])
        if not len(self.low):
            self.low = self.high = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        if not len(x):
            return
        low, high = x.aminmax(dim=0)
        # The ranges of quantizers hold zero, so it counts as seen.
        self.low, self.high = torch.minimum(self.low, low.double()), torch.maximum(self.high, high.double())
        if self.count:
            self._rows.append(x[:: -(-len(x) // self.count)].clone())
