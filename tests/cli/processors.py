"""``/proc/cpuinfo`` of real processors, shortened to the lines and the flags that tell them apart."""

from __future__ import annotations

from typing import NamedTuple

_X86_64_V3 = (
    "fpu vme de pse tsc msr cx8 apic sep cmov clflush mmx fxsr sse sse2 ht syscall nx rdtscp lm pni pclmulqdq ssse3 "
    "fma cx16 sse4_1 sse4_2 movbe popcnt aes xsave avx f16c rdrand abm bmi1 avx2 bmi2 erms"
)
_SKYLAKE_X = f"{_X86_64_V3} avx512f avx512dq rdseed adx clflushopt clwb avx512cd avx512bw avx512vl xsaveopt"
_ICE_LAKE_X = (
    f"{_SKYLAKE_X} avx512ifma sha_ni avx512vbmi avx512_vbmi2 gfni vaes vpclmulqdq avx512_vnni avx512_bitalg "
    "avx512_vpopcntdq"
)
_ZEN_3 = f"{_X86_64_V3} svm sse4a misalignsse 3dnowprefetch rdseed adx clflushopt clwb sha_ni clzero vaes vpclmulqdq"
_NEOVERSE_N1 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"


class Case(NamedTuple):
    """A processor: what its system says, what of `InstructionSets` is true, and what int8 is expected to be.

    `saturates` is about u8 x s8 products; `expected` is the expectation for ONNX Runtime.
    """

    name: str
    machine: str
    flags: str
    sets: frozenset[str]
    saturates: bool
    expected: str

    @property
    def cpuinfo(self) -> str:
        """As Linux writes it: x86 with a model name, ARM without."""
        if self.machine == "x86_64":
            block = (
                f"processor\t: {{}}\nvendor_id\t: any\nmodel name\t: {self.name}\nflags\t\t: {self.flags}\nbugs\t\t:\n"
            )
        else:
            block = f"processor\t: {{}}\nBogoMIPS\t: 243.75\nFeatures\t: {self.flags}\nCPU implementer\t: 0x41\n"
        return "\n".join(block.format(index) for index in range(2))


PROCESSORS = (
    Case(
        "Intel(R) Core(TM) i7-3770 CPU @ 3.40GHz",
        "x86_64",
        "fpu sse sse2 ssse3 sse4_1 sse4_2 popcnt aes xsave avx f16c rdrand",
        frozenset(),
        True,
        "not measured",
    ),
    Case("Intel(R) Core(TM) i7-6700 CPU @ 3.40GHz", "x86_64", _X86_64_V3, frozenset({"avx2"}), True, "depends"),
    Case(
        "Intel(R) Xeon(R) Platinum 8175M CPU @ 2.50GHz",  # Skylake-SP
        "x86_64",
        _SKYLAKE_X,
        frozenset({"avx2", "avx512"}),
        True,
        "not measured",
    ),
    Case(
        "Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz",  # Ice Lake-SP
        "x86_64",
        _ICE_LAKE_X,
        frozenset({"avx2", "avx512", "avx512_vnni"}),
        False,
        "faster",
    ),
    Case(
        "Intel(R) Xeon(R) Platinum 8488C",  # Sapphire Rapids
        "x86_64",
        f"{_ICE_LAKE_X} avx_vnni avx512_bf16 serialize amx_bf16 avx512_fp16 amx_tile amx_int8",
        frozenset({"avx2", "avx512", "avx512_vnni", "avx_vnni", "amx"}),
        False,
        "faster",
    ),
    Case(
        "12th Gen Intel(R) Core(TM) i7-12700",  # Alder Lake
        "x86_64",
        f"{_X86_64_V3} rdseed adx sha_ni avx_vnni umip gfni vaes vpclmulqdq serialize",
        frozenset({"avx2", "avx_vnni"}),
        False,
        "faster",
    ),
    Case("AMD EPYC 7R13 Processor", "x86_64", _ZEN_3, frozenset({"avx2"}), True, "depends"),  # Zen 3
    Case(
        "AMD EPYC 9R14",  # Zen 4
        "x86_64",
        f"{_ZEN_3} avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512_bf16 avx512vbmi avx512_vbmi2 gfni "
        "avx512_vnni avx512_bitalg avx512_vpopcntdq",
        frozenset({"avx2", "avx512", "avx512_vnni"}),
        False,
        "faster",
    ),
    Case("Graviton", "aarch64", "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid", frozenset({"neon"}), False, "ARM"),
    Case("Graviton2", "aarch64", _NEOVERSE_N1, frozenset({"neon", "dotprod"}), False, "ARM"),
    Case(
        "Graviton3",
        "aarch64",
        f"{_NEOVERSE_N1} sha3 sm3 sm4 sha512 sve asimdfhm dit uscat ilrcpc flagm paca pacg dcpodp svei8mm svebf16 i8mm "
        "bf16 dgh rng",
        frozenset({"neon", "dotprod", "i8mm"}),
        False,
        "ARM",
    ),
)
