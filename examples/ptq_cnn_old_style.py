"""Post-training quantization of a CNN with the import names of the `pytorch_quantization` toolkit.

    pip install 'qdq[demo]'
    python examples/ptq_cnn_old_style.py

Trains a small residual network on scikit-learn's handwritten digits, builds its int8 twin by
`quant_modules.initialize()`, calibrates it in the loop that the toolkit documents, prints the accuracy for four methods
of calibration, exports the last one to ONNX and compares ONNX Runtime with PyTorch. Exits with 1 if int8 loses more
than `--margin` percentage points, or if the file answers otherwise than the model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from pytorch_quantization import calib, quant_modules
from pytorch_quantization import nn as quant_nn
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
        self.stem = nn.Conv2d(1, 16, 3, 1, 1)
        self.block1 = Residual(16, 16, stride=1, quantize=quantize)
        self.block2 = Residual(16, 32, stride=2, quantize=quantize)
        self.head = nn.Linear(32, 10)

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


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
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


def quantized_twin(weights: Path, batches: tuple[Tensor, ...], calib_method: str) -> nn.Module:
    """The int8 model with the float model's weights, and with statistics in its calibrators."""
    descriptor = QuantDescriptor(num_bits=8, calib_method=calib_method)
    quant_nn.QuantConv2d.set_default_quant_desc_input(descriptor)
    quant_nn.QuantLinear.set_default_quant_desc_input(descriptor)
    quant_modules.initialize()
    twin = Net(quantize=True).eval()
    quant_modules.deactivate()
    twin.load_state_dict(torch.load(weights, weights_only=True))
    collect_stats(twin, batches)
    return twin


def export(model: nn.Module, example: Tensor, path: Path) -> None:
    """An ONNX file of any batch size; `dynamo=False, opset_version=13` works as well."""
    batch = torch.export.Dim("batch")
    with quant_modules.enable_onnx_export():
        torch.onnx.export(model, (example,), path, opset_version=18, dynamic_shapes={"x": {0: batch}}, verbose=False)


def answers_of(path: Path, images: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return np.asarray(logits).argmax(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--margin", type=float, default=1.0, help="accepted loss of accuracy in percentage points")
    parser.add_argument("--folder", type=Path, default=Path("demo-out"), help="where weights and the ONNX file go")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    weights, onnx_file = arguments.folder / "ptq_cnn.pt", arguments.folder / "ptq_cnn.int8.onnx"

    torch.manual_seed(arguments.seed)
    train_images, train_labels, test_images, test_labels = read_digits()
    model = Net()
    train(model, train_images, train_labels, arguments.epochs)
    torch.save(model.state_dict(), weights)

    calibration = train_images[:256].split(32)
    before = accuracy(model, test_images, test_labels)
    scores = {}
    twin = quantized_twin(weights, calibration, "max")
    compute_amax(twin)
    scores["max"] = accuracy(twin, test_images, test_labels)
    # One histogram serves all other methods.
    twin = quantized_twin(weights, calibration, "histogram")
    for name, choice in {
        "percentile 99.9": {"method": "percentile", "percentile": 99.9},
        "mse": {"method": "mse"},
        "entropy": {"method": "entropy"},
    }.items():
        compute_amax(twin, **choice)
        scores[name] = accuracy(twin, test_images, test_labels)

    print(f"{'model':22} accuracy on {len(test_images)} held-out images")
    print(f"{'float32':22} {before:.2%}")
    for name, score in scores.items():
        print(f"{'int8, ' + name:22} {score:.2%}")

    export(twin, test_images[:2], onnx_file)
    with torch.no_grad():
        simulated = twin(test_images).argmax(1).numpy()
    deployed = answers_of(onnx_file, test_images)
    agreement = float((simulated == deployed).mean())
    right = float((deployed == test_labels.numpy()).mean())
    print(
        f"{onnx_file}: accuracy {right:.2%} in ONNX Runtime, same answer as PyTorch for {agreement:.2%} of the images"
    )

    lost = 100 * (before - min(scores.values()))
    if lost > arguments.margin:
        print(f"int8 loses {lost:.2f} percentage points, more than {arguments.margin}", file=sys.stderr)
        return 1
    if agreement < 0.99:
        print("the file answers otherwise than the model", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
