"""What a user would put beside the command line: a model, data, a score. The tests name it as `user_code.py:name`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, image: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(image)))
        y = y + torch.relu(self.mix(y))
        return self.head(y.mean((2, 3)))


def make() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def make_other() -> nn.Module:
    torch.manual_seed(99)
    return Net()


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield torch.randn(8, 1, 8, 8, generator=generator)


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(batch, torch.zeros(8, dtype=torch.long)) for batch in batches()]


def with_nan() -> Iterator[Tensor]:
    for batch in batches():
        batch[0, 0, 0, 0] = float("nan")
        yield batch


def wrong_shape() -> list[Tensor]:
    return [torch.randn(4, 3, 8, 8)]


def nothing() -> list[Tensor]:
    return []


def endless() -> Iterator[Tensor]:
    """Batches until somebody interrupts; leaves a file behind when the work has begun."""
    for index in range(10_000):
        if index == 2:
            Path(os.environ["QDQ_TEST_BEGUN"]).touch()
        time.sleep(0.01)
        yield torch.randn(8, 1, 8, 8)


def mean_logit(predict: Callable[[Tensor], Tensor]) -> float:
    print("scored by the user's own function")  # noqa: T201 - that it arrives on stdout is what a test looks at
    return float(predict(next(batches())).double().mean())


def by_name(predict: Callable[..., Tensor]) -> float:
    return float(predict(image=next(batches()).numpy()).shape[0])


def not_a_number(predict: Callable[[Tensor], Tensor]) -> str:
    return "good"


def infinite(predict: Callable[[Tensor], Tensor]) -> float:
    return float("inf")


def two_inputs(predict: Callable[..., Tensor]) -> float:
    predict(1, 2)
    return 0.0


def value() -> int:
    return 3
