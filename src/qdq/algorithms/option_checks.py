"""Checks of the options of algorithms: each error names the option and says what it may be."""

from __future__ import annotations

import math


def check_integer(name: str, value: object, least: int) -> None:
    """Refuses what is no integer, or a smaller one.

    Raises:
        ValueError: it names the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")


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
    good = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if good and isinstance(value, (int, float)):
        good = (least is None or value >= least) and (above is None or value > above)
        good = good and (below is None or value < below)
    if not good:
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
