"""Parameters and buffers of graph modules, by their dotted paths."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, fx, nn

from .names import free_name
from .ops import value_of


def add_parameter(graph_module: fx.GraphModule, name: str, value: Tensor) -> str:
    """Registers a parameter at a dotted path (made where it is missing), and returns the free name that it got."""
    owner, _, leaf = name.rpartition(".")
    module: nn.Module = graph_module
    for part in owner.split(".") if owner else []:
        if not isinstance(getattr(module, part, None), nn.Module):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    free = free_name(leaf, lambda name: hasattr(module, name))
    module.register_parameter(free, nn.Parameter(value.detach().clone(), requires_grad=False))
    return f"{owner}.{free}" if owner else free


def get_attribute(graph_module: fx.GraphModule, name: str, like: fx.Node) -> fx.Node:
    """A `get_attr` node for a parameter, at the graph's insertion point, with the meta data of a node like it."""
    node = graph_module.graph.get_attr(name)
    value = tensor_at(graph_module, name)
    template = value_of(like)
    mode = getattr(template, "fake_mode", None)
    node.meta = {"val": mode.from_tensor(value) if mode is not None else value, "qdq_constant": True}
    return node


def device_of(graph_module: nn.Module) -> torch.device:
    """Where a model's values are: the device of its first parameter or buffer; the CPU where it has none."""
    tensors = itertools.chain(graph_module.parameters(), graph_module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def tensor_at(graph_module: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    owner, _, leaf = path.rpartition(".")
    return getattr(graph_module.get_submodule(owner), leaf).detach()
