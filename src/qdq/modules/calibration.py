"""Calibration of module-quantized models: `with qdq.calibrating(model): ...` around a loop over the data."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..calib.calibrator import Calibrator
from ..calib.histogram import HistogramCalibrator
from ..calib.max import MaxCalibrator
from ..errors import CalibrationError, QdqError
from ..quantizer import TensorQuantizer

# The searches of amax begin at bin 128.
_FEWEST_BINS = 128
METHODS = ("max", "entropy", "mse", "percentile")


class CalibrationProgress:
    """What `with qdq.calibrating(...) as progress` gives: which quantizers have seen data so far."""

    def __init__(self, recorders: dict[str, _Recorder]) -> None:
        self._recorders = recorders

    @property
    def names(self) -> list[str]:
        """The quantizers that are calibrated."""
        return list(self._recorders)

    @property
    def seen(self) -> list[str]:
        """Those that have seen data."""
        return [name for name, recorder in self._recorders.items() if recorder.seen]

    @property
    def unseen(self) -> list[str]:
        """Those that have not."""
        return [name for name, recorder in self._recorders.items() if not recorder.seen]

    def __repr__(self) -> str:
        return f"CalibrationProgress({len(self.seen)} of {len(self.names)} quantizers have seen data)"


def calibrating(
    model: nn.Module, method: str = "max", *, percentile: float = 99.99, strict: bool = True, num_bins: int = 2048
) -> AbstractContextManager[CalibrationProgress]:
    """A context manager: what runs through the model in its block calibrates the quantizers of the model.

        with qdq.calibrating(model, method="percentile"):
            for x in loader:
                model(x)

    In the block the model computes in float, in eval mode and without gradients. At its end every quantizer takes the
    amax that `method` finds in what it saw, and all flags, calibrators and training modes are as before. Quantizers
    with `learn_amax` start their range there. After an exception in the block, or an error at its end, no amax is
    changed.

    Quantizers with an axis (weights, mostly) always take the maximum of each channel or block, as histograms are per
    tensor; for another method see :func:`qdq.calib.calibrate_weights`. Disabled quantizers stay disabled, and those
    without a calibrator keep their amax, which a recipe has fixed.

    Args:
        model: with quantized modules, see :func:`qdq.nn.quantize_modules`.
        method: "max", "entropy", "mse" or "percentile", as :class:`HistogramCalibrator` has them.
        percentile: for "percentile", in per cent.
        strict: quantizers that saw no data are an error; False warns, and leaves their amax as it was.
        num_bins: bins that the first batch gets in histograms.

    Raises:
        QdqError: not a module.
        ValueError: unknown method; `percentile` not above 50 and up to 100; `num_bins` below 128.
        CalibrationError: the model has no quantizers, is on the meta device, or is calibrated in an outer block;
            "entropy" with E4M3; NaN or infinite data, or negative ones for an unsigned quantizer; quantizers that saw
            no data, where `strict`. Quantizers are named.
    """
    if not isinstance(model, nn.Module):
        raise QdqError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if method not in METHODS:
        raise ValueError(f"unknown calibration method {method!r}: choose one of {', '.join(METHODS)}")
    if isinstance(percentile, bool) or not isinstance(percentile, (int, float)) or not 50 < percentile <= 100:
        raise ValueError(f"percentile must be a number above 50 and up to 100, got {percentile!r}")
    if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < _FEWEST_BINS:
        raise ValueError(f"num_bins must be an integer of at least {_FEWEST_BINS}, got {num_bins!r}")
    return _calibrating(model, method, percentile, strict, num_bins)


@contextlib.contextmanager
def _calibrating(
    model: nn.Module, method: str, percentile: float, strict: bool, num_bins: int
) -> Iterator[CalibrationProgress]:
    quantizers = {name: module for name, module in model.named_modules() if isinstance(module, TensorQuantizer)}
    recorders = _recorders(quantizers, method, percentile, num_bins)
    before = {quantizer: _Stages.of(quantizer) for quantizer in quantizers.values()}
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for name, quantizer in quantizers.items():
            quantizer.disable_quant()
            quantizer.disable_clip()
            quantizer.disable_calib()
            if name in recorders:
                quantizer._calibrator = recorders[name]
                quantizer.enable_calib()
        # Collecting reads values, which no compiled graph can hold.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield CalibrationProgress(recorders)
        _check_seen([name for name, recorder in recorders.items() if not recorder.seen], strict)
        found = {name: recorder for name, recorder in recorders.items() if recorder.seen}
        for recorder in found.values():
            recorder.solve()
        for name in found:
            quantizers[name].load_calib_amax()
            if quantizers[name]._learn_amax:
                quantizers[name].init_learn_amax()
    finally:
        for quantizer, stages in before.items():
            stages.restore(quantizer)
        for module, flag in training.items():
            module.training = flag


def _recorders(
    quantizers: dict[str, TensorQuantizer], method: str, percentile: float, num_bins: int
) -> dict[str, _Recorder]:
    """A recorder for every quantizer to calibrate."""
    if not quantizers:
        raise CalibrationError("the model has no quantizers: convert it with qdq.nn.quantize_modules first")
    busy = [name for name, quantizer in quantizers.items() if isinstance(quantizer._calibrator, _Recorder)]
    if busy:
        raise CalibrationError(f"the model is being calibrated in an outer block already: quantizer {busy[0]}")
    wanted = {n: q for n, q in quantizers.items() if not q.disabled and q._calibrator is not None}
    floating = [n for n, q in wanted.items() if q.axis is None and isinstance(q.num_bits, tuple)]
    if method == "entropy" and floating:
        raise CalibrationError(f"entropy is not defined for E4M3, choose max, mse or percentile: {', '.join(floating)}")
    recorders = {}
    for name, quantizer in wanted.items():
        if method == "max" or quantizer.axis is not None:
            inner: Calibrator = MaxCalibrator(
                quantizer.num_bits, quantizer.axis, quantizer.unsigned, block_size=quantizer.block_size
            )
            arguments: dict[str, Any] = {}
        else:
            inner = HistogramCalibrator(quantizer.num_bits, None, quantizer.unsigned, num_bins)
            arguments = {"method": method} | ({"percentile": percentile} if method == "percentile" else {})
        recorders[name] = _Recorder(name, inner, arguments)
    return recorders


def _check_seen(unseen: list[str], strict: bool) -> None:
    if not unseen:
        return
    message = f"{len(unseen)} quantizers saw no data: {', '.join(unseen)}"
    if strict:
        raise CalibrationError(
            f"{message}. No amax was changed: calibrate with data that reach these parts of the model, disable those "
            "that are not used, or pass strict=False"
        )
    # Points at the `with` statement: this function, the generator, contextlib twice.
    warnings.warn(f"{message}; their amax is as before", stacklevel=5)


class _Recorder(Calibrator):
    """The calibrator of one quantizer in the block: refuses data that are not finite, and solves before it is asked."""

    def __init__(self, name: str, inner: Calibrator, arguments: dict[str, Any]) -> None:
        super().__init__(inner._num_bits, inner._axis, inner._unsigned)
        self.name = name
        self.seen = False
        self._inner = inner
        self._arguments = arguments
        self._amax: Tensor | None = None

    def collect(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        if x.device.type == "meta":
            raise CalibrationError(
                f"quantizer {self.name}: tensors of the meta device have no values to calibrate with"
            )
        low, high = torch.aminmax(x.detach())
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise CalibrationError(
                f"quantizer {self.name}: the data that reach it hold NaN or infinite values; no amax was changed"
            )
        if self._unsigned and bool(low < 0):
            raise CalibrationError(
                f"quantizer {self.name} is unsigned, and negative values reach it: set unsigned=False in its "
                "descriptor; no amax was changed"
            )
        self.seen = True
        self._amax = None
        self._inner.collect(x)

    def reset(self) -> None:
        self.seen = False
        self._inner.reset()

    def solve(self) -> None:
        """Find the amax; an error leaves every quantizer as it was."""
        self._amax = self._inner.compute_amax(**self._arguments)

    def compute_amax(self, *args: Any, **kwargs: Any) -> Tensor | None:
        if self.seen and self._amax is None:  # asked for inside the block, as the published loops do
            self.solve()
        return self._amax


@dataclasses.dataclass(frozen=True)
class _Stages:
    """What the block changes in a quantizer, to put it back."""

    disabled: bool
    if_quant: bool
    if_clip: bool
    if_calib: bool
    calibrator: Calibrator | None

    @classmethod
    def of(cls, quantizer: TensorQuantizer) -> _Stages:
        q = quantizer
        return cls(q._disabled, q._if_quant, q._if_clip, q._if_calib, q._calibrator)

    def restore(self, quantizer: TensorQuantizer) -> None:
        quantizer._disabled, quantizer._if_quant, quantizer._if_clip = self.disabled, self.if_quant, self.if_clip
        quantizer._if_calib, quantizer._calibrator = self.if_calib, self.calibrator
