"""Post-training quantization of an LSTM with the import names of the `pytorch_quantization` toolkit.

    pip install 'qdq[demo]'
    python examples/lstm_old_style.py

Trains an LSTM which reads scikit-learn's handwritten digits row by row, calibrates its int8 twin in the loop that the
toolkit documents, and prints the accuracy of both. Exits with 1 if int8 loses more than `--margin` percentage points.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from pytorch_quantization import calib
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor


class Classifier(nn.Module):
    """Reads an image as a sequence of rows, from both ends."""

    def __init__(self, lstm: Callable[..., nn.Module] = nn.LSTM, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.lstm = lstm(8, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.head = linear(8 * 64, 10)

    def forward(self, rows: Tensor) -> Tensor:
        hidden, _ = self.lstm(rows)
        return self.head(hidden.flatten(1))


def read_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images, (images, 8 rows, 8 pixels), and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 8, 8) / 16
    split = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    train, test = (torch.from_numpy(rows) for rows in split)
    answers = torch.tensor(labels)
    return images[train], answers[train], images[test], answers[test]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(32):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


@torch.no_grad()
def collect_stats(model: nn.Module, batches: tuple[Tensor, ...]) -> None:
    """Feed data to the calibrators, with quantization off."""
    for _, module in model.named_modules():
        if isinstance(module, quant_nn.TensorQuantizer):
            if module._calibrator is not None:
                module.disable_quant()
                module.enable_calib()
            else:
                module.disable()
    for batch in batches:
        model(batch)
    for _, module in model.named_modules():
        if isinstance(module, quant_nn.TensorQuantizer):
            if module._calibrator is not None:
                module.enable_quant()
                module.disable_calib()
            else:
                module.enable()


def compute_amax(model: nn.Module, **kwargs: Any) -> None:
    """Take amax from the calibrators; the arguments are for those with a histogram."""
    for _, module in model.named_modules():
        if isinstance(module, quant_nn.TensorQuantizer) and module._calibrator is not None:
            if isinstance(module._calibrator, calib.MaxCalibrator):
                module.load_calib_amax()
            else:
                module.load_calib_amax(**kwargs)


def quantized_twin(model: nn.Module, batches: tuple[Tensor, ...], calib_method: str, **kwargs: Any) -> nn.Module:
    """The int8 model with the weights of `model`, calibrated."""
    descriptor = QuantDescriptor(num_bits=8, calib_method=calib_method)
    for layer in (quant_nn.QuantLSTM, quant_nn.QuantLinear):
        layer.set_default_quant_desc_input(descriptor)
    twin = Classifier(quant_nn.QuantLSTM, quant_nn.QuantLinear).eval()
    twin.load_state_dict(model.state_dict())
    collect_stats(twin, batches)
    compute_amax(twin, **kwargs)
    return twin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--margin", type=float, default=1.0, help="accepted loss of accuracy in percentage points")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    train_images, train_labels, test_images, test_labels = read_digits()
    model = Classifier()
    train(model, train_images, train_labels, arguments.epochs)
    model.eval()

    calibration = train_images[:256].split(32)
    before = accuracy(model, test_images, test_labels)
    after = {
        "int8, max": quantized_twin(model, calibration, "max"),
        "int8, entropy": quantized_twin(model, calibration, "histogram", method="entropy"),
    }
    print(f"{'model':15} accuracy of {len(test_images)} images")
    print(f"{'float32':15} {before:.2%}")
    scores = {name: accuracy(twin, test_images, test_labels) for name, twin in after.items()}
    for name, score in scores.items():
        print(f"{name:15} {score:.2%}")
    lost = 100 * (before - min(scores.values()))
    if lost > arguments.margin:
        print(f"int8 loses {lost:.2f} percentage points, more than {arguments.margin}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
