"""Parameters by name pattern: matched, grouped, frozen; and weights replaced by their quantized values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..calib.quantized_weights import quantized_weights
from ..quantizer import TensorQuantizer


def match_parameters(model: nn.Module, patterns: str | Iterable[str]) -> Iterator[nn.Parameter]:
    """The parameters whose name contains a match of any of the patterns, in the order of the model.

    A parameter comes once, however many patterns match; one that is shared goes by all of its names.

    Args:
        model: its parameters are searched by their full names, such as ``layer1.0.conv1.weight``.
        patterns: regular expressions (``re.search``); a string is one pattern.

    Raises:
        TypeError: a pattern that is not a string.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    patterns = list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, (str, re.Pattern)):
            raise TypeError(f"patterns must be strings, got {type(pattern).__name__}")
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen and any(re.search(pattern, name) for pattern in patterns):
            seen.add(id(parameter))
            yield parameter


def group_parameters(
    model: nn.Module,
    patterns_list: Sequence[list[str]],
    lrs: Sequence[float] | None = None,
    momentums: Sequence[float] | None = None,
    weight_decays: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: one per list of patterns, each with the options given for it.

    Args:
        model: where the parameters are searched, see :func:`match_parameters`.
        patterns_list: a list of patterns per group. What no pattern matches is in no group, so it is not trained.
        lrs: a learning rate per group.
        momentums: a momentum per group.
        weight_decays: a weight decay per group.

    Raises:
        TypeError: ``patterns_list`` is not a list of lists; options whose number is not that of the groups.
    """
    if isinstance(patterns_list, str) or not all(isinstance(patterns, list) for patterns in patterns_list):
        raise TypeError(f"patterns_list must be list of list of patterns, got {patterns_list!r}")
    groups: list[dict[str, Any]] = [{"params": list(match_parameters(model, patterns))} for patterns in patterns_list]
    options = {
        "lrs": ("lr", lrs),
        "momentums": ("momentum", momentums),
        "weight_decays": ("weight_decay", weight_decays),
    }
    for argument, (key, values) in options.items():
        if values is None:
            continue
        if len(values) != len(groups):
            raise TypeError(f"{argument} must match patterns_list: {len(values)} values for {len(groups)} groups")
        for group, value in zip(groups, values, strict=True):
            group[key] = value
    return groups


def freeze_parameters(model: nn.Module, patterns: str | Iterable[str]) -> None:
    """Set ``requires_grad = False`` on every parameter that :func:`match_parameters` finds."""
    for parameter in match_parameters(model, patterns):
        parameter.requires_grad_(False)


@torch.no_grad()
def quant_weight_inplace(model: nn.Module) -> None:
    """Overwrite the weights of the quantized layers by their quantized values (quantized and dequantized).

    Raises:
        AttributeError: a module with a weight quantizer but no weight.
        TypeError: a layer whose weight is computed by a parametrization.
        ValueError: a weight quantizer that gives codes (``fake_quant=False``).
    """
    for path, module in model.named_modules():
        found = list(quantized_weights(module))
        if not found and isinstance(getattr(module, "_weight_quantizer", None), TensorQuantizer):
            raise AttributeError(f"{path!r} ({type(module).__name__}) has a weight quantizer but no 'weight'")
        if found and parametrize.is_parametrized(module):
            raise TypeError(
                f"the weight of {path!r} is computed: call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        for _, weights, quantizer in found:
            if not quantizer.fake_quant:
                raise ValueError(f"the weight quantizer of {path!r} gives codes: only fake quantization is supported")
            if len(weights) == 1:
                weights[0].copy_(quantizer(weights[0]))
                continue
            joined = quantizer(torch.cat(weights, 1))
            for weight, values in zip(weights, joined.split([w.shape[1] for w in weights], 1), strict=True):
                weight.copy_(values)
