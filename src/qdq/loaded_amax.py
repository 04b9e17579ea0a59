"""amax in a state dict: what is refused, and the one warning about quantizers that were never calibrated."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from .quantizer_settings import QuantizerSettings


def check_loaded_amax(quantizer: nn.Module, value: Tensor, prefix: str) -> None:
    """Look at the amax that ``quantizer`` is about to load.

    NaN marks *never calibrated* and is accepted, with one warning for each ``load_state_dict`` of a model: it names all
    the quantizers.

    Args:
        quantizer: the module that loads.
        value: its amax in the state dict.
        prefix: of its keys in the state dict, with a dot at the end.

    Raises:
        ValueError: a negative or infinite amax.
    """
    if value.device.type == "meta":
        return
    name = _name(prefix, quantizer)
    if bool(torch.isinf(value).any()) or bool((value < 0).any()):
        raise ValueError(f"the state dict holds a negative or infinite amax for the quantizer {name!r}")
    if not bool(torch.isnan(value).any()):
        return
    names, level = [name], 2
    # PyTorch loads module by module and tells none of them when the last is done: look at the call that began it.
    frame, depth = _load_state_dict_frame()
    model, state_dict = (None, None) if frame is None else map(frame.f_locals.get, ("self", "state_dict"))
    if isinstance(model, nn.Module) and isinstance(state_dict, Mapping):
        found = _quantizers_with_nan(model, state_dict)
        # A hook may have given this quantizer a key of another name: then it speaks for itself.
        names, level = found if name in found else names, depth + 1
    if name == names[0]:
        warnings.warn(
            "the state dict holds NaN as amax of quantizers that were never calibrated, so their outputs will be NaN: "
            f"{', '.join(names)}",
            stacklevel=level,
        )


def _name(prefix: str, quantizer: nn.Module) -> str:
    return prefix.removesuffix(".") or type(quantizer).__name__


def _load_state_dict_frame() -> tuple[FrameType | None, int]:
    """The running call of ``nn.Module.load_state_dict`` and its depth, counted from the function that asks."""
    frame, depth = sys._getframe(1), 1
    while frame is not None and frame.f_code is not nn.Module.load_state_dict.__code__:
        frame, depth = frame.f_back, depth + 1
    return frame, depth


def _quantizers_with_nan(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    names = []
    for key, module in model.named_modules():
        prefix = f"{key}." if key else ""
        value = state_dict.get(f"{prefix}_amax")
        if not isinstance(module, QuantizerSettings) or not isinstance(value, Tensor) or value.is_meta:
            continue
        if bool(torch.isnan(value).any()):
            names.append(_name(prefix, module))
    return names
