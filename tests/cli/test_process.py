"""The command as the shell sees it: exit codes, streams, signals, a closed pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import Deployed

COMMAND = (sys.executable, "-m", "qdq.cli")


def run_process(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, check=False)


def test_errors_are_one_line_on_stderr(tmp_path: Path) -> None:
    found = run_process("quantize", "none.py:make", "--data", "none.npy", "-o", "out.onnx", cwd=tmp_path)
    assert found.returncode == 2
    assert found.stderr == "qdq: error: MODEL: no such file: none.py\n"
    assert found.stdout == ""


def test_no_escape_codes_without_a_terminal(deployed: Deployed) -> None:
    found = run_process("inspect", deployed.int8)
    assert found.returncode == 0
    assert "\x1b" not in found.stdout + found.stderr
    assert found.stderr == ""


def test_a_closed_pipe_is_no_traceback(deployed: Deployed) -> None:
    process = subprocess.Popen(
        [*COMMAND, "inspect", str(deployed.int8)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=300)
    assert "Traceback" not in said


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGINT to send to another process")
def test_an_interrupt_leaves_no_file(user: Any, tmp_path: Path) -> None:
    begun, folder = tmp_path / "begun", tmp_path / "out"
    folder.mkdir()
    process = subprocess.Popen(
        [*COMMAND, "quantize", user("make"), "--data", user("endless"), "-o", str(folder / "out.onnx")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "QDQ_TEST_BEGUN": str(begun)},
        # A shell may have started the tests with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for _ in range(3000):
        if begun.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert said.endswith("qdq: interrupted\n")
    assert list(folder.iterdir()) == []
