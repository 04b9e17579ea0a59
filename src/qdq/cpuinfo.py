"""What the processor can do that decides how an 8-bit file behaves on it.

ONNX Runtime multiplies uint8 activations by int8 weights on x86. With VNNI the products are summed in
32 bits. Without it the kernels use ``pmaddubsw``, which adds two products in 16 bits and saturates:
255 * 127 * 2 does not fit. Weights of 7 bits (``reduce_range``) avoid that.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
import subprocess
from pathlib import Path

_X86 = frozenset({"x86_64", "amd64", "i386", "i686"})
_ARM = frozenset({"aarch64", "arm64", "armv7l", "armv8l"})
_VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
# Names of macOS -> Linux's.
_MAC_X86_NAMES = {"avx512vnni": "avx512_vnni"}
_MAC_ARM_NAMES = {"FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm"}


@dataclasses.dataclass(frozen=True)
class InstructionSets:
    """Vector instructions that matter to 8-bit products; False also for those of another architecture.

    Attributes:
        avx2, avx512: x86 vectors of 256 and 512 bits (AVX2, AVX-512F).
        avx512_vnni, avx_vnni: u8 x s8 products summed in 32 bits, in 512 and in 256 bits.
        amx: matrix tiles of int8 (AMX-INT8).
        neon: ARM vectors of 128 bits (Advanced SIMD).
        dotprod: ARM's products of 8-bit codes summed in 32 bits (SDOT, UDOT).
        i8mm: ARM's 8-bit matrix products (SMMLA, USMMLA).
    """

    avx2: bool
    avx512: bool
    avx512_vnni: bool
    avx_vnni: bool
    amx: bool
    neon: bool
    dotprod: bool
    i8mm: bool

    @classmethod
    def from_flags(cls, flags: frozenset[str]) -> InstructionSets:
        """Read from processor flags in Linux's spelling."""
        return cls(
            avx2="avx2" in flags,
            avx512="avx512f" in flags,
            avx512_vnni="avx512_vnni" in flags,
            avx_vnni="avx_vnni" in flags,
            amx="amx_int8" in flags,
            neon=not flags.isdisjoint(("asimd", "neon")),
            dotprod="asimddp" in flags,
            i8mm="i8mm" in flags,
        )


def is_x86() -> bool:
    """True on an Intel or AMD processor."""
    return platform.machine().lower() in _X86


def is_arm() -> bool:
    """True on an ARM processor of 32 or 64 bits."""
    return platform.machine().lower() in _ARM


def parse_flags(cpuinfo: str) -> frozenset[str]:
    """The processor flags in the text of Linux's ``/proc/cpuinfo`` (those of its first processor)."""
    return frozenset(_field(cpuinfo, "flags", "Features").split())


def _field(cpuinfo: str, *keys: str) -> str:
    """The first value under one of the keys; empty if there is none."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _linux_cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _sysctl(*arguments: str) -> str:
    """What macOS's sysctl says, names that it does not know left out."""
    try:
        said = subprocess.run(["sysctl", *arguments], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.stdout


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Processor flags in Linux's spelling; empty where the system does not tell."""
    system = platform.system()
    if system == "Linux":
        return parse_flags(_linux_cpuinfo())
    if system == "Darwin" and is_x86():
        words = _sysctl("-n", "machdep.cpu.features", "machdep.cpu.leaf7_features").lower().split()
        return frozenset(_MAC_X86_NAMES.get(word, word) for word in words)
    if system == "Darwin" and is_arm():
        # Lines such as `hw.optional.arm.FEAT_DotProd: 1`. Every 64-bit ARM processor of a Mac has Advanced SIMD.
        pairs = [line.rpartition(".")[2].partition(":") for line in _sysctl("hw.optional.arm").splitlines()]
        present = {_MAC_ARM_NAMES.get(name) for name, _, value in pairs if value.strip() == "1"}
        return frozenset({"asimd", *(name for name in present if name)}) if pairs else frozenset()
    return frozenset()


def instruction_sets() -> InstructionSets | None:
    """The instruction sets of this processor; None where the system does not tell."""
    flags = cpu_flags()
    return InstructionSets.from_flags(flags) if flags else None


def processor_name() -> str | None:
    """The processor's name as its maker writes it; None where the system does not tell (Linux on ARM)."""
    system = platform.system()
    if system == "Linux":
        name = _field(_linux_cpuinfo(), "model name")
    elif system == "Darwin":
        name = _sysctl("-n", "machdep.cpu.brand_string")
    else:
        name = platform.processor()
    return " ".join(name.split()) or None


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
    if is_arm():
        return False
    vnni = has_vnni()
    return None if vnni is None else not vnni
