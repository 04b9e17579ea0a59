"""From training to a verified INT8 file, as one plain script: copy it and put your own model and data in.

    pip install 'qdq[demo]'
    python examples/digits.py

Trains a small residual network on scikit-learn's handwritten digits, then quantizes it, exports it, verifies the file
in ONNX Runtime against its simulation, and measures both files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import qdq


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.project(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, 1, 1)
        self.block1 = Residual(32, 64, stride=2)
        self.block2 = Residual(64, 128, stride=2)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu(self.stem(x))))
        return self.head(x.mean((2, 3)))


def read_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images, enlarged to 32x32, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear")
    split = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, test = (torch.from_numpy(rows) for rows in split)
    answers = torch.tensor(labels)
    return images[train], answers[train], images[test], answers[test]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(epochs):
        for rows in torch.randperm(len(images)).split(32):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


def accuracy(path: Path, images: Tensor, labels: Tensor) -> float:
    """Share of right answers of an ONNX file in ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    logits = np.concatenate([np.asarray(session.run(None, {name: batch.numpy()})[0]) for batch in images.split(64)])
    return float((logits.argmax(1) == labels.numpy()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("demo-out"), help="where the ONNX files go")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    float_file = arguments.folder / "example.fp32.onnx"
    int8_file = arguments.folder / "example.int8.onnx"

    torch.manual_seed(0)
    train_images, train_labels, test_images, test_labels = read_digits()
    model = Net()
    train(model, train_images, train_labels, arguments.epochs)

    # A few hundred inputs like those of the deployment are enough to calibrate with.
    calibration = train_images[:256].split(32)
    qmodel = qdq.quantize(model, calibration)
    qdq.export_onnx(qmodel, int8_file)
    print(qdq.verify(qmodel, int8_file, test_images.split(32)))

    qdq.export_onnx(model, float_file, example_inputs=calibration[0])
    print(qdq.benchmark(int8_file, against=float_file))
    for path in (float_file, int8_file):
        print(f"{path}: accuracy {accuracy(path, test_images, test_labels):.2%}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
