"""MODEL on the command line: ``package.module:factory``, ``file.py:factory`` or a ``.pt2`` file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qdq._cli.errors import UsageError
from qdq._cli.factories import call, is_factory_spec, load_callable
from qdq._cli.pt2 import load_pt2

if TYPE_CHECKING:
    import torch


def load_model(spec: str) -> torch.nn.Module:
    """The model that ``spec`` names. A factory is called without arguments and must return an ``nn.Module``.

    Raises:
        UsageError: the spec is malformed, names nothing, or what it names is not a model.
        CommandError: the factory or PyTorch's loader failed.
    """
    from torch import nn

    if not is_factory_spec(spec):
        path = Path(spec)
        if path.suffix == ".pt2":
            return load_pt2(path)
        if path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".safetensors"):
            raise UsageError(
                f"MODEL {spec!r} holds weights (or a pickle), not a model. Write a function that builds the model and "
                "loads them with torch.load(..., weights_only=True), and give file.py:function"
            )
        raise UsageError(f"MODEL {spec!r} is neither package.module:factory, file.py:factory nor a .pt2 file")
    factory = load_callable(spec, argument="MODEL")
    if isinstance(factory, nn.Module):
        return factory
    model = call(factory, spec, argument="MODEL")
    if not isinstance(model, nn.Module):
        raise UsageError(f"MODEL {spec!r} returned a {type(model).__name__}, not a torch.nn.Module")
    return model
