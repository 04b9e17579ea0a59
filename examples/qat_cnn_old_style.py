"""Quantization-aware training of a CNN with the import names of the `pytorch_quantization` toolkit.

    pip install 'qdq[demo]'
    python examples/qat_cnn_old_style.py

Trains a small residual network on scikit-learn's handwritten digits, quantizes it to a few bits by
`quant_modules.initialize()`, calibrates it in the loop that the toolkit documents, trains on with quantization in the
forward pass, and prints the accuracy before and after. Exits with 1 unless training raised it and the saved
checkpoint brings the same model back.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from pytorch_quantization import calib, quant_modules
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.optim import helper
from pytorch_quantization.tensor_quant import QuantDescriptor


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, quantize: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.project = nn.Conv2d(inputs, outputs, 1, stride)
        self.quantize = quantize
        if quantize:  # so that both operands of the addition are quantized
            self.residual_quantizer = quant_nn.TensorQuantizer(quant_nn.QuantConv2d.default_quant_desc_input)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        shortcut = self.project(x)
        if self.quantize:
            shortcut = self.residual_quantizer(shortcut)
        return F.relu(self.norm2(self.conv2(y)) + shortcut)


class Net(nn.Module):
    """Built of `torch.nn` layers, which `quant_modules.initialize()` replaces by quantized ones."""

    def __init__(self, quantize: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1)
        self.block1 = Residual(8, 8, stride=1, quantize=quantize)
        self.block2 = Residual(8, 16, stride=2, quantize=quantize)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu(self.stem(x))))
        return self.head(x.mean((2, 3)))


def read_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images of 8 by 8 pixels, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    split = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    train, test = (torch.from_numpy(rows) for rows in split)
    answers = torch.tensor(labels)
    return images[train], answers[train], images[test], answers[test]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, learning_rate: float) -> None:
    model.train()
    # Weights of convolutions and of the head decay; biases and batch norms do not.
    groups = helper.group_parameters(
        model,
        [["conv.*weight", "stem.weight", "project.weight", "head.weight"], ["bias", "norm"]],
        weight_decays=[0.01, 0.0],
    )
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images)).split(32):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        schedule.step()
        print(f"epoch {epoch + 1}: loss {total / len(images):.3f}")
    model.eval()


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


def quantized_net(bits: int) -> nn.Module:
    """The network with quantized layers: one amax per input, one per output channel of each weight."""
    for layer in (quant_nn.QuantConv2d, quant_nn.QuantLinear):
        layer.set_default_quant_desc_input(QuantDescriptor(num_bits=bits, calib_method="histogram"))
        layer.set_default_quant_desc_weight(QuantDescriptor(num_bits=bits, axis=(0,)))
    quant_modules.initialize()
    net = Net(quantize=True)
    quant_modules.deactivate()
    return net


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8, help="of the float model")
    parser.add_argument("--qat-epochs", type=int, default=4)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("demo-out"), help="where the checkpoint goes")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.folder / "qat_cnn.pt"

    torch.manual_seed(arguments.seed)
    train_images, train_labels, test_images, test_labels = read_digits()
    model = Net()
    train(model, train_images, train_labels, arguments.epochs, learning_rate=4e-3)
    before = accuracy(model, test_images, test_labels)

    net = quantized_net(arguments.bits)
    net.load_state_dict(model.state_dict())
    net.eval()
    collect_stats(net, train_images[:256].split(32))
    compute_amax(net, method="mse")
    calibrated = accuracy(net, test_images, test_labels)

    print(f"training with quantization to {arguments.bits} bits")
    train(net, train_images, train_labels, arguments.qat_epochs, learning_rate=1e-3)
    trained = accuracy(net, test_images, test_labels)

    torch.save(net.state_dict(), checkpoint)
    again = quantized_net(arguments.bits).eval()
    again.load_state_dict(torch.load(checkpoint, weights_only=True))
    restored = accuracy(again, test_images, test_labels)

    print(f"{'model':18} accuracy on {len(test_images)} held-out images")
    print(f"{'float32':18} {before:.2%}")
    print(f"{f'int{arguments.bits}, calibrated':18} {calibrated:.2%}")
    print(f"{f'int{arguments.bits}, trained':18} {trained:.2%}")
    print(f"{checkpoint}, loaded again: {restored:.2%}")
    if trained <= calibrated:
        print("training with quantization did not raise the accuracy", file=sys.stderr)
        return 1
    if restored != trained:
        print("the checkpoint does not bring the same model back", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
