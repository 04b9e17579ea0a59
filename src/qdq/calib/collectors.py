"""Collectors: what was seen. They stream, and their result depends neither on the order of batches nor on their split.

A collector never decides anything; the solvers of :mod:`qdq.calib.solvers` do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .calibrator import FLOATS, engine_for

# The reciprocal of the bin width must be a normal float32 number.
_SMALLEST_EXPONENT = -126


class RangeCollector:
    """Streams the exact smallest and largest value.

    Attributes:
        min: the smallest finite value seen, as a Python float (inf before data).
        max: the largest finite value seen (-inf before data).
        total: finite values seen.
        nonfinite: NaN and infinite values seen; they count nowhere else.
    """

    def __init__(self) -> None:
        self.min = math.inf
        self.max = -math.inf
        self.total = 0
        self.nonfinite = 0

    def collect(self, x: Tensor) -> None:
        """Add the values of ``x``: any shape, any floating-point or integer dtype, any device.

        Raises:
            TypeError: complex values.
        """
        self._observe(x)

    def _observe(self, x: Tensor) -> Tensor:
        """Update the range; the finite values of ``x``, in a dtype that can be binned."""
        if x.is_complex():
            raise TypeError(f"a collector takes real values, got {x.dtype}")
        x = x.detach()
        if x.dtype not in FLOATS:
            x = x.to(torch.float64)
        if x.numel() == 0:
            return x
        low, high = _range_of(x)
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = x[torch.isfinite(x)]
            self.nonfinite += x.numel() - finite.numel()
            x = finite
            if x.numel() == 0:
                return x
            low, high = _range_of(x)
        self.min, self.max = min(self.min, low), max(self.max, high)
        self.total += x.numel()
        return x

    def merge(self, other: RangeCollector) -> None:
        """Add what ``other`` has seen, as if this collector had seen it."""
        self.min, self.max = min(self.min, other.min), max(self.max, other.max)
        self.total += other.total
        self.nonfinite += other.nonfinite

    def __repr__(self) -> str:
        seen = f"[{self.min:.6g}, {self.max:.6g}]" if self.total else "no data"
        return f"{type(self).__name__}({seen}, total={self.total}, nonfinite={self.nonfinite})"


class HistogramCollector(RangeCollector):
    """A streaming histogram of signed values; it keeps what :class:`RangeCollector` keeps as well.

    Bins are aligned at 0, so that 0 is an edge, and their width is a power of two: bin k holds
    ``k * width <= x < (k + 1) * width``. The width is the smallest that covers 0 and all that was seen in ``num_bins``
    bins. When the range outgrows them, neighbouring bins merge in pairs, which is exact. So the counts are a function
    of the values alone.

    Attributes:
        num_bins: the most bins ever used; between half of them and all of them are.
        zeros: values exactly 0 (they lie in the bin [0, width)); any range that contains 0 represents them exactly.
    """

    def __init__(self, num_bins: int = 4096) -> None:
        """
        Raises:
            ValueError: ``num_bins`` is below 2.
        """
        super().__init__()
        if num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, got {num_bins}")
        self.num_bins = num_bins
        self.zeros = 0
        self._exponent = _SMALLEST_EXPONENT
        self._first = 0
        self._counts = torch.zeros(0, dtype=torch.int64)

    @classmethod
    def restored(
        cls,
        *,
        num_bins: int,
        counts: Tensor,
        first: int,
        exponent: int,
        zeros: int,
        total: int,
        nonfinite: int,
        low: float,
        high: float,
    ) -> HistogramCollector:
        """A collector from what another one held: its attributes, `low` and `high` being `min` and `max`."""
        collector = cls(num_bins)
        collector._counts, collector._first, collector._exponent = counts.clone(), first, exponent
        collector.zeros, collector.total, collector.nonfinite = zeros, total, nonfinite
        collector.min, collector.max = low, high
        return collector

    @property
    def exponent(self) -> int:
        """The bin width is 2 to this power."""
        return self._exponent

    @property
    def width(self) -> float:
        """Width of a bin, a power of two."""
        return math.ldexp(1.0, self._exponent)

    @property
    def first(self) -> int:
        """Number of the first bin, 0 or negative: bin k starts at ``k * width``."""
        return self._first

    @property
    def counts(self) -> Tensor:
        """Values per bin, int64, on the CPU; empty before data."""
        return self._counts.clone()

    @property
    def edges(self) -> Tensor:
        """Edges of the bins, float64, one more than ``counts``; exact."""
        index = torch.arange(self._first, self._first + self._counts.numel() + 1, dtype=torch.float64)
        return index * self.width

    def collect(self, x: Tensor) -> None:
        """Add the values of ``x``: any shape, any floating-point or integer dtype, any device.

        Raises:
            TypeError: complex values.
        """
        x = self._observe(x)
        if x.numel() == 0:
            return
        self._grow()
        counts, _, zeros = engine_for(x).histogram(x, self.width, self._first, self._counts.numel())
        self._counts += counts.cpu()
        self.zeros += int(zeros)

    def merge(self, other: RangeCollector) -> None:
        """Add what ``other`` has seen, as if this collector had seen it.

        Raises:
            TypeError: ``other`` is not a :class:`HistogramCollector`.
            ValueError: ``other`` has another ``num_bins``.
        """
        if not isinstance(other, HistogramCollector):
            raise TypeError(f"only a HistogramCollector can be merged, got {type(other).__name__}")
        if other.num_bins != self.num_bins:
            raise ValueError(f"num_bins differs: {self.num_bins} here, {other.num_bins} in the collector to be merged")
        theirs = other._counts, other._first, other._exponent
        super().merge(other)
        self.zeros += other.zeros
        if other.total:
            self._grow()
            _add(self._counts, self._first, self._exponent, *theirs)

    def _grow(self) -> None:
        """Give the counts the width and the bins that the range asks for."""
        low, high = min(self.min, 0.0), max(self.max, 0.0)
        exponent = _width_exponent(low, high, self.num_bins, self._exponent)
        first, last = _bin_of(low, exponent), _bin_of(high, exponent)
        if exponent == self._exponent and first == self._first and last - first + 1 == self._counts.numel():
            return
        counts = torch.zeros(last - first + 1, dtype=torch.int64)
        _add(counts, first, exponent, self._counts, self._first, self._exponent)
        self._counts, self._first, self._exponent = counts, first, exponent


def _range_of(x: Tensor) -> tuple[float, float]:
    low, high = engine_for(x).minmax(x)
    return float(low) + 0.0, float(high) + 0.0  # without the sign of a zero, which the engines do not define


def _bin_of(value: float, exponent: int) -> int:
    number = math.floor(math.ldexp(value, -exponent))
    # The quotient of a tiny negative value may be 0.
    return -1 if number == 0 and value < 0 else number


def _width_exponent(low: float, high: float, num_bins: int, start: int) -> int:
    """The smallest exponent from ``start`` up whose bins cover ``[low, high]``."""
    exponent = start
    if high > low:
        exponent = max(start, math.frexp(high / num_bins - low / num_bins)[1] - 2)
    while _bin_of(high, exponent) - _bin_of(low, exponent) + 1 > num_bins:
        exponent += 1
    return exponent


def _add(counts: Tensor, first: int, exponent: int, more: Tensor, more_first: int, more_exponent: int) -> None:
    """Add the bins ``more``, not wider than those of ``counts``, in place."""
    index = torch.arange(more_first, more_first + more.numel(), dtype=torch.int64)
    # floor(floor(x / w) / 2**n) == floor(x / (2**n * w)); a shift of 63 or more leaves the sign.
    index >>= min(exponent - more_exponent, 62)
    counts.index_add_(0, index - first, more)
