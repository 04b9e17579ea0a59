"""QuantDescriptor: how one tensor is quantized, as a read-only value; and the predefined ones."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)

CALIB_METHODS = ("max", "histogram")
_FLOAT_FORMATS = ((4, 3),)
_DEFAULTS: dict[str, Any] = {
    "fake_quant": True,
    "axis": None,
    "amax": None,
    "learn_amax": False,
    "scale_amax": None,
    "calib_method": "max",
    "unsigned": False,
    "narrow_range": False,
    "block_size": None,
}


class QuantDescriptor:
    """How one tensor is quantized. A value: read-only, compared by its fields, hashable.

    Args:
        num_bits: width of the codes, 0 or more (0 makes every code 0 and is for debugging only); or
            ``(4, 3)``, exponent and mantissa bits, for the floating-point format E4M3.
        name: any text that identifies the tensor, or None.
        fake_quant: quantize and dequantize; False keeps the codes.
        axis: the axis or axes that *keep* their own amax, in ``[-rank, rank)``; None for one amax per tensor.
        amax: the absolute maximum, in the unit of the tensor: a float, list or ndarray, kept as float32. None leaves
            it to calibration or, without one, to every input.
        learn_amax: the range is a parameter of the model. Per tensor only.
        scale_amax: a factor on amax.
        calib_method: "max" or "histogram".
        unsigned: codes from 0.
        narrow_range: leave out the smallest signed code, so that codes are symmetric.
        block_size: of the weights of linears: every so many input channels of an output channel have an amax of their
            own. With ``axis=0``. None for one amax per channel.

    Raises:
        TypeError: ``num_bits``, ``name``, ``axis``, ``amax`` or ``block_size`` of another type; ``learn_amax`` with
            ``axis``; an unknown keyword.
        ValueError: negative ``num_bits``; ``block_size`` below 1; unknown ``calib_method``; an ``amax`` list that is no
            array of numbers.
    """

    __slots__ = (
        "_amax",
        "_axis",
        "_block_size",
        "_calib_method",
        "_fake_quant",
        "_learn_amax",
        "_name",
        "_narrow_range",
        "_num_bits",
        "_scale_amax",
        "_unsigned",
    )

    def __init__(
        self,
        num_bits: int | tuple[int, int] = 8,
        name: str | None = None,
        *,
        fake_quant: bool = True,
        axis: int | tuple[int, ...] | list[int] | None = None,
        amax: float | list[Any] | np.ndarray | None = None,
        learn_amax: bool = False,
        scale_amax: float | None = None,
        calib_method: str = "max",
        unsigned: bool = False,
        narrow_range: bool = False,
        block_size: int | None = None,
        **unused: Any,
    ) -> None:
        if unused:
            raise TypeError(f"Unused keys: {', '.join(sorted(unused))}; known are {', '.join(_DEFAULTS)}")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a string or None, got {type(name).__name__}")
        if calib_method not in CALIB_METHODS:
            raise ValueError(f"calib_method must be one of {', '.join(CALIB_METHODS)}, got {calib_method!r}")
        self._num_bits = _checked_num_bits(num_bits)
        self._name = name
        self._fake_quant = fake_quant
        self._axis = _checked_axis(axis)
        if learn_amax and axis is not None:
            raise TypeError(f"axis is ignored and must be None when learn_amax is true, got axis={axis}")
        self._amax = _checked_amax(amax)
        self._learn_amax = learn_amax
        self._scale_amax = scale_amax
        self._calib_method = calib_method
        self._unsigned = unsigned
        self._narrow_range = narrow_range
        self._block_size = _checked_block_size(block_size)

    @property
    def num_bits(self) -> int | tuple[int, int]:
        """Width of the codes, or (exponent bits, mantissa bits)."""
        return self._num_bits

    @property
    def name(self) -> str | None:
        """Any text that identifies the tensor."""
        return self._name

    @property
    def fake_quant(self) -> bool:
        """Quantize and dequantize."""
        return self._fake_quant

    @property
    def axis(self) -> int | tuple[int, ...] | None:
        """The axes that keep their own amax, as given."""
        return self._axis

    @property
    def amax(self) -> np.ndarray | None:
        """The absolute maximum, float32, read-only."""
        return self._amax

    @property
    def learn_amax(self) -> bool:
        """The range is a parameter."""
        return self._learn_amax

    @property
    def scale_amax(self) -> float | None:
        """A factor on amax."""
        return self._scale_amax

    @property
    def calib_method(self) -> str:
        """Which calibrator a quantizer gets."""
        return self._calib_method

    @property
    def unsigned(self) -> bool:
        """Codes from 0."""
        return self._unsigned

    @property
    def narrow_range(self) -> bool:
        """Without the smallest signed code."""
        return self._narrow_range

    @property
    def block_size(self) -> int | None:
        """So many input channels of a weight share a step size; None for all of them."""
        return self._block_size

    def dict(self) -> dict[str, Any]:
        """``num_bits``, ``name`` and every field that differs from its default, as plain data (amax as a list)."""
        fields: dict[str, Any] = {"num_bits": self._num_bits, "name": self._name}
        for key, default in _DEFAULTS.items():
            value = getattr(self, key)
            if key == "amax" and value is not None:
                value = value.tolist()
            if value != default:
                fields[key] = value
        return fields

    def to_yaml(self) -> str:
        """:meth:`dict` as YAML; tuples become lists."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in self.dict().items()}
        import yaml  # when used: it costs a sixth of qdq's import

        return yaml.safe_dump(plain, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> QuantDescriptor:
        """The descriptor that :meth:`to_yaml` wrote.

        Raises:
            TypeError: ``text`` holds no mapping, or an unknown key.
        """
        import yaml

        fields = yaml.safe_load(text)
        if not isinstance(fields, dict):
            raise TypeError(f"a descriptor in YAML must be a mapping, got {type(fields).__name__}")
        for key in ("num_bits", "axis"):
            if isinstance(fields.get(key), list):
                fields[key] = tuple(fields[key])
        return cls(**fields)

    def _key(self) -> tuple[Any, ...]:
        amax: tuple[Any, ...] | None = None
        if self._amax is not None:
            # NaN is not equal to itself, but two descriptors that hold it in the same place are.
            amax = (self._amax.shape, *("nan" if math.isnan(v) else v for v in self._amax.ravel().tolist()))
        others = tuple(getattr(self, key) for key in _DEFAULTS if key != "amax")
        return (self._num_bits, self._name, amax, *others)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantDescriptor):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __str__(self) -> str:
        return f"QuantDescriptor({', '.join(f'{key}={value!r}' for key, value in self.dict().items())})"

    __repr__ = __str__


