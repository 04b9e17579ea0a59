"""MaxCalibrator: the running absolute maximum."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import torch
from torch import Tensor

from .calibrator import Calibrator, reduce_blocks, reduce_keeping

_log = logging.getLogger(__name__)


class MaxCalibrator(Calibrator):
    """The largest absolute value seen, per tensor or per channel.

    Args:
        num_bits: width of the codes.
        axis: the axes that keep their own amax; negative ones count from the end.
        unsigned: codes from 0.
        track_amax: keep the amax of every batch in :attr:`amaxs`.
        block_size: so many elements of the last axis have an amax of their own; all other axes keep theirs.
    """

    def __init__(
        self,
        num_bits: int | tuple[int, int] = 8,
        axis: int | tuple[int, ...] | None = None,
        unsigned: bool = False,
        track_amax: bool = False,
        *,
        block_size: int | None = None,
    ) -> None:
        super().__init__(num_bits, axis, unsigned)
        self._track_amax = track_amax
        self._block_size = block_size
        self._amaxs: list[np.ndarray] = []
        self._calib_amax: Tensor | None = None

    @property
    def amaxs(self) -> list[np.ndarray]:
        """The amax of every batch, where ``track_amax`` was asked for."""
        return self._amaxs

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Take in the absolute maximum of ``x`` over all axes but ``axis``; its dimensions are kept.

        Raises:
            RuntimeError: the amax of ``x`` has another shape than before.
            ValueError: ``axis`` does not exist in ``x``.
        """
        if x.numel() == 0:
            return
        values = x if x.is_floating_point() else x.to(torch.float32)
        blocks = self._block_size
        local = reduce_keeping(values, self._axis) if blocks is None else reduce_blocks(values, blocks)
        if self._unsigned and _log.isEnabledFor(logging.DEBUG) and bool((x < 0).any()):
            _log.debug("negative values in the calibration data of an unsigned quantizer")
        seen = self._calib_amax
        if seen is None:
            seen = local
        elif local.shape != seen.shape:
            raise RuntimeError(
                f"amax shape changed from {tuple(seen.shape)} to {tuple(local.shape)}: the axes "
                f"{self._axis} must have the same sizes in every batch"
            )
        else:
            seen = torch.maximum(seen, local.to(seen.dtype))
        self._calib_amax = seen
        if self._track_amax:
            self._amaxs.append(local.to("cpu", torch.float32, copy=True).numpy())

    def reset(self) -> None:
        """Forget what was seen."""
        self._calib_amax = None
        self._amaxs = []

    def compute_amax(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The largest absolute value seen, or None before data. Warns where it is NaN or infinite."""
        if self._calib_amax is not None and not bool(torch.isfinite(self._calib_amax).all()):
            warnings.warn("the calibration data held NaN or infinite values: amax is not finite", stacklevel=2)
        return self._calib_amax

    def __str__(self) -> str:
        return f"MaxCalibrator(track_amax={self._track_amax}, calib_amax={self._calib_amax})"
