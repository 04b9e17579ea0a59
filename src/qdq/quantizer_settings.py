"""The settings of a quantizer: what its descriptor says, and which stages are on."""

from __future__ import annotations

from torch import nn

from .calib.calibrator import Calibrator
from .calib.histogram import HistogramCalibrator
from .calib.max import MaxCalibrator
from .descriptor import QuantDescriptor
from .formats import E4M3


def _calibrator(desc: QuantDescriptor) -> Calibrator:
    if desc.calib_method == "histogram":
        return HistogramCalibrator(desc.num_bits, desc.axis, desc.unsigned)
    return MaxCalibrator(desc.num_bits, desc.axis, desc.unsigned, block_size=desc.block_size)


def _check_blocks(desc: QuantDescriptor) -> None:
    if desc.block_size is None:
        return
    given = f"block_size={desc.block_size}"
    if desc.axis != 0:
        raise ValueError(f"{given} cuts the rows of a matrix into blocks: set axis=0, not {desc.axis}")
    if isinstance(desc.num_bits, tuple):
        raise ValueError(f"{given} is for integers: with num_bits={desc.num_bits} set block_size=None")
    if desc.calib_method != "max":
        raise ValueError(f"{given} is calibrated by the maximum of each block: set calib_method='max'")


class QuantizerSettings(nn.Module):
    """Base of :class:`qdq.TensorQuantizer`, which documents it."""

    def __init__(self, desc: QuantDescriptor, disabled: bool, if_quant: bool, if_clip: bool, if_calib: bool) -> None:
        super().__init__()
        if isinstance(desc.num_bits, tuple) and not desc.fake_quant:
            raise ValueError(f"num_bits={desc.num_bits} needs fake_quant=True: E4M3 codes are only simulated")
        _check_blocks(desc)
        self._num_bits = desc.num_bits
        self._fake_quant = desc.fake_quant
        self._axis = desc.axis
        self._block_size = desc.block_size
        self._scale_amax = desc.scale_amax
        self._learn_amax = desc.learn_amax
        self._unsigned = desc.unsigned
        self._narrow_range = desc.narrow_range
        self._calibrator: Calibrator | None = _calibrator(desc)
        self._disabled = disabled
        self._if_quant = if_quant
        self._if_clip = False
        self._if_calib = False
        if if_clip:
            self.enable_clip()
        if if_calib:
            self.enable_calib()

    @property
    def num_bits(self) -> int | tuple[int, int]:
        """Width of the codes, or (exponent bits, mantissa bits)."""
        return self._num_bits

    @num_bits.setter
    def num_bits(self, value: int | tuple[int, int]) -> None:
        self._num_bits = value

    @property
    def unsigned(self) -> bool:
        """Codes from 0."""
        return self._unsigned

    @unsigned.setter
    def unsigned(self, value: bool) -> None:
        self._unsigned = value

    @property
    def narrow_range(self) -> bool:
        """Without the smallest signed code."""
        return self._narrow_range

    @narrow_range.setter
    def narrow_range(self, value: bool) -> None:
        self._narrow_range = value

    @property
    def axis(self) -> int | tuple[int, ...] | None:
        """The axes that keep their own amax."""
        return self._axis

    @property
    def block_size(self) -> int | None:
        """So many elements of a row have an amax of their own; None for one of all of them."""
        return self._block_size

    @property
    def fake_quant(self) -> bool:
        """Quantize and dequantize; else give the codes and keep the scale."""
        return self._fake_quant

    @property
    def maxbound(self) -> float:
        """The largest code: 127 or 255 for 8 bits, 448.0 for E4M3."""
        if isinstance(self._num_bits, tuple):
            return E4M3.max_value
        return max(0, int(2 ** (self._num_bits - 1 + self._unsigned)) - 1)

    @property
    def disabled(self) -> bool:
        """Tensors pass as they are."""
        return self._disabled

    def enable(self) -> None:
        """Run the stages that are on."""
        self._disabled = False

    def disable(self) -> None:
        """Let tensors through as they are."""
        self._disabled = True

    def enable_quant(self) -> None:
        """Quantize."""
        self._if_quant = True

    def disable_quant(self) -> None:
        """Do not quantize."""
        self._if_quant = False

    def enable_calib(self) -> None:
        """Collect calibration data.

        Raises:
            ValueError: there is no calibrator.
        """
        if self._calibrator is None:
            raise ValueError("calibration cannot be enabled: the quantizer has no calibrator")
        self._if_calib = True

    def disable_calib(self) -> None:
        """Do not collect calibration data."""
        self._if_calib = False

    def enable_clip(self) -> None:
        """Clip to the learned range.

        Raises:
            ValueError: the descriptor does not have ``learn_amax``.
        """
        if not self._learn_amax:
            raise ValueError("clipping cannot be enabled: the descriptor must have learn_amax=True")
        self._if_clip = True

    def disable_clip(self) -> None:
        """Do not clip."""
        self._if_clip = False
