"""Parts of what ModelOpt changed in a model, one at a time: weights, ranges of activations, their rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def weights_in_float(model: nn.Module) -> Iterator[None]:
    """The quantizers of weights are off; weights keep the factors of SmoothQuant, which inputs are divided by."""
    quantizers = [module.weight_quantizer for module in _layers(model) if module.weight_quantizer.is_enabled]
    for quantizer in quantizers:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enable()


@contextlib.contextmanager
def activations(model: nn.Module, cut_off: bool) -> Iterator[None]:
    """Inputs of layers are not rounded; `cut_off`: limited to the quantizers' ranges all the same."""
    quantizers = [module.input_quantizer for module in _layers(model)]
    for quantizer in quantizers:
        quantizer.forward = _without_rounding(quantizer, cut_off)
    try:
        yield
    finally:
        for quantizer in quantizers:
            del quantizer.forward  # the method of its class is back


@contextlib.contextmanager
def other_signs(model: nn.Module, seed: int) -> Iterator[None]:
    """Every error of rounding of a weight keeps its size and gets a sign by chance."""
    generator = torch.Generator().manual_seed(seed)
    kept = [(module, module.weight.detach().clone()) for module in _layers(model)]
    errors = [module.weight_quantizer(weight) - weight for module, weight in kept]
    with weights_in_float(model):
        try:
            for (module, weight), error in zip(kept, errors, strict=True):
                signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
                module.weight.data = weight + signs * error
            yield
        finally:
            for module, weight in kept:
                module.weight.data = weight


def _layers(model: nn.Module) -> list[Any]:
    found = [module for module in model.modules() if hasattr(module, "weight_quantizer")]
    return [module for module in found if module.weight_quantizer.is_enabled or module.input_quantizer.is_enabled]


def _without_rounding(quantizer: Any, cut_off: bool) -> Any:
    def forward(inputs: torch.Tensor) -> torch.Tensor:
        factors = quantizer.pre_quant_scale
        smooth = inputs if factors is None else inputs * factors
        return smooth.clamp(-quantizer.amax, quantizer.amax) if cut_off else smooth

    return forward
