"""Random crops of the photographs that ship with scikit-learn and scikit-image, normalised as for ImageNet."""

from __future__ import annotations

import functools

import numpy as np
import torch
from mobilenet_imagenet import package_folder
from torch.nn import functional as F

_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
_FILES = {
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "skimage": (
        "data",
        ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
    ),
}


@functools.cache
def _photographs() -> tuple[torch.Tensor, ...]:
    from PIL import Image

    found = []
    for package, (folder, names) in _FILES.items():
        for name in names:
            with Image.open(package_folder(package) / folder / name) as image:
                pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
            found.append(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    return tuple(found)


def crops(count: int, size: int, seed: int) -> torch.Tensor:
    """`count` square crops of 30 to 100 % of a photograph's shorter side, some mirrored: `[count, 3, size, size]`."""
    generator = np.random.default_rng(seed)
    photographs = _photographs()
    out = torch.empty(count, 3, size, size)
    for index in range(count):
        image = photographs[int(generator.integers(len(photographs)))]
        height, width = image.shape[1:]
        side = int(generator.uniform(0.3, 1.0) * min(height, width))
        top, left = int(generator.integers(height - side + 1)), int(generator.integers(width - side + 1))
        crop = image[:, top : top + side, left : left + side].unsqueeze(0)
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
        out[index] = crop.flip(2) if generator.random() < 0.5 else crop
    return (out - _MEAN) / _STD
