"""A folder of images as batches of float32 tensors, NCHW."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qdq._cli.errors import CommandError, UsageError

if TYPE_CHECKING:
    import torch

    from qdq._cli.data import DataOptions

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


class ImageFolder:
    """Every image below a folder, by path, in batches.

    Each is resized so that its shorter side has ``image_size`` pixels, cropped to the central square, scaled to
    [0, 1], and normalised by mean and standard deviation. Without ``image_size`` all must have one size.
    """

    def __init__(self, folder: Path, options: DataOptions) -> None:
        if len(options.mean) not in (1, 3) or len(options.mean) != len(options.std):
            raise UsageError(
                f"--mean and --std take one value each (grey) or three (RGB), not {len(options.mean)} and "
                f"{len(options.std)}"
            )
        if any(value <= 0 for value in options.std):
            raise UsageError("--std must be positive")
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
        if not paths:
            raise UsageError(f"{folder} holds no images ({', '.join(sorted(_SUFFIXES))})")
        self.paths = paths[: options.limit]
        self._options = options

    def __len__(self) -> int:
        return -(-len(self.paths) // self._options.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        import torch

        size = self._options.batch_size
        for start in range(0, len(self.paths), size):
            images = [self._read(path) for path in self.paths[start : start + size]]
            shapes = {tuple(image.shape) for image in images}
            if len(shapes) > 1:
                raise UsageError(f"the images differ in size ({sorted(shapes)[:2]}); give --image-size")
            yield torch.stack(images)

    def _read(self, path: Path) -> torch.Tensor:
        import numpy as np
        import torch
        from PIL import Image

        try:
            with Image.open(path) as opened:
                image = opened.convert("L" if len(self._options.mean) == 1 else "RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise CommandError(f"{path} cannot be read as an image: {error}") from error
        side = self._options.image_size
        if side is not None:
            scale = side / min(image.size)
            width, height = (max(side, round(length * scale)) for length in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = (width - side) // 2, (height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255.0)
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        mean = torch.tensor(self._options.mean).view(-1, 1, 1)
        std = torch.tensor(self._options.std).view(-1, 1, 1)
        return ((pixels - mean) / std).contiguous()
