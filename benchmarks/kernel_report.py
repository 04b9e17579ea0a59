"""What the benchmarks of the kernels print and write: tables, the description of the machine, JSON files."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_harness import last_level_cache

from qdq.cpuinfo import cpu_flags
from qdq.kernels import engine

_INSTRUCTION_SETS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *(
        "avx512_fp16",
        "avx_vnni",
        "amx_tile",
        "amx_int8",
        "amx_bf16",
        "asimd",
        "asimdhp",
        "asimddp",
        "i8mm",
        "sve",
        "bf16",
    ),
)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, versions, date and the engine that runs; no names or paths of the machine itself."""
    status = dataclasses.asdict(engine.status())
    if status.get("library"):
        status["library"] = Path(status["library"]).name
    flags = cpu_flags()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "cores": os.cpu_count(),
        "last_level_cache_mib": last_level_cache() / (1 << 20),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "load_average_at_start": load,
        "engine": status,
    }


def machine_lines(found: dict[str, Any]) -> str:
    """The same, for people."""
    sets = " ".join(found["instruction_sets"])
    status = found["engine"]
    level = f", {status['level']}" if status["level"] else ""
    lines = [
        f"{found['date']}, {found['processor']} ({sets}), {found['cores']} cores, "
        f"last-level cache {found['last_level_cache_mib']:.0f} MiB, load {found['load_average_at_start']}",
        f"torch {found['torch']}, Python {found['python']}",
        f"CPU engine: {status['cpu']}{level} ({status['cpu_reason']})",
    ]
    if found["gpu"]:
        lines.append(f"{found['gpu']}; CUDA engine: {status['cuda']} ({status['cuda_reason']})")
    return "\n".join(lines)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def shown_time(milliseconds: float) -> str:
    """Three digits, in us below a tenth of a millisecond."""
    if milliseconds < 0.1:
        return f"{milliseconds * 1e3:.3g} us"
    return f"{milliseconds:.4g} ms" if milliseconds >= 1 else f"{milliseconds:.3g} ms"


class Table:
    """A Markdown table of fixed widths that is printed row by row, so that one sees it grow."""

    def __init__(self, columns: Sequence[tuple[str, int]]) -> None:
        self._widths = [max(width, len(name)) for name, width in columns]
        self.row([name for name, _ in columns])
        print("|" + "|".join("-" * (width + 2) for width in self._widths) + "|", flush=True)

    def row(self, cells: Sequence[str]) -> None:
        """Prints one row."""
        padded = (cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True))
        print("| " + " | ".join(padded) + " |", flush=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Puts the whole file in place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(_dumped(content), encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _dumped(content: dict[str, Any]) -> str:
    """JSON with one line for every member, and for every element of a list of objects."""
    members = []
    for name, value in content.items():
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(_rounded(item)) for item in value) + "\n ]"
        else:
            text = json.dumps(_rounded(value))
        members.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(members) + "\n}\n"


def _rounded(value: Any) -> Any:
    """Floats with 5 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def progress(text: str) -> None:
    """One line on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
