"""Which quantizer sees which weights of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# Name, the weights that are quantized joined along axis 1 (mostly one), and their quantizer.
QuantizedWeight = tuple[str, list[Tensor], Any]


def quantized_weights(module: nn.Module) -> Iterator[QuantizedWeight]:
    """The quantized weights of one layer: what its method `quantized_weights` says, or `weight` and `weight_quantizer`.

    The layers of `qdq.nn` have the method; other modules may, where the two attributes do not say it all. A weight may
    be a view: attention quantizes the three parts of a packed projection apart.
    """
    if callable(getattr(type(module), "quantized_weights", None)):
        yield from module.quantized_weights()  # pyright: ignore[reportCallIssue]
        return
    quantizer = getattr(module, "weight_quantizer", getattr(module, "_weight_quantizer", None))
    weight = getattr(module, "weight", None)
    if isinstance(quantizer, nn.Module) and isinstance(weight, Tensor):
        yield "weight", [weight], quantizer
