"""Modes of PyTorch that a caller may have switched on, and that would change what is computed here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch.utils import _pytree as pytree

T = TypeVar("T")


@contextmanager
def plain_modes() -> Iterator[None]:
    """Within the block there is neither autocast nor inference mode.

    Autocast would put casts into captured graphs, and find ranges from bfloat16; what is computed in inference mode
    cannot be trained.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            # To leave inference mode switches gradients on.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


def out_of_inference(tree: T) -> T:
    """The same values, with copies in place of tensors that were made in inference mode: those take no gradient."""
    return pytree.tree_map_only(torch.Tensor, lambda x: x.clone() if x.is_inference() else x, tree)
