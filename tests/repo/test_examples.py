"""The programs in examples/ run as they stand, on real data, and the old-style ones also after `qdq migrate`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qdq._cli.old_imports import migrate_text

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
OLD_STYLE = ("ptq_cnn_old_style.py", "qat_cnn_old_style.py", "lstm_old_style.py")

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="not run from a source tree")


def run(program: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(program), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def percentages(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"(\d+\.\d+)%", text)]


@pytest.mark.slow
def test_ptq_of_a_cnn(tmp_path: Path) -> None:
    done = run(EXAMPLES / "ptq_cnn_old_style.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("float32", "int8, max", "int8, percentile 99.9", "int8, mse", "int8, entropy", "in ONNX Runtime"):
        assert name in done.stdout
    assert min(percentages(done.stdout)) > 95
    assert {"ptq_cnn.int8.onnx", "ptq_cnn.pt"} <= {path.name for path in (tmp_path / "demo-out").iterdir()}


@pytest.mark.slow
def test_qat_of_a_cnn(tmp_path: Path) -> None:
    done = run(EXAMPLES / "qat_cnn_old_style.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    float32, calibrated, trained, restored = percentages(done.stdout)
    assert float32 > 95
    assert trained > calibrated
    assert restored == trained


@pytest.mark.slow
def test_lstm(tmp_path: Path) -> None:
    done = run(EXAMPLES / "lstm_old_style.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "float32" in done.stdout
    assert min(percentages(done.stdout)) > 90


@pytest.mark.slow
def test_digits(tmp_path: Path) -> None:
    done = run(EXAMPLES / "digits.py", tmp_path, "--epochs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "demo-out").iterdir()} == {"example.fp32.onnx", "example.int8.onnx"}


@pytest.mark.slow
def test_four_bit_weights(tmp_path: Path) -> None:
    done = run(EXAMPLES / "four_bit_weights.py", tmp_path, "--budget", "10min")
    assert done.returncode == 0, done.stdout + done.stderr
    float32, plain, by_hand, in_float, deployed = percentages(done.stdout)
    assert plain < float32 and plain <= by_hand
    assert deployed > 95 and deployed > in_float - 2
    assert "block1.conv1.weight_quantizer" in done.stdout and "goal" in done.stdout
    assert {"four_bits.onnx", "four_bits.statistics.safetensors"} == {p.name for p in (tmp_path / "demo-out").iterdir()}


def test_failure_is_an_exit_code(tmp_path: Path) -> None:
    """Training that cannot raise the accuracy (no epochs at all) must not pass."""
    done = run(EXAMPLES / "qat_cnn_old_style.py", tmp_path, "--epochs", "1", "--qat-epochs", "0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "did not raise the accuracy" in done.stderr


def test_a_migrated_example_prints_the_same(tmp_path: Path) -> None:
    text = (EXAMPLES / "qat_cnn_old_style.py").read_text(encoding="utf-8")
    native = tmp_path / "native.py"
    native.write_text(migrate_text(text).text, encoding="utf-8")
    assert not re.search(r"(?:import|from) pytorch_quantization", native.read_text(encoding="utf-8"))
    arguments = ("--epochs", "1", "--qat-epochs", "1")
    outputs = [run(path, tmp_path, *arguments).stdout for path in (EXAMPLES / "qat_cnn_old_style.py", native)]
    assert outputs[0] == outputs[1]
    assert len(percentages(outputs[0])) == 4


@pytest.mark.parametrize("name", OLD_STYLE)
def test_old_style_examples_hold_old_names_only(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert not re.search(r"^(?:import|from) qdq", text, re.MULTILINE)
    migration = migrate_text(text)
    assert [finding for finding in migration.findings if finding.kind == "left"] == []
    assert not re.search(r"^(?:import|from) pytorch_quantization", migration.text, re.MULTILINE)


def test_every_example_is_in_the_list() -> None:
    listed = set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in EXAMPLES.glob("*.py")}
