"""`AffineQuantizer`: the quantizer of one activation tensor of a captured graph, with one step size and zero point."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .calib.collectors import HistogramCollector
from .calib.ranges import affine_range
from .constant_quantizers import LEAST_AMAX
from .errors import CalibrationError
from .functional import fake_quantize_affine
from .kernels.reference import affine_parameters
from .onnx_nodes import quantize_dequantize


class AffineQuantizer(nn.Module):
    """Fake quantization of one tensor: codes = clamp(round_half_to_even(x / step_size) + zero_point, lo, hi).

    As ONNX defines QuantizeLinear followed by DequantizeLinear. Buffers: `step_size` (float32, 0-d, NaN until
    calibrated) and `zero_point` (int32, 0-d). Gradients pass where x lies in the representable range (STE).

    Args:
        name: path in the model, for messages and for the exported file.
        lo, hi: least and largest code.
        symmetric: zero point 0 and a range [-amax, amax].
        method: "max", "percentile", "mse" or "entropy"; "auto" where it is chosen among them.
        percentile: share of values inside the range, in percent, for "percentile".
        usual_method: for "auto", the one to take where none is clearly better.
        origin: path of the `TensorQuantizer` that it stands for, in a graph captured from quantized modules.
    """

    step_size: Tensor
    zero_point: Tensor

    def __init__(
        self,
        name: str,
        lo: int = 0,
        hi: int = 255,
        symmetric: bool = False,
        method: str = "max",
        percentile: float = 99.99,
        origin: str = "",
        usual_method: str = "mse",
    ) -> None:
        super().__init__()
        self.origin = origin
        self.name, self.lo, self.hi, self.symmetric = name, lo, hi, symmetric
        self.method, self.percentile, self.usual_method = method, percentile, usual_method
        self.enabled = True
        self.calibrated = False
        self.fixed = False
        self.register_buffer("step_size", torch.tensor(math.nan, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))

    @property
    def num_bits(self) -> int:
        """The width of the codes."""
        return round(math.log2(self.hi - self.lo + 1))

    @property
    def code_dtype(self) -> torch.dtype:
        """The integer dtype that holds the codes."""
        if self.num_bits > 8:
            return torch.uint16 if self.lo >= 0 else torch.int16
        return torch.uint8 if self.lo >= 0 else torch.int8

    @property
    def limits(self) -> tuple[int, int] | None:
        """Least and largest code, None where they are those of the dtype."""
        info = torch.iinfo(self.code_dtype)
        return None if (self.lo, self.hi) == (info.min, info.max) else (self.lo, self.hi)

    def forward(self, x: Tensor, on_grid: bool = False) -> Tensor:
        """Quantizes and dequantizes x, float32 of any shape.

        Args:
            x: the tensor.
            on_grid: x already holds values of this quantizer (an operation moved them), so that quantizing it again
                would change nothing; only an exported file needs the nodes.

        Raises:
            CalibrationError: no range has been set.
        """
        if not self.enabled:
            return x
        if not self.calibrated:
            raise CalibrationError(
                f"quantizer {self.name!r} has no range: it saw no data in calibration. Calibrate with data that "
                "reach this part of the model, or keep it in float (Recipe.exclude)"
            )
        if torch.onnx.is_in_onnx_export():
            zero_point = self.zero_point.to(self.code_dtype)
            limits = None if on_grid else self.limits
            return quantize_dequantize(x, self.step_size, zero_point, name=self.name, limits=limits)
        if on_grid:
            return x
        return fake_quantize_affine(x, self.step_size, self.zero_point, self.lo, self.hi)

    def find_range(self, histogram: HistogramCollector, through: Callable[[Tensor], Tensor] | None = None) -> None:
        """Sets the range from a histogram, by the quantizer's method. Without data it stays as it is.

        Args:
            histogram: of what is quantized.
            through: an elementwise function that alone reads the quantized tensor. "auto" then is "mse" of its results.
        """
        if not histogram.total:
            return
        if self.method == "auto" and through is not None and not self.keeps_all:
            self.set_range(*self.proposed_range(histogram, "mse", through=through))
            return
        automatic = "max" if self.keeps_all else self.usual_method
        self.set_range(*self.proposed_range(histogram, automatic if self.method == "auto" else self.method))

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest value that a code stands for."""
        step, zero = float(self.step_size), int(self.zero_point)
        return (self.lo - zero) * step, (self.hi - zero) * step

    @property
    def keeps_all(self) -> bool:
        """Whether "auto" clips nothing: codes of 16 bits are so fine that no value need be clipped to gain precision.

        Rounding alone leaves some 85 dB of a normal distribution over 12 standard deviations. And the histogram, whose
        bins are 16 steps wide or more, could not tell what clipping gains.
        """
        return self.num_bits > 8

    def proposed_range(
        self,
        histogram: HistogramCollector,
        method: str,
        percentile: float | None = None,
        through: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[float, float]:
        """The range that a method finds in a histogram; `percentile` None is the quantizer's own."""
        share = self.percentile if percentile is None else percentile
        return affine_range(
            histogram, method, self.num_bits, percentile=share, symmetric=self.symmetric, through=through
        )

    def set_range(self, amin: float, amax: float) -> None:
        """Sets step size and zero point for values from amin to amax; the range is extended to hold zero.

        Raises:
            CalibrationError: a bound is not finite, or amin is above amax.
        """
        if not (math.isfinite(amin) and math.isfinite(amax)) or amin > amax:
            raise CalibrationError(f"quantizer {self.name!r}: range [{amin}, {amax}] is not a finite interval")
        if self.symmetric:
            bound = max(abs(amin), abs(amax), LEAST_AMAX)
            step, zero = torch.tensor(bound / self.hi, dtype=torch.float32), torch.tensor(0)
        else:
            step, zero = affine_parameters(
                torch.tensor(amin, dtype=torch.float64), torch.tensor(amax, dtype=torch.float64), self.lo, self.hi
            )
        self.step_size.copy_(step)
        self.zero_point.copy_(zero)
        self.calibrated = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.calibrated = bool(torch.isfinite(self.step_size))

    def extra_repr(self) -> str:
        """The range and where it came from, in one line."""
        kind = str(self.code_dtype).removeprefix("torch.")
        if not self.calibrated:
            return f"{kind}, not calibrated, method={self.method}"
        least, most = self.range
        return f"{kind}, range=[{least:.4g}, {most:.4g}], zero_point={int(self.zero_point)}"
