"""Calibration of weights from their values alone: no data, one search per output channel."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..errors import CalibrationError
from ..formats import E4M3, IntFormat
from ..kernels.reference import bin_index, comparable, scaled_float_fake_quantize, symmetric_fake_quantize
from .calibrator import engine_for, normalize_axes, reduce_amax
from .quantized_weights import quantized_weights
from .solvers import mse_amax

_log = logging.getLogger(__name__)

METHODS = ("max", "mse", "percentile")
# Elements of the largest block of histograms, and of the largest table of errors.
_BLOCK = 1 << 22
# From here on a call of the kernels for every row is faster than one pass over all rows in plain PyTorch.
_LONG_ROW = 1 << 12


@torch.no_grad()
def calibrate_weights(
    model: nn.Module,
    method: str = "percentile",
    perchannel: bool = True,
    percentile: float = 99.99,
    num_bins: int = 2048,
) -> None:
    """Sets the amax of every weight quantizer of a model from the weight itself.

    These are modules with a `weight` and a `weight_quantizer`, and the recurrent and attention layers of `qdq.nn`,
    where it is of what each quantizer sees (in an LSTM the joined weights of a layer and direction). Disabled
    quantizers too. The amax is the one that :class:`HistogramCalibrator` finds for the same slice, bit for bit, or
    :class:`MaxCalibrator`. With `learn_amax` the learned range starts at the largest amax.

    Args:
        model: with quantized modules.
        method: "max"; "mse", the least squared error; or "percentile".
        perchannel: one amax for each index of the quantizer's own axis, dimensions kept; where it has none, of axis 0,
            in transposed convolutions axis 1; with a `block_size` one for each block. False: one for the weight, 0-d.
            An amax of the other kind is replaced.
        percentile: for "percentile", in per cent.
        num_bins: bins of each histogram.

    Raises:
        TypeError: unknown method.
        ValueError: `percentile` outside the range 0 to 100, or `num_bins` below 1.
        CalibrationError: a weight is empty or holds NaN or infinity; it is named. Nothing is changed.
    """
    if method not in METHODS:
        raise TypeError(f"unknown method {method!r} for weights: choose one of {', '.join(METHODS)}")
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be in the range 0 to 100, got {percentile}")
    if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < 1:
        raise ValueError(f"num_bins must be an integer of at least 1, got {num_bins!r}")
    search = _Search(method, percentile, num_bins)
    found: list[tuple[Any, Tensor]] = []
    for path, module in model.named_modules():
        for name, weights, quantizer in quantized_weights(module):
            weight = weights[0] if len(weights) == 1 else torch.cat(weights, 1)
            if weight.numel() == 0 or not bool(torch.isfinite(weight).all()):
                raise CalibrationError(f"{f'{path}.{name}'.lstrip('.')} is empty or holds NaN or infinite values")
            axes = _axes(module, weight, quantizer) if perchannel else ()
            blocks = getattr(quantizer, "block_size", None) if perchannel else None
            of_part = functools.partial(search.amax, num_bits=quantizer.num_bits, unsigned=quantizer.unsigned)
            if blocks is None:
                found.append((quantizer, of_part(weight.detach(), axes)))
            else:
                found.append((quantizer, _of_blocks(weight.detach(), blocks, of_part)))
    for quantizer, amax in found:
        _set_amax(quantizer, amax)
    if not found:
        _log.warning("calibrate_weights: the model has no weight quantizers")


def _axes(module: nn.Module, weight: Tensor, quantizer: Any) -> tuple[int, ...]:
    if quantizer.axis is not None:
        return normalize_axes(quantizer.axis, weight.dim())
    return (1,) if isinstance(module, _ConvTransposeNd) else (0,)


def _of_blocks(weight: Tensor, block_size: int, amax: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Tensor:
    """[rows, blocks]; the last block may be short, and is searched by itself: zeros would be counted."""
    rows, whole = weight.shape[0], weight.shape[1] // block_size * block_size
    parts = [amax(weight[:, :whole].unflatten(1, (-1, block_size)), (0, 1))] if whole else []
    if whole < weight.shape[1]:
        parts.append(amax(weight[:, whole:], (0,)))
    return torch.cat([part.reshape(rows, -1) for part in parts], 1)


class _Search:
    """What a HistogramCalibrator computes, for all channels of a weight at once."""

    def __init__(self, method: str, percentile: float, num_bins: int) -> None:
        self.method = method
        self.percentile = percentile
        self.num_bins = num_bins
        self._errors: dict[tuple[Any, bool], Tensor] = {}

    def amax(self, weight: Tensor, axes: tuple[int, ...], num_bits: int | tuple[int, int], unsigned: bool) -> Tensor:
        """float32, with the dimensions of `weight` kept, of size 1 but for `axes`; 0-d for one value."""
        others = tuple(axis for axis in range(weight.dim()) if axis not in axes)
        if self.method == "max":
            return reduce_amax(weight, others).to(torch.float32)
        kept = [size if axis in axes else 1 for axis, size in enumerate(weight.shape)]
        rows = weight.permute(*axes, *others).reshape(math.prod(kept), -1).abs()
        if rows.dtype != torch.float64:
            rows = rows.to(torch.float32)
        blocks = rows.split(max(1, _BLOCK // self.num_bins))
        result = torch.cat([self._of_rows(block, num_bits, unsigned) for block in blocks]).to(torch.float32)
        return result.reshape(()) if result.numel() == 1 else result.reshape(kept)

    def _of_rows(self, rows: Tensor, num_bits: int | tuple[int, int], unsigned: bool) -> Tensor:
        """The amax, float64, of every row of absolute values."""
        largest = rows.amax(1).to(torch.float64)
        width = largest / torch.full_like(largest, self.num_bins)
        # A row of zeros has no width; its values lie in bin 0 whatever it is.
        used = torch.where(width > 0, width, 1.0)
        columns = self.num_bins
        if rows.is_cpu and rows.shape[1] >= _LONG_ROW:
            count = engine_for(rows).abs_histogram
            counts = torch.stack([count(row, one, columns)[0] for row, one in zip(rows, used.tolist(), strict=True)])
        else:
            values = comparable(rows)
            index = bin_index(values, used[:, None].to(values.dtype)).clamp_(max=columns - 1)
            index += columns * torch.arange(rows.shape[0], device=rows.device)[:, None]
            counts = torch.bincount(index.flatten(), minlength=rows.shape[0] * columns).view(-1, columns).cpu()
        width = width.cpu()
        if self.method == "percentile":
            share = torch.cumsum(counts.to(torch.float64), 1) / counts.sum(1, keepdim=True).to(torch.float64)
            wanted = torch.full((rows.shape[0], 1), self.percentile / 100, dtype=torch.float64)
            return torch.searchsorted(share, wanted)[:, 0].clamp_(max=columns - 1) * width
        return self._least_squares(counts, width, num_bits, unsigned)

    def _least_squares(self, counts: Tensor, width: Tensor, num_bits: int | tuple[int, int], unsigned: bool) -> Tensor:
        """`mse_amax` of every row. Where the best candidate is best by far, a product of matrices finds it.

        In units of the bin width all rows have the same bin centres and candidates, and so the same errors of them.
        """
        result = torch.full_like(width, torch.nan)
        n = self.num_bins
        first = min(128, n - 1)
        # Values of at most 2**-24 count as zeros, in whatever unit.
        alike = width > 2.0**-22
        if n * (n - first) <= _BLOCK and bool(alike.any()):
            h = counts[alike].to(torch.float64)
            x = torch.arange(n, dtype=torch.float64) + 0.5
            if (num_bits, unsigned) not in self._errors:
                self._errors[num_bits, unsigned] = _squared_errors(x, x[first:], num_bits, unsigned)
            errors = h @ self._errors[num_bits, unsigned]
            least, best = errors.min(1)
            near = errors <= (least + 1e-11 * (h @ x.square()))[:, None]
            edge = width[alike]
            centre = ((best + first) * edge + (best + first + 1) * edge) / 2
            result[alike] = torch.where(near.sum(1) == 1, centre, torch.nan)
        for i in torch.nonzero(torch.isnan(result))[:, 0].tolist():
            edges = torch.arange(n + 1, dtype=torch.float64) * float(width[i])
            result[i] = mse_amax(counts[i], edges, num_bits, unsigned)
        return result


def _squared_errors(x: Tensor, amax: Tensor, num_bits: int | tuple[int, int], unsigned: bool) -> Tensor:
    """(len(x), len(amax)): the squared error of every value with every amax."""
    values, candidates = x[:, None].expand(-1, amax.numel()), amax[None, :]
    if isinstance(num_bits, tuple):
        fake = scaled_float_fake_quantize(values, candidates, E4M3)
    else:
        fake = symmetric_fake_quantize(values, candidates, IntFormat(num_bits, unsigned, narrow_range=True))
    return fake.sub(values).square_()


def _set_amax(quantizer: Any, amax: Tensor) -> None:
    present = quantizer.amax
    if present is not None and present.shape != amax.shape:
        if present.numel() == amax.numel() == 1:
            amax = amax.reshape(present.shape)
        else:
            del quantizer._amax
    quantizer.amax = amax.cpu().numpy()
    if getattr(quantizer, "_learn_amax", False):
        quantizer.init_learn_amax()
