"""`qdq demo`: the main job on real data. Trains a small network on handwritten digits, then deploys it.

The data are scikit-learn's digits, 1797 scans of 8x8 pixels, which ship in its wheel. They are enlarged to 32x32 so
that the network has the work of a small vision model. `examples/digits.py` is the same job as a plain script.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import qdq

if TYPE_CHECKING:
    from rich.console import Console

    from qdq.analysis.latency import Speed

SIDE = 32
EPOCHS = 4
BATCH = 32
LEARNING_RATE = 3e-3
MIN_ACCURACY = 0.95
TEST_SHARE = 0.2
CALIBRATION_IMAGES = 256
ROUNDS = 30
MIN_SQNR_DB = 30.0
MAX_ACCURACY_LOSS = 0.01


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm, added to a 1x1 projection of the input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.norm3(self.project(x)))


class DigitNet(nn.Module):
    """A residual network of 7 convolutions for images of shape (N, 1, 32, 32); gives logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.block1 = Residual(32, 64, stride=1)
        self.block2 = Residual(64, 128, stride=2)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block2(self.block1(self.pool(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Digits(NamedTuple):
    """Images of shape (N, 1, 32, 32), normalised, and their labels; no test image is in the training set."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_digits(seed: int = 0) -> Digits:
    """Reads the digits, enlarges them to 32x32 and holds one fifth of every class out for the test."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    pixels, labels = load(return_X_y=True)
    train, test = train_test_split(range(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=seed)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16.0
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    images = (images - images[train].mean()) / images[train].std()
    answers = torch.tensor(labels)
    return Digits(images[train], answers[train], images[test], answers[test])


def train_network(digits: Digits, *, epochs: int, seed: int = 0) -> DigitNet:
    """Trains from random weights with AdamW; returns the network in evaluation mode.

    The learning rate rises over the first tenth of the steps and falls along a cosine to zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitNet().train()
        count = len(digits.train_images)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        batches = [rows for _ in range(epochs) for rows in torch.randperm(count).split(BATCH)]
        for index, rows in enumerate(batches):
            share = index / len(batches)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, 10 * share + 0.01) * 0.5 * (1 + math.cos(math.pi * share))
            loss = F.cross_entropy(model(digits.train_images[rows]), digits.train_labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return model.eval()


def accuracy(path: Path, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of right answers of an ONNX file in ONNX Runtime."""
    from qdq._cli.scoring import predict_with_onnxruntime

    predict = predict_with_onnxruntime(path)
    answers = torch.cat([predict(batch).argmax(1) for batch in images.split(64)])
    return (answers == labels).float().mean().item()


def reasons_against(sqnr_db: float, accuracy: float, accuracy_loss: float, sizes: tuple[int, int]) -> list[str]:
    """Why the deployment does not hold, if it does not.

    ``accuracy`` is that of the float file; ``sizes`` are the bytes of the float and of the int8 file.
    """
    reasons = []
    if accuracy < MIN_ACCURACY:
        reasons.append(f"the float network has learnt too little: {accuracy:.2%} right, expected {MIN_ACCURACY:.0%}")
    if not sqnr_db >= MIN_SQNR_DB:
        reasons.append(f"the deployment differs from the simulation (SQNR {sqnr_db:.1f} dB)")
    if accuracy_loss > MAX_ACCURACY_LOSS:
        reasons.append(f"{accuracy_loss:.2%} of accuracy is lost")
    if sizes[1] * 2 > sizes[0]:
        reasons.append("the int8 file is more than half as large as the fp32 file")
    return reasons


def run(folder: Path, *, console: Console, seed: int = 0) -> bool:
    """The whole demo; writes two ONNX files into ``folder`` and prints what it does. True if the deployment held."""
    from qdq._cli import show

    folder.mkdir(parents=True, exist_ok=True)
    float_file, int8_file = folder / "digits.fp32.onnx", folder / "digits.int8.onnx"

    digits = load_digits(seed)
    show.step(
        console,
        "data",
        f"{len(digits.train_images)} digits to train on, {len(digits.test_images)} held out; "
        f"8x8 pixels enlarged to {SIDE}x{SIDE}",
    )
    start = time.perf_counter()
    model = train_network(digits, epochs=EPOCHS, seed=seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    show.step(console, "train", f"{parameters:,} parameters, {time.perf_counter() - start:.1f} s")

    # From here on: the calls that a user would make.
    calibration = list(digits.train_images[:CALIBRATION_IMAGES].split(BATCH))
    held_out = list(digits.test_images.split(BATCH))
    start = time.perf_counter()
    qmodel = qdq.quantize(model, calibration, progress=False)
    show.step(
        console, "quantize", f"calibrated on {CALIBRATION_IMAGES} training images, {time.perf_counter() - start:.1f} s"
    )
    qdq.export_onnx(qmodel, int8_file)
    qdq.export_onnx(model, float_file, example_inputs=calibration[0])
    show.step(console, "export", f"{int8_file} and {float_file}")
    fidelity = qdq.verify(qmodel, int8_file, held_out, progress=False)
    show.step(console, "verify", "the file in ONNX Runtime against the simulation, on the held-out digits")
    single = qdq.benchmark(int8_file, against=float_file, batch_size=1, rounds=ROUNDS, progress=False)
    many = qdq.benchmark(int8_file, against=float_file, batch_size=64, rounds=ROUNDS, progress=False)
    show.step(console, "benchmark", "both files in ONNX Runtime, in turns\n")

    before = accuracy(float_file, digits.test_images, digits.test_labels)
    after = accuracy(int8_file, digits.test_images, digits.test_labels)
    sizes = float_file.stat().st_size, int8_file.stat().st_size
    console.print(
        show.comparison(
            "Handwritten digits in ONNX Runtime",
            [
                (f"accuracy on {len(digits.test_labels)} held-out digits", f"{before:.2%}", f"{after:.2%}", ""),
                ("latency, 1 image", *_latency(single)),
                ("latency, 64 images", *_latency(many)),
                ("file size", show.size(sizes[0]), show.size(sizes[1]), f"{sizes[0] / sizes[1]:.2f} times smaller"),
                ("simulation against deployment", "", show.decibels(fidelity.sqnr_db), _agreement(fidelity.agreement)),
            ],
        )
    )
    reasons = reasons_against(fidelity.sqnr_db, before, before - after, sizes)
    if reasons:
        console.print(f"[red]FAILED[/red]: {'; '.join(reasons)}", soft_wrap=True)
        return False
    faster = max(single.ratio or 0.0, many.ratio or 0.0) > 1
    slower = "" if faster else ", though no faster than fp32 on this machine"
    console.print(
        f"[green]VERIFIED[/green]: the INT8 file does what was simulated{slower}. Look at it: ", end="", soft_wrap=True
    )
    console.print(f"qdq inspect {int8_file}", markup=False, soft_wrap=True)
    return True


def _latency(speed: Speed) -> tuple[str, str, str]:
    remark = f"{speed.ratio:.2f} times as fast ({speed.ratio_low:.2f} to {speed.ratio_high:.2f})"
    return f"{speed.against_ms:.3f} ms", f"{speed.median_ms:.3f} ms", remark


def _agreement(value: float | None) -> str:
    return "" if value is None else f"{value:.2%} same answers"
