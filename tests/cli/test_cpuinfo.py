"""What the processor's flags mean for 8-bit products."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from qdq import cpuinfo

from .processors import PROCESSORS, Case

LINUX = "processor\t: 0\nmodel name\t: any\nflags\t\t: fpu avx2 {flags}\n\nprocessor\t: 1\nflags\t\t: other\n"


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    cpuinfo.cpu_flags.cache_clear()
    yield
    cpuinfo.cpu_flags.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, machine: str, system: str) -> None:
    monkeypatch.setattr(cpuinfo.platform, "machine", lambda: machine)
    monkeypatch.setattr(cpuinfo.platform, "system", lambda: system)


def test_parse_flags() -> None:
    assert cpuinfo.parse_flags(LINUX.format(flags="avx_vnni")) == {"fpu", "avx2", "avx_vnni"}
    assert cpuinfo.parse_flags("nothing: here\n") == frozenset()


@pytest.mark.parametrize("case", PROCESSORS, ids=lambda case: case.name)
def test_real_processors(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    pretend(monkeypatch, case.machine, "Linux")
    monkeypatch.setattr(cpuinfo.Path, "read_text", lambda _: case.cpuinfo)
    found = cpuinfo.instruction_sets()
    assert found is not None
    assert {name for name, there in dataclasses.asdict(found).items() if there} == case.sets
    assert cpuinfo.saturates_u8s8() is case.saturates
    assert cpuinfo.processor_name() == (case.name if case.machine == "x86_64" else None)
    assert (cpuinfo.is_x86(), cpuinfo.is_arm()) == (case.machine == "x86_64", case.machine == "aarch64")


@pytest.mark.parametrize(
    ("flags", "vnni"), [("avx512_vnni", True), ("avx_vnni", True), ("amx_int8", True), ("avx512f", False)]
)
def test_linux(monkeypatch: pytest.MonkeyPatch, flags: str, vnni: bool) -> None:
    pretend(monkeypatch, "x86_64", "Linux")
    monkeypatch.setattr(cpuinfo.Path, "read_text", lambda _: LINUX.format(flags=flags))
    assert cpuinfo.has_vnni() is vnni
    assert cpuinfo.saturates_u8s8() is not vnni


def test_linux_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> str:
        raise PermissionError

    pretend(monkeypatch, "x86_64", "Linux")
    monkeypatch.setattr(cpuinfo.Path, "read_text", refuse)
    assert cpuinfo.has_vnni() is None
    assert cpuinfo.saturates_u8s8() is None
    assert cpuinfo.instruction_sets() is None
    assert cpuinfo.processor_name() is None


def test_arm_does_not_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "arm64", "Darwin")
    assert cpuinfo.has_vnni() is None
    assert cpuinfo.saturates_u8s8() is False


@pytest.mark.parametrize(("said", "vnni"), [("AVX2 AVX512VNNI", True), ("AVX1.0 AVX2", False), ("", None)])
def test_mac_with_intel(monkeypatch: pytest.MonkeyPatch, said: str, vnni: bool | None) -> None:
    pretend(monkeypatch, "x86_64", "Darwin")
    monkeypatch.setattr(cpuinfo.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    assert cpuinfo.has_vnni() is vnni


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 1\n", {"neon", "dotprod", "i8mm"}),
        ("hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\n", {"neon", "dotprod"}),
    ],
)
def test_mac_with_arm(monkeypatch: pytest.MonkeyPatch, said: str, found: set[str]) -> None:
    pretend(monkeypatch, "arm64", "Darwin")
    monkeypatch.setattr(cpuinfo.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    sets = cpuinfo.instruction_sets()
    assert sets is not None
    assert {name for name, there in dataclasses.asdict(sets).items() if there} == found


def test_name_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "arm64", "Darwin")
    monkeypatch.setattr(cpuinfo.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="Apple M2 Pro\n"))
    assert cpuinfo.processor_name() == "Apple M2 Pro"


@pytest.mark.parametrize("machine", ["x86_64", "arm64"])
def test_mac_without_sysctl(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise OSError

    pretend(monkeypatch, machine, "Darwin")
    monkeypatch.setattr(cpuinfo.subprocess, "run", refuse)
    assert cpuinfo.has_vnni() is None
    assert cpuinfo.instruction_sets() is None
    assert cpuinfo.processor_name() is None


@pytest.mark.parametrize(("machine", "system"), [("AMD64", "Windows"), ("riscv64", "Linux")])
def test_unknown(monkeypatch: pytest.MonkeyPatch, machine: str, system: str) -> None:
    pretend(monkeypatch, machine, system)
    assert cpuinfo.has_vnni() is None
    assert cpuinfo.saturates_u8s8() is None
    if system == "Windows":
        assert cpuinfo.instruction_sets() is None
