"""The CUDA engine, in processes of its own: see cuda_engine_checks.py and cuda_code_checks.py beside this file."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qdq.kernels import cuda

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_checks(name: str, cache: Path, **environment: str) -> None:
    """Run the tests in the file ``name`` beside this one, and fail with what they print."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_"))}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", name],
        cwd=Path(__file__).parent,
        env={**kept, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and " failed" not in result.stdout


@needs_triton
def test_kernels_equal_the_reference(tmp_path: Path) -> None:
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    run_checks("cuda_engine_checks.py", tmp_path, **interpreted)


@needs_triton
def test_compiled_code_rounds_as_it_should(tmp_path: Path) -> None:
    run_checks("cuda_code_checks.py", tmp_path)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cuda.available() == (
        False,
        "Triton is not installed: it comes with PyTorch's builds for CUDA on Linux.",
    )


def device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    """Pretend that Triton is installed, and that there is a device of this compute capability."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A device")


def test_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, None)
    assert cuda.available() == (False, "PyTorch sees no CUDA device.")


def test_with_an_old_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, (6, 1))
    assert cuda.available() == (False, "A device has compute capability 6.1, and Triton needs 7.5.")


def test_with_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.7"))
    assert cuda.available() == (True, "Triton 3.7 compiles the kernels for A device.")


def test_with_a_broken_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    found, reason = cuda.available()
    assert not found and reason.startswith("Triton cannot be imported: ")


def test_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cuda.available() == (
        True,
        "Triton's interpreter runs the kernels on the CPU, as TRITON_INTERPRET asks for.",
    )
