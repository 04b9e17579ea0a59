"""`qdq demo`: its parts, and the whole with little training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")

from qdq import digits_demo


def test_the_test_digits_are_held_out() -> None:
    digits = digits_demo.load_digits()
    assert digits.train_images.shape[1:] == digits.test_images.shape[1:] == (1, 32, 32)
    assert len(digits.train_images) + len(digits.test_images) == 1797
    assert set(digits.test_labels.tolist()) == set(range(10))
    trained_on = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in trained_on for image in digits.test_images)


def test_training_leaves_the_random_state_alone() -> None:
    digits = digits_demo.load_digits()
    few = digits_demo.Digits(*(tensor[:64] for tensor in digits))
    state = torch.get_rng_state()
    model = digits_demo.train_network(few, epochs=1)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with little data, one epoch and few timed rounds."""
    digits = digits_demo.load_digits()
    few = digits_demo.Digits(*(tensor[:640] for tensor in digits[:2]), *(tensor[:96] for tensor in digits[2:]))
    monkeypatch.setattr(digits_demo, "load_digits", lambda seed: few)
    monkeypatch.setattr(digits_demo, "MIN_ACCURACY", 0.0)
    monkeypatch.setattr(digits_demo, "EPOCHS", 1)
    monkeypatch.setattr(digits_demo, "CALIBRATION_IMAGES", 32)
    monkeypatch.setattr(digits_demo, "ROUNDS", 2)


@pytest.mark.usefixtures("short")
def test_the_demo_ends_with_a_table_and_a_verdict(run: Any, tmp_path: Path) -> None:
    result = run("demo", "--folder", tmp_path / "new")
    assert result.exit_code == 0, result.output
    for text in ("accuracy on 96 held-out digits", "latency, 1 image", "file size", "same answers", "VERIFIED"):
        assert text in result.stdout
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "new").iterdir()}
    assert set(sizes) == {"digits.fp32.onnx", "digits.int8.onnx"}
    assert sizes["digits.int8.onnx"] * 2 < sizes["digits.fp32.onnx"]


@pytest.mark.usefixtures("short")
def test_a_demo_that_does_not_hold_fails(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_demo, "EPOCHS", 0)
    monkeypatch.setattr(digits_demo, "MAX_ACCURACY_LOSS", -1.1)
    result = run("demo", "--folder", tmp_path)
    assert result.exit_code == 1
    assert "FAILED: " in result.stdout
    assert "of accuracy is lost" in result.stdout


@pytest.mark.parametrize(
    ("sqnr_db", "loss", "sizes", "text"),
    [
        (29.9, 0.0, (4, 1), "differs from the simulation (SQNR 29.9 dB)"),
        (math.nan, 0.0, (4, 1), "differs from the simulation"),
        (60.0, 0.02, (4, 1), "2.00% of accuracy is lost"),
        (60.0, 0.0, (4, 3), "more than half as large"),
    ],
)
def test_reasons_against(sqnr_db: float, loss: float, sizes: tuple[int, int], text: str) -> None:
    (reason,) = digits_demo.reasons_against(sqnr_db, 0.99, loss, sizes)
    assert text in reason


def test_no_reason_against() -> None:
    assert digits_demo.reasons_against(math.inf, 0.99, -0.01, (4, 2)) == []
    (reason,) = digits_demo.reasons_against(math.inf, 0.3, 0.0, (4, 2))
    assert "learnt too little" in reason
