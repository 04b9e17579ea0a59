"""``qdq doctor``: prints what this machine and this environment can do, and what that means for an 8-bit file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import qdq
from qdq._cli.errors import CommandError, UsageError
from qdq.analysis.environment import Environment, Package
from qdq.analysis.int8_speed import Int8Speed
from qdq.cpuinfo import InstructionSets

BUILD = (
    "To get the compiled kernels, install a C++ compiler, GCC or Clang (Debian, Ubuntu: apt install g++; macOS: "
    "xcode-select --install), and run in a checkout of qdq: pip install --force-reinstall --no-deps ."
)
# Grows when a key of the JSON report is renamed, removed or changes its meaning.
_SCHEMA = 1
_COLOURS = {"ok": "green", "note": "yellow", "missing": "red"}
# Distribution -> the extra that brings it. `qdq quantize` cannot finish without those of "onnx".
_EXTRAS = {
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "pillow": "images",
    "scikit-learn": "demo",
}
_INSTRUCTION_SETS = {
    "x86": {"avx2": "AVX2", "avx512": "AVX-512", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI", "amx": "AMX"},
    "arm": {"neon": "NEON", "dotprod": "dot product", "i8mm": "i8mm"},
}


class Line(NamedTuple):
    """One line of the report. "missing" is what `qdq quantize` cannot do without."""

    level: Literal["ok", "note", "missing"]
    subject: str
    text: str


def show(console: Console, environment: Environment, speeds: tuple[Int8Speed, ...]) -> None:
    """Prints the report for a reader."""
    for line in lines(environment):
        _print(console, line.subject, line.text, line.level)
    console.print()
    for speed in speeds:
        _print(console, speed.target, f"{speed.text} {speed.warning}" if speed.warning else speed.text)


def as_json(environment: Environment, speeds: tuple[Int8Speed, ...]) -> str:
    """The report for a program, in ASCII; docs/command.md lists the keys."""
    report = {"schema": _SCHEMA, "qdq": qdq.__version__, **dataclasses.asdict(environment)}
    report["int8"] = [dataclasses.asdict(speed) for speed in speeds]
    return json.dumps(report, indent=2)


def check_engine(environment: Environment) -> None:
    """Raises where QDQ_ENGINE names an engine that cannot run.

    Raises:
        UsageError: there is no engine of that name.
        CommandError: it cannot run here.
    """
    failure = environment.engine_failure
    if failure is None:
        return
    if failure.kind == "unknown":
        raise UsageError(failure.message)
    build = failure.engine == "cpu" and "QDQ_LIBRARY" not in environment.variables
    raise CommandError(f"{_sentence(failure.message)} {BUILD}" if build else failure.message)


def lines(environment: Environment) -> Iterator[Line]:
    """The report, line by line."""
    python, torch = environment.python, environment.torch
    yield Line("ok", "qdq", qdq.__version__)
    yield Line("ok", "python", f"{python.version} ({python.implementation}), {python.system}")
    build = "CPU build" if torch.build == "cpu" else f"{torch.build.upper()} build ({torch.toolkit})"
    yield Line("ok", "torch", f"{torch.version}, {build}")
    yield _threads(environment)
    yield from _processor(environment)
    yield from _engine(environment)
    yield from _gpus(environment)
    for name, package in environment.packages.items():
        yield _package(name, package)


def _threads(environment: Environment) -> Line:
    processor = environment.processor
    limit = environment.variables.get("OMP_NUM_THREADS")
    by = f" (OMP_NUM_THREADS={limit})" if limit else ""
    cores = f"{processor.available or '?'} of {processor.cores or '?'} logical processors available"
    return Line("ok", "threads", f"{environment.torch.threads} for an operation of PyTorch{by}, {cores}")


def _processor(environment: Environment) -> Iterator[Line]:
    processor = environment.processor
    name = f"{processor.name} ({processor.machine})" if processor.name else processor.machine
    sets = processor.instruction_sets
    if sets is None:
        yield Line("note", "processor", f"{name}; this system does not tell its instruction sets")
    else:
        yield Line("ok", "processor", f"{name}: {_instruction_sets(sets, processor.architecture)}")
    if processor.saturates is None:
        text = (
            "unknown whether products of uint8 and int8 saturate at 16 bits here; "
            'reduce_range "auto" keeps weights at 8 bits'
        )
        yield Line("note", "saturation", text)
    elif processor.saturates:
        text = (
            "no VNNI: pairs of products of uint8 and int8 saturate at 16 bits in ONNX Runtime and OpenVINO; what qdq "
            "does about it stands below"
        )
        yield Line("note", "saturation", text)
    else:
        why = "VNNI" if processor.architecture == "x86" else "32-bit accumulation"
        yield Line("ok", "saturation", f"none ({why}): 8-bit products are exact")


def _instruction_sets(sets: InstructionSets, architecture: str) -> str:
    names = _INSTRUCTION_SETS.get(architecture, {})
    there = [name for field, name in names.items() if getattr(sets, field)]
    absent = [name for field, name in names.items() if not getattr(sets, field)]
    return ", ".join(there or ["no vector instructions that matter here"]) + (
        f"; no {', '.join(absent)}" * bool(absent)
    )


def _engine(environment: Environment) -> Iterator[Line]:
    status = environment.engine
    if status is None:
        if environment.engine_failure is not None:
            yield Line("missing", "kernels", environment.engine_failure.message)
        return
    native = status.cpu == "native"
    if native:
        threading = "OpenMP" if status.openmp else "one thread, no OpenMP"
        details = ", ".join(part for part in (status.level, threading, status.library) if part)
        text = f"compiled kernels for CPU tensors: {status.cpu_reason} ({details})"
    else:
        text = f"reference engine (plain PyTorch) for CPU tensors: {status.cpu_reason}"
    yield Line("ok" if native else "note", "kernels", text)
    engines = {"triton": "Triton", "reference": "reference engine (plain PyTorch)", "none": "no engine"}
    text = f"{engines.get(status.cuda, status.cuda)} for CUDA tensors: {status.cuda_reason}"
    yield Line("note" if status.cuda == "reference" else "ok", "kernels", text)
    forced = status.requested
    if forced:
        yield Line("note", "kernels", f"QDQ_ENGINE={forced} forces this; unset it and qdq chooses by itself.")
    library = environment.variables.get("QDQ_LIBRARY")
    if library is not None:
        yield Line(
            "note", "kernels", f"QDQ_LIBRARY={library} names the compiled kernels; unset it and qdq looks itself."
        )
    elif not native and forced != "reference":
        yield Line("note", "kernels", BUILD)


def _gpus(environment: Environment) -> Iterator[Line]:
    for gpu in environment.gpus:
        memory = f"{gpu.memory_bytes / 2**30:.1f} GiB"
        capability = f", compute capability {gpu.compute_capability}" if gpu.compute_capability else ""
        yield Line("ok", "gpu", f"{gpu.name}, {memory}{capability}")
    if not environment.gpus:
        yield Line(
            "ok", "gpu", f"none in use: {_sentence(environment.gpu_note or 'PyTorch sees none')} qdq needs none."
        )
    elif environment.gpu_note:
        yield Line("note", "gpu", environment.gpu_note)


def _package(name: str, package: Package) -> Line:
    extra = _EXTRAS.get(name)
    needed = extra == "onnx"
    if not package.installed:
        how = f": pip install 'qdq[{extra}]'" if extra else "; qdq writes files for it without it"
        return Line("missing" if needed else "note", name, f"not installed{how}")
    text = package.version or "installed, version unknown"
    if package.error:
        return Line("missing" if needed else "note", name, f"{text}, but it cannot be imported: {package.error}")
    return Line("ok", name, text + (f" ({', '.join(package.providers)})" if package.providers else ""))


def _sentence(text: str) -> str:
    """The text as a sentence that another can follow."""
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _print(console: Console, subject: str, text: str, level: str = "") -> None:
    """One line; on a terminal wrapped beside its subject, else whole, so that programs find what they look for."""
    # Names of GPUs and paths may hold what an ASCII terminal cannot show.
    text = escape(text.encode(console.encoding, "replace").decode(console.encoding))
    colour = _COLOURS.get(level, "bold")
    head = f"[{colour}]{level or 'int8':8}[/{colour}]"
    if not console.is_terminal:
        console.print(f"{head} {subject:13} {text}", soft_wrap=True)
        return
    table = Table.grid(padding=(0, 1))
    table.add_column(min_width=8, no_wrap=True)
    table.add_column(min_width=13, no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(head, subject, text)
    console.print(table)
