"""Quantizers of modules whose form no algorithm knows: they quantize as they do, and nothing about them changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..affine_quantizer import AffineQuantizer
from ..constant_quantizers import WeightQuantizer


class UnchangedQuantizer(AffineQuantizer):
    """Of an activation: E4M3, one amax per channel, and the like.

    Args:
        name: path in the graph.
        function: takes the tensor, amax and `rest`, and gives the fake-quantized tensor.
        amax: its second argument.
        rest: its further arguments.
    """

    amax: Tensor

    def __init__(self, name: str, function: Callable[..., Tensor], amax: Tensor, rest: tuple[Any, ...]) -> None:
        super().__init__(name, symmetric=True)
        self.register_buffer("amax", amax)
        self.function, self.rest = function, rest
        self.calibrated = self.fixed = True

    def forward(self, x: Tensor, on_grid: bool = False) -> Tensor:
        """The fake-quantized tensor."""
        return self.function(x, self.amax, *self.rest) if self.enabled and not on_grid else x


class UnchangedWeightQuantizer(WeightQuantizer):
    """Of a weight: arguments as those of `UnchangedQuantizer`."""

    amax: Tensor

    def __init__(self, name: str, function: Callable[..., Tensor], amax: Tensor, rest: tuple[Any, ...]) -> None:
        super().__init__(name, 8, None, 1)
        self.register_buffer("amax", amax)
        self.function, self.rest = function, rest
        self.fixed = True

    def forward(self, weight: Tensor) -> Tensor:
        """The fake-quantized weight."""
        return self.function(weight, self.amax, *self.rest) if self.enabled else weight
