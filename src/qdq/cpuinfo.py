"""What the processor can do that decides how an 8-bit file behaves on it.

ONNX Runtime multiplies uint8 activations by int8 weights on x86. With VNNI the products are summed in
32 bits. Without it the kernels use ``pmaddubsw``, which adds two products in 16 bits and saturates:
255 * 127 * 2 does not fit. Weights of 7 bits (``reduce_range``) avoid that.
"""

from __future__ import annotations

import functools
import platform
import subprocess
from pathlib import Path

_X86 = frozenset({"x86_64", "amd64", "i386", "i686"})
_ARM = frozenset({"aarch64", "arm64", "armv7l", "armv8l"})
_VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def is_x86() -> bool:
    """True on an Intel or AMD processor."""
    return platform.machine().lower() in _X86


def parse_flags(cpuinfo: str) -> frozenset[str]:
    """The processor flags in the text of Linux's ``/proc/cpuinfo`` (those of its first processor)."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Processor flags in Linux's spelling; empty where the system does not tell."""
    system = platform.system()
    if system == "Linux":
        try:
            return parse_flags(Path("/proc/cpuinfo").read_text())
        except OSError:
            return frozenset()
    if system == "Darwin" and is_x86():
        names = ["machdep.cpu.features", "machdep.cpu.leaf7_features"]
        try:
            said = subprocess.run(["sysctl", "-n", *names], capture_output=True, text=True, timeout=5, check=False)
        except (OSError, subprocess.SubprocessError):
            return frozenset()
        return frozenset(word.lower().replace("avx512vnni", "avx512_vnni") for word in said.stdout.split())
    return frozenset()


def has_vnni() -> bool | None:
    """Whether an x86 processor sums u8 x s8 products in 32 bits (VNNI or AMX).

    None where the question does not apply (not x86) or the system does not tell.
    """
    if not is_x86():
        return None
    flags = cpu_flags()
    if not flags:
        return None
    return bool(flags & _VNNI_FLAGS)


def saturates_u8s8() -> bool | None:
    """Whether u8 x s8 products saturate at 16 bits in this processor's integer kernels; None if unknown.

    True on x86 without VNNI. False with VNNI, and on ARM, whose kernels accumulate in 32 bits.
    """
    if platform.machine().lower() in _ARM:
        return False
    vnni = has_vnni()
    return None if vnni is None else not vnni
