"""What tells one float model from another: a digest of its parameters, buffers and modules."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's modules (names and classes) and of its parameters and buffers (names, dtypes, values).

    Buffers that are not saved with the model are left out: some grow while a model runs. Tensors without values (on the
    meta device, or not initialized yet) count by their names. As hexadecimal text.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__};".encode())
    saved = model.state_dict().keys()
    tensors = [*model.named_parameters(), *(item for item in model.named_buffers() if item[0] in saved)]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            digest.update(f"{name};".encode())
            continue
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()
