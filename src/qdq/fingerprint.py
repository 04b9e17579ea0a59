"""What tells one float model, or tensor, from another: a digest of its parameters, buffers and modules."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import Tensor, nn

# Addresses, sets (whose order changes from process to process) and devices.
_PASSING = re.compile(r"0x[0-9a-fA-F]+|[{]|\b(cpu|cuda|mps|xpu|meta)\b")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's modules (names, classes, printed settings), parameters and buffers (names, dtypes, values).

    Settings are what `extra_repr` prints: a stride, a slope. What it prints otherwise in another process or on another
    device is left out. Buffers that are not saved with the model are left out: some grow while a model runs. Tensors
    without values (on the meta device, or not initialized yet) count by their names. As hexadecimal text.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__}({_settings(module)});".encode())
    saved = model.state_dict().keys()
    tensors = [*model.named_parameters(), *(item for item in model.named_buffers() if item[0] in saved)]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            digest.update(f"{name};".encode())
            continue
        _add(digest, name, tensor)
    return digest.hexdigest()


def fingerprint_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values, as hexadecimal text."""
    digest = hashlib.sha256()
    _add(digest, "", tensor)
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    values = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    digest.update(values.view(torch.uint8).numpy())


def _settings(module: nn.Module) -> str:
    """What a module prints of itself, where it does not depend on the process or the device."""
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        return ""  # they print their parameters, with the device
    try:
        told = str(module.extra_repr())
    except Exception:  # of the user's own code, which prints for people
        return ""
    return "" if _PASSING.search(told) else told
