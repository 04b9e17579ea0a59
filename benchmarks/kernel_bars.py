"""The bars that the kernels are held to, as data, and how one measured case is judged by them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MILLION = 1_000_000
ANY_CACHE = ("warm", "cold")


@dataclass(frozen=True)
class Bar:
    """One requirement: a limit on our time over another contender's, or on our microseconds where `against` is None.

    `operations` are patterns of operation names; `elements` the sizes that count, ends included.
    """

    text: str
    operations: tuple[str, ...]
    against: str | None
    most: float
    dtypes: tuple[str, ...] = ("float32",)
    elements: tuple[int, int] = (MILLION, 1 << 62)
    sizes: tuple[str, ...] | None = None
    threads: tuple[int, ...] = (2,)
    caches: tuple[str, ...] = ANY_CACHE
    device: str = "cpu"


@dataclass(frozen=True)
class Key:
    """What was measured: one operation on one tensor in one setting."""

    operation: str
    dtype: str
    size: str
    elements: int
    threads: int
    cache: str
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.operation}, {self.dtype}, {self.size}, {self.threads} threads, {self.cache}"


@dataclass(frozen=True)
class Verdict:
    """What one bar says of one case. `value` is our time over the other's, or microseconds."""

    bar: Bar
    key: Key
    value: float

    @property
    def passed(self) -> bool:
        return self.value <= self.bar.most


_FORWARD = ("forward per tensor", "forward axis *")
_GRADIENT = ("gradient per tensor", "gradient axis *")
_HALF = ("bfloat16", "float16")
_SMALL = (4096, 65536)
_GPU_FLOOR = 1 / 0.9
_GPU = (16 << 20, 1 << 62)  # 64 MiB of float32

BARS = (
    Bar("forward <= 1.3 x clone", _FORWARD, "floor", 1.3),
    Bar("forward >= 8 times faster than torch.fake_quantize_*", _FORWARD, "torch", 1 / 8),
    Bar("gradient <= 1.3 x torch.add", _GRADIENT, "floor", 1.3),
    Bar("absmax, minmax <= 1.2 x torch.aminmax", ("absmax per tensor", "minmax per tensor"), "floor", 1.2),
    Bar("absmax, minmax per channel <= 2 x torch.aminmax", ("absmax axis *", "minmax axis *"), "floor", 2.0),
    Bar("histogram >= 8 times faster than torch.histc", ("histogram *",), "torch", 1 / 8),
    Bar(
        "recorded forward >= 2 times the reference",
        ("recorded *",),
        "reference",
        0.5,
        elements=_SMALL,
        caches=("warm",),
    ),
    Bar(
        "recorded forward of 64x64 <= the formula without gradient",
        ("recorded per tensor",),
        "formula",
        1.0,
        elements=_SMALL,
        sizes=("64x64",),
        threads=(1, 2),
        caches=("warm",),
    ),
    Bar(
        "recorded forward of 64x64 <= 15 us",
        ("recorded per tensor",),
        None,
        15.0,
        elements=_SMALL,
        sizes=("64x64",),
        threads=(1, 2),
        caches=("warm",),
    ),
    Bar("16-bit forward <= 2 x clone of the same bytes", _FORWARD, "floor", 2.0, dtypes=_HALF),
    Bar("GPU forward >= 0.9 of a copy", _FORWARD, "floor", _GPU_FLOOR, elements=_GPU, threads=(1, 2), device="cuda"),
    Bar("GPU gradient >= 0.9 of a copy", _GRADIENT, "floor", _GPU_FLOOR, elements=_GPU, threads=(1, 2), device="cuda"),
)


def applies(bar: Bar, key: Key) -> bool:
    """Whether the bar speaks of this case."""
    return (
        any(fnmatch.fnmatchcase(key.operation, pattern) for pattern in bar.operations)
        and key.dtype in bar.dtypes
        and bar.elements[0] <= key.elements <= bar.elements[1]
        and (bar.sizes is None or key.size in bar.sizes)
        and key.threads in bar.threads
        and key.cache in bar.caches
        and key.device == bar.device
    )


def judge(key: Key, ratio_to: Callable[[str], float | None], microseconds: float) -> list[Verdict]:
    """The verdicts on one case; `ratio_to(role)` is our time over that contender's, None where it did not run."""
    verdicts = []
    for bar in BARS:
        if applies(bar, key):
            value = microseconds if bar.against is None else ratio_to(bar.against)
            if value is not None:
                verdicts.append(Verdict(bar, key, value))
    return verdicts


def summary(verdicts: Iterable[Verdict]) -> list[str]:
    """One line PASS or FAIL per bar, with its worst case; bars that nothing was measured for are left out."""
    lines = []
    found = list(verdicts)
    for bar in BARS:
        mine = [verdict for verdict in found if verdict.bar is bar]
        if not mine:
            continue
        worst = max(mine, key=lambda verdict: verdict.value)
        passed = sum(verdict.passed for verdict in mine)
        mark = "PASS" if passed == len(mine) else "FAIL"
        lines.append(f"{mark}  {bar.text}: {passed} of {len(mine)}, worst {shown(worst)} ({worst.key})")
    return lines


def shown(verdict: Verdict) -> str:
    """The value as the bar puts it: microseconds, "1.25 x", or, where faster is asked, "9.1 times faster"."""
    if verdict.bar.against is None:
        return f"{verdict.value:.1f} us"
    if verdict.bar.most < 1:
        return f"{1 / verdict.value:.1f} times faster"
    return f"{verdict.value:.2f} x"
