"""HistogramCalibrator: a histogram of absolute values whose first batch fixes the bin width."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .calibrator import FLOATS, Calibrator, engine_for
from .solvers import entropy_amax, mse_amax, percentile_amax

_MOST_BINS = 1 << 22


class HistogramCalibrator(Calibrator):
    """A histogram of absolute values, and the amax that a method finds in it.

    The first batch fixes the bin width, its maximum over ``num_bins``; later batches add whole bins of that width.
    Bin k holds ``k * width <= |x| < (k + 1) * width``, and the last one its upper end too. Counts are int64 and stay
    on the device of the first batch. Values are compared as :func:`qdq.kernels.reference.histogram` says.

    Args:
        num_bits: width of the codes, or (4, 3).
        axis: None, as a histogram is one per tensor.
        unsigned: codes from 0.
        num_bins: bins of the first batch.
        grow_method: accepted for old code, ignored with a warning.
        skip_zeros: leave out values that are exactly 0.
        torch_hist: give the histogram out as tensors; False as arrays. The counts are the same.

    Raises:
        NotImplementedError: ``axis`` is not None.
        ValueError: ``num_bins`` below 1.
    """

    def __init__(
        self,
        num_bits: int | tuple[int, int] = 8,
        axis: int | tuple[int, ...] | None = None,
        unsigned: bool = False,
        num_bins: int = 2048,
        grow_method: str | None = None,
        skip_zeros: bool = False,
        torch_hist: bool = True,
    ) -> None:
        super().__init__(num_bits, axis, unsigned)
        if axis is not None:
            raise NotImplementedError(f"a histogram is collected per tensor: axis must be None, got {axis}")
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {num_bins}")
        if grow_method is not None:
            warnings.warn("grow_method is ignored: histograms grow by whole bins", stacklevel=2)
        self._num_bins = num_bins
        self._skip_zeros = skip_zeros
        self._torch_hist = torch_hist
        self._counts: Tensor | None = None
        self._width = 0.0
        self._warned = False

    @property
    def _calib_hist(self) -> Tensor | np.ndarray | None:
        """Counts, int64."""
        if self._counts is None or self._torch_hist:
            return self._counts
        return self._counts.cpu().numpy()

    @property
    def _calib_bin_edges(self) -> Tensor | np.ndarray | None:
        """Edges of the bins, one more than counts: a float32 tensor, or a float64 array."""
        if self._counts is None:
            return None
        if self._torch_hist:
            return self._edges().to(self._counts.device, torch.float32)
        return self._edges().numpy()

    @_calib_hist.setter
    def _calib_hist(self, counts: Tensor | np.ndarray) -> None:
        self._counts = torch.as_tensor(counts).to(torch.int64)

    @_calib_bin_edges.setter
    def _calib_bin_edges(self, edges: Tensor | np.ndarray) -> None:
        """Edges of equal distance, from 0."""
        self._width = float(edges[-1]) / (len(edges) - 1)

    def _edges(self) -> Tensor:
        assert self._counts is not None
        return torch.arange(self._counts.numel() + 1, dtype=torch.float64) * self._width

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Add the absolute values of ``x``: any shape, floating point or integer. NaN and infinity are left out.

        In a range already seen this reads ``x`` once.

        Raises:
            RuntimeError: a value so far beyond the first batch that the histogram would need over 4 million bins.
        """
        x = x.detach()
        if x.is_complex():
            x = x.abs()
        if x.dtype not in FLOATS:
            x = x.to(torch.float32)
        if x.numel() == 0 or self._add_inside(x):
            return
        compute = engine_for(x)
        largest = float(compute.absmax(x))
        if not math.isfinite(largest):
            self._warn_once()
            x = x[torch.isfinite(x)]
            largest = float(compute.absmax(x))
        if x.numel() == 0 or (self._skip_zeros and largest == 0):
            return
        counts = self._counts
        if counts is None:
            counts = torch.zeros(self._num_bins, dtype=torch.int64, device=x.device)
        if self._width == 0.0:
            # Batches of zeros fix no width; they lie in bin 0 whatever it becomes.
            self._width = largest / self._num_bins
        if self._width > 0.0:
            counts = self._grown(counts, largest)
        self._counts = counts
        if self._width > 0.0:
            self._add_inside(x)
        else:
            counts[0] += int(torch.count_nonzero(x)) if self._skip_zeros else x.numel()

    def _add_inside(self, x: Tensor) -> bool:
        """Count ``x``; False, and nothing is counted, where there are no bins yet or a value lies in none."""
        counts = self._counts
        if counts is None or not self._width > 0.0:
            return False
        found, outside, zeros = engine_for(x).abs_histogram(x, self._width, counts.numel())
        if int(outside):
            return False
        counts += found.to(counts.device)
        if self._skip_zeros:
            counts[0] -= zeros.to(counts.device)
        return True

    def _grown(self, counts: Tensor, largest: float) -> Tensor:
        """``counts`` with bins of 0 added until ``largest`` lies in one."""
        # The quotient may round up beyond a whole number, whose value belongs to the last bin.
        needed = math.ceil(largest / self._width * (1 - 1e-12))
        needed += largest > needed * self._width * (1 + 1e-12)  # the upper end of the kernels
        if needed > max(_MOST_BINS, self._num_bins):
            raise RuntimeError(
                f"a value of {largest:.6g} needs {needed} bins of the width {self._width:.6g} that the first batch "
                "fixed: begin with a batch of typical values, or use qdq.calib.HistogramCollector"
            )
        if needed > counts.numel():
            counts = torch.nn.functional.pad(counts, (0, needed - counts.numel()))
        return counts

    def _warn_once(self) -> None:
        if not self._warned:
            warnings.warn("the calibration data hold NaN or infinite values: they are left out", stacklevel=3)
            self._warned = True

    def reset(self) -> None:
        """Forget what was seen."""
        self._counts = None
        self._width = 0.0
        self._warned = False

    def compute_amax(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, method: str, *, stride: int = 1, start_bin: int = 128, percentile: float = 99.99
    ) -> Tensor | None:
        """The amax that ``method`` finds, a float32 scalar tensor on the device of the data; None before data.

        Args:
            method: "entropy", "mse" or "percentile", see :mod:`qdq.calib.solvers`.
            stride: step between the candidates of "entropy" and "mse".
            start_bin: their first candidate.
            percentile: for "percentile", in per cent.

        Raises:
            TypeError: another method; "entropy" for a floating-point format.
            ValueError: ``percentile`` outside the range 0 to 100; bad ``stride`` or ``start_bin``.
        """
        solvers: dict[str, Any] = {"entropy": entropy_amax, "mse": mse_amax, "percentile": percentile_amax}
        if method not in solvers:
            raise TypeError(f"unknown calibration method {method!r}: choose one of {', '.join(solvers)}")
        if method == "percentile" and not 0 <= percentile <= 100:
            raise ValueError(f"percentile must be in the range 0 to 100, got {percentile}")
        if self._counts is None:
            return None
        edges = self._edges()
        if method == "percentile":
            amax = percentile_amax(self._counts, edges, percentile)
        else:
            solver = solvers[method]
            amax = solver(self._counts, edges, self._num_bits, self._unsigned, stride=stride, start_bin=start_bin)
        return torch.tensor(amax, dtype=torch.float32, device=self._counts.device)

    def __str__(self) -> str:
        if self._counts is None:
            return f"HistogramCalibrator(num_bins={self._num_bins}, no data)"
        return f"HistogramCalibrator({self._counts.numel()} bins, edges from 0 to {float(self._edges()[-1]):.6g})"
