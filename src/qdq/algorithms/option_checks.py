"""Checks of the options of algorithms: each error names the option and says what it may be."""

from __future__ import annotations

import contextlib
import math

# A seed of PyTorch, and the size of a tensor, is an integer of 64 bits.
_MOST = 2**63 - 1


def check_integer(name: str, value: object, least: int) -> None:
    """Refuses what is no integer, a smaller one, or one that is none of 64 bits.

    Raises:
        ValueError: it names the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
    if value > _MOST:
        raise ValueError(f"{name} must be an integer of at most {_MOST}, not {value!r}")


def check_real(
    name: str, value: object, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> None:
    """Refuses what is no finite number, is less than `least`, or does not lie above `above` or below `below`.

    Raises:
        ValueError: it names the option.
    """
    rules = [
        f"{word} {limit:g}"
        for word, limit in (("at least", least), ("above", above), ("below", below))
        if limit is not None
    ]
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond all floats is no finite number
            number = float(value)
    good = math.isfinite(number) and (least is None or number >= least)
    if not good or (above is not None and number <= above) or (below is not None and number >= below):
        raise ValueError(f"{name} must be a number {' and '.join(rules)}, not {value!r}")


def check_patterns(name: str, value: object) -> None:
    """Refuses what is neither None nor a list of patterns.

    Raises:
        ValueError: it names the option.
    """
    if value is None:
        return
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(p, str) and p for p in value):
        raise ValueError(f"{name} must be a list of patterns, or nothing for all, not {value!r}")
