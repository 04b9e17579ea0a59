"""``qdq doctor``: what this machine and this environment can do, and what that means for an 8-bit file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import NamedTuple

import qdq
from qdq import cpuinfo
from qdq._cli.errors import is_importable

# What an extra brings -> the modules it is there for.
EXTRAS: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "images": ("PIL",),
    "demo": ("sklearn",),
    "openvino": ("openvino",),
}
_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}
# Modules without which `qdq quantize` cannot finish.
_NEEDED = frozenset({"onnx", "onnxscript", "onnxruntime"})


class Finding(NamedTuple):
    """One line of the report. ``level`` is "ok", "note" or "missing"; only the last stops the main job."""

    level: str
    subject: str
    text: str


def diagnose() -> list[Finding]:
    """Looks at Python, PyTorch, the processor and the optional packages. Starts nothing, changes nothing."""
    import torch

    findings = [
        Finding("ok", "qdq", f"{qdq.__version__} on Python {platform.python_version()}, {sys.platform}"),
        Finding("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} processors"),
        Finding("ok", "kernels", "reference engine (plain PyTorch)"),
        _processor(),
        _accelerator(),
    ]
    for extra, modules in EXTRAS.items():
        findings.extend(_package(module, extra) for module in modules)
    return findings


def _processor() -> Finding:
    machine = platform.machine()
    saturates = cpuinfo.saturates_u8s8()
    if saturates is None:
        return Finding(
            "note",
            "processor",
            f'{machine}: unknown whether products of uint8 and int8 saturate at 16 bits here; reduce_range "auto" '
            "keeps weights at 8 bits",
        )
    if saturates:
        return Finding(
            "note",
            "processor",
            f"{machine} without VNNI: products of uint8 and int8 saturate at 16 bits in ONNX Runtime. "
            'reduce_range "auto" shrinks the weights that would saturate',
        )
    what = "with VNNI" if cpuinfo.is_x86() else "with 32-bit integer accumulation"
    return Finding("ok", "processor", f"{machine} {what}: 8-bit products are exact")


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("ok", "cuda", f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")
    return Finding("note", "cuda", "none in use; qdq does not need one")


def _package(module: str, extra: str) -> Finding:
    name = _DISTRIBUTIONS.get(module, module)
    if not is_importable(module):
        level = "missing" if module in _NEEDED else "note"
        return Finding(level, name, f"not installed: pip install 'qdq[{extra}]'")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "installed"
    return Finding("ok", name, version)
