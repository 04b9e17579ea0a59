"""Which quantizer sees which weights of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def quantized_weights(module: Any) -> Iterator[tuple[str, list[Tensor], Any]]:
    """(name, weights, quantizer) of every weight quantizer of one layer; layers of qdq are known by their attributes.

    Several weights are quantized joined along axis 1, as recurrent layers do with those of the input and of the state.
    A weight may be a view: attention quantizes the three parts of a packed projection apart.
    """
    if hasattr(module, "_out_proj_weight_quantizer"):
        packed = getattr(module, "in_proj_weight", None)
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        for name, weight in zip("qkv", weights if packed is None else packed.chunk(3), strict=True):
            yield f"{name}_proj_weight", [weight], getattr(module, f"_{name}_proj_weight_quantizer")
        yield "out_proj.weight", [module.out_proj.weight], module._out_proj_weight_quantizer
        return
    quantizer = getattr(module, "weight_quantizer", getattr(module, "_weight_quantizer", None))
    if isinstance(module, nn.RNNBase) and isinstance(quantizer, nn.ModuleList):
        for index, (weights, one) in enumerate(zip(module.all_weights, quantizer, strict=True)):
            yield f"weights of cell {index}", list(weights[:2]), one  # pyright: ignore[reportReturnType]
    elif isinstance(module, nn.RNNCellBase) and quantizer is not None:
        yield "weight_ih and weight_hh", [module.weight_ih, module.weight_hh], quantizer
    elif isinstance(quantizer, nn.Module) and isinstance(weight := getattr(module, "weight", None), Tensor):
        yield "weight", [weight], quantizer
