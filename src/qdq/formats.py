"""What a code can be: integers of n bits, the 8-bit and 4-bit floating-point formats, and block scales, as data."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

MAX_INTEGER_BITS = 32


@dataclass(frozen=True)
class IntFormat:
    """Integer codes of ``num_bits`` bits.

    ``bound`` is the code that amax maps to, ``2**(num_bits - 1 + unsigned) - 1``; codes lie in ``[lo, hi]``.
    Where the formula gives no positive bound (0 bits, or 1 bit signed) the format is *degenerate*:
    bound, lo and hi are 0 and every code is 0.

    Raises:
        TypeError: ``num_bits`` is not an integer.
        ValueError: ``num_bits`` is negative or above 32.
    """

    num_bits: int = 8
    unsigned: bool = False
    narrow_range: bool = False
    # Bits that hold the magnitude: all but the sign bit.
    magnitude_bits: int = field(init=False, repr=False, compare=False)
    # True where no code but 0 exists.
    degenerate: bool = field(init=False, repr=False, compare=False)
    # The largest code, which amax maps to; also as `hi`.
    bound: int = field(init=False, repr=False, compare=False)
    lo: int = field(init=False, repr=False, compare=False)
    hi: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            bits = operator.index(self.num_bits)
        except TypeError:
            raise TypeError(f"num_bits must be an integer, got {self.num_bits!r}") from None
        if not 0 <= bits <= MAX_INTEGER_BITS:
            raise ValueError(f"num_bits must be between 0 and {MAX_INTEGER_BITS}, got {bits}")
        object.__setattr__(self, "num_bits", bits)
        object.__setattr__(self, "unsigned", bool(self.unsigned))
        object.__setattr__(self, "narrow_range", bool(self.narrow_range))
        magnitude_bits = bits - 1 + self.unsigned
        degenerate = magnitude_bits <= 0
        bound = 0 if degenerate else 2**magnitude_bits - 1
        # Kept, as computing them would take longer than quantizing a small tensor.
        object.__setattr__(self, "magnitude_bits", magnitude_bits)
        object.__setattr__(self, "degenerate", degenerate)
        object.__setattr__(self, "bound", bound)
        object.__setattr__(self, "hi", bound)
        object.__setattr__(self, "lo", 0 if self.unsigned or degenerate else -bound - (not self.narrow_range))


@dataclass(frozen=True)
class FloatFormat:
    """A small floating-point format.

    ``max_value`` is its largest finite value, ``min_exponent`` the exponent of its smallest normal number,
    ``mantissa_bits`` the stored bits of the significand.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    max_value: float
    min_exponent: int

    @property
    def num_bits(self) -> int:
        """Width of a code, the sign bit included."""
        return 1 + self.exponent_bits + self.mantissa_bits


@dataclass(frozen=True)
class ScaleFormat:
    """An exponent-only format of block scales: the powers of two from ``2**min_exponent`` to ``2**max_exponent``.

    It has no sign, no zero and no infinity; one code is NaN.
    """

    name: str
    exponent_bits: int
    min_exponent: int
    max_exponent: int

    @property
    def num_bits(self) -> int:
        """Width of a code."""
        return self.exponent_bits

    @property
    def min_value(self) -> float:
        """The smallest scale."""
        return 2.0**self.min_exponent

    @property
    def max_value(self) -> float:
        """The largest scale."""
        return 2.0**self.max_exponent


# OCP 8-bit Floating Point Specification (OFP8), revision 1.0, and OCP Microscaling Formats (MX), version 1.0.
E4M3 = FloatFormat("E4M3", exponent_bits=4, mantissa_bits=3, max_value=448.0, min_exponent=-6)
E5M2 = FloatFormat("E5M2", exponent_bits=5, mantissa_bits=2, max_value=57344.0, min_exponent=-14)
E2M1 = FloatFormat("E2M1", exponent_bits=2, mantissa_bits=1, max_value=6.0, min_exponent=0)
# OCP Microscaling Formats (MX), version 1.0: code c is 2**(c - 127), and 255 is NaN.
E8M0 = ScaleFormat("E8M0", exponent_bits=8, min_exponent=-127, max_exponent=127)

_FLOAT_FORMATS = {(f.exponent_bits, f.mantissa_bits): f for f in (E4M3, E5M2, E2M1)}


def float_format(exponent_bits: int, mantissa_bits: int) -> FloatFormat:
    """The floating-point format with these bits.

    Raises:
        ValueError: there is none.
    """
    try:
        return _FLOAT_FORMATS[exponent_bits, mantissa_bits]
    except KeyError:
        known = ", ".join(f"{f.name} {bits}" for bits, f in _FLOAT_FORMATS.items())
        raise ValueError(f"no format has {exponent_bits} exponent and {mantissa_bits} mantissa bits: {known}") from None


__all__ = ["E2M1", "E4M3", "E5M2", "E8M0", "FloatFormat", "IntFormat", "ScaleFormat", "float_format"]
