"""Weights of 4 bits: what they cost, layer by layer, and how to get the accuracy back, on scikit-learn's digits.

    pip install 'qdq[demo]'
    python examples/four_bit_weights.py

Trains a small residual network and rounds its weights to 4 bits, with one step size for each tensor. `qdq.sensitivity`
says which layers that costs most, and two of them get 8 bits back by hand. Then `qdq.recover` looks for a recipe that
keeps 99 % of the float model's accuracy, beginning with the same 4 bits. What it finds is exported and verified, and
its file scored on images that nothing was chosen by. (Weights that are multiplied in integers take a byte each in the
file, whatever their bits: see docs/recipes.md.) Exits with 1 where the goal is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
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
        self.project = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.project(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 1, 1)
        self.block1 = Residual(16, 32, stride=1)
        self.block2 = Residual(32, 64, stride=2)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu(self.stem(x))))
        return self.head(x.mean((2, 3)))


def read_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images of 8 by 8 pixels, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    split = train_test_split(np.arange(len(labels)), test_size=0.4, stratify=labels, random_state=0)
    train, test = (torch.from_numpy(rows) for rows in split)
    answers = torch.tensor(labels)
    return images[train], answers[train], images[test], answers[test]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for rows in torch.randperm(len(images)).split(32):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def accuracy_of_file(path: Path, images: Tensor, labels: Tensor) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits = np.asarray(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    return float((logits.argmax(1) == labels.numpy()).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--target", type=float, default=0.99, help="share of the float model's accuracy to be kept")
    parser.add_argument("--budget", default="1min", help="time that qdq.recover may take")
    parser.add_argument("--folder", type=Path, default=Path("demo-out"), help="where the files go")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    train_images, train_labels, test_images, test_labels = read_digits()
    model = Net()
    train(model, train_images, train_labels, arguments.epochs)
    # Recipes are compared on one half of the test images; the file is scored on the other.
    half = len(test_images) // 2
    chosen_by, held_out = (test_images[:half], test_labels[:half]), (test_images[half:], test_labels[half:])

    def evaluate(candidate: nn.Module) -> float:
        return accuracy(candidate, *chosen_by)

    # One pass over the data; all recipes below are solved from its statistics.
    calibration = train_images[:256].split(32)
    plain = qdq.Recipe(weights=qdq.QuantDescriptor(num_bits=4), weight_calibration="max", algorithms=[])
    qmodel = qdq.quantize(model, calibration, recipe=plain)
    qdq.calib.save(qmodel, arguments.folder / "four_bits.statistics.safetensors")
    statistics = qdq.calib.load(arguments.folder / "four_bits.statistics.safetensors")
    print(f"float: {evaluate(model):.2%}; weights of 4 bits, one step size a tensor: {evaluate(qmodel):.2%}")

    # Each weight alone at 4 bits in the float model, the one that costs the outputs most first.
    found = qdq.sensitivity(qmodel, statistics, kinds=["weight"], float_model=model)
    print(found)
    eight = qdq.Override(weights=qdq.QuantDescriptor(num_bits=8))
    mixed = dataclasses.replace(plain, overrides=dict.fromkeys(found.worst(2), eight))
    by_hand = evaluate(qdq.quantize(model, statistics, recipe=mixed))
    print(f"the two worst with 8 bits: {by_hand:.2%}")

    recovery = qdq.recover(model, statistics, evaluate, target=arguments.target, budget=arguments.budget, recipe=plain)
    print(recovery)
    print(recovery.recipe.to_yaml())

    path = qdq.export_onnx(recovery.model, arguments.folder / "four_bits.onnx")
    print(qdq.verify(recovery.model, path, [held_out[0]]))
    in_float, deployed = accuracy(model, *held_out), accuracy_of_file(path, *held_out)
    print(f"on {half} images held out: float {in_float:.2%}, the file {deployed:.2%}")
    if not recovery.reached:
        print(f"the goal was not reached: {recovery.metric:.2%} of {recovery.goal:.2%}", file=sys.stderr)
    return 0 if recovery.reached else 1


if __name__ == "__main__":
    sys.exit(main())
