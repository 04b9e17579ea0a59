"""Names in a graph module: those of tensors, and free ones for what is added to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

# In the meta of a module that replaced an operation: the name of that node, by which recipes may speak of it.
ORIGINAL_NAME = "qdq_original_name"


def original_name(node: fx.Node) -> str:
    """The name of a tensor in the captured graph, before operations were replaced by modules that simulate them."""
    return str(node.meta.get(ORIGINAL_NAME, node.name))


def free_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """The name, or where it is taken the first of `name_1`, `name_2` ... that is not."""
    free, count = name, 1
    while is_taken(free):
        free, count = f"{name}_{count}", count + 1
    return free


def has_path(module: nn.Module, path: str) -> bool:
    """Whether a module has an attribute at a dotted path."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return False
    return True