def _checked_num_bits(num_bits: Any) -> int | tuple[int, int]:
    if isinstance(num_bits, tuple) and num_bits in _FLOAT_FORMATS:
        return num_bits  # pyright: ignore[reportReturnType]
    if not isinstance(num_bits, int):
        raise TypeError(f"num_bits must be an integer, or (4, 3) for E4M3, got {num_bits!r}")
    if num_bits < 0:
        raise ValueError(f"num_bits must not be negative, got {num_bits}")
    if num_bits == 0:
        _log.error("num_bits=0: every code will be 0. Use it for debugging only.")
    return int(num_bits)


def _checked_axis(axis: Any) -> int | tuple[int, ...] | None:
    if isinstance(axis, (tuple, list)):
        if all(isinstance(a, int) for a in axis):
            return tuple(axis)
    elif axis is None or isinstance(axis, int):
        return axis
    raise TypeError(f"axis must be None, an integer or a tuple of integers, got {axis!r}")


def _checked_block_size(block_size: Any) -> int | None:
    if block_size is None:
        return None
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"block_size must be None or an integer, got {block_size!r}")
    if block_size < 1:
        raise ValueError(f"block_size must be 1 or more, got {block_size}")
    return block_size


def _checked_amax(amax: Any) -> np.ndarray | None:
    if amax is None:
        return None
    if not isinstance(amax, (float, list, np.ndarray)):
        raise TypeError(f"amax must be float, list or ndarray, got {type(amax).__name__}")
    try:
        array = np.array(amax, dtype=np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"amax must hold numbers in a regular array, got {amax!r}") from None
    array.flags.writeable = False
    return array


ScaledQuantDescriptor = QuantDescriptor

QUANT_DESC_8BIT_PER_TENSOR = QuantDescriptor(num_bits=8)
QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR = QuantDescriptor(num_bits=8, unsigned=True)
QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW = QuantDescriptor(num_bits=8, axis=0)
# As published. A transposed convolution holds its output channels on axis 1, so the quantized layers take that axis.
QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)

__all__ = [
    "QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW",
    "QUANT_DESC_8BIT_PER_TENSOR",
    "QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR",
    "QuantDescriptor",
    "ScaledQuantDescriptor",
]
