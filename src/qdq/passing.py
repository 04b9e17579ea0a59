"""Quantizers that let what they are given pass, for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def passing(graph_module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[None]:
    """Within the block, quantizers of these kinds that are on pass their inputs unchanged.

    Args:
        graph_module: whose quantizers.
        kinds: classes with an attribute `enabled`.
    """
    changed = [m for m in graph_module.modules() if isinstance(m, kinds) and m.enabled]
    for module in changed:
        module.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in changed:
            module.enabled = True  # type: ignore[assignment]
