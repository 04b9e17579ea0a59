"""The float model's values of chosen nodes, batch by batch: a quantized graph is run with its quantizers passing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..affine_quantizer import AffineQuantizer
from ..constant_quantizers import BiasQuantizer, WeightQuantizer
from ..graph.parameters import tensor_at
from ..integer_operations import IntegerOperation
from ..progress import track

Observer = tuple[fx.Node, Callable[[Any], None]]


@torch.no_grad()
def observe_float_values(
    graph_module: fx.GraphModule,
    samples: Sequence[Sequence[Any]],
    observers: Sequence[Observer],
    label: str = "looking at values",
    progress: bool = True,
) -> None:
    """Shows what some nodes compute in float, over all samples.

    One batch is computed at a time, only as far as the observers need it, and a value that nothing needs any more is
    freed: memory does not grow with the number of batches.

    Args:
        graph_module: quantized; its present parameters are used, unquantized.
        samples: per batch the values of the graph's placeholders, in their order.
        observers: a node, and what is called with its value (a tensor, or what else the node gives) for every batch.
        label, progress: of the progress bar.
    """
    run = _FloatRun(graph_module, observers)
    for batch in track(samples, label, len(samples), progress):
        run(batch)


def operation_of(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """What a node computes: its function, the operation that an integer operation simulates, or its module."""
    if node.op != "call_module":
        return node.target
    module = graph_module.get_submodule(str(node.target))
    return module.operation if isinstance(module, IntegerOperation) else module


class _FloatRun:
    def __init__(self, graph_module: fx.GraphModule, observers: Sequence[Observer]) -> None:
        self.graph_module = graph_module
        self.observers: dict[fx.Node, list[Callable[[Any], None]]] = defaultdict(list)
        for node, observer in observers:
            self.observers[node].append(observer)
        nodes: list[fx.Node] = list(graph_module.graph.nodes)
        self.functions = {n: operation_of(graph_module, n) for n in nodes if n.op not in ("placeholder", "output")}
        self.placeholders = [n for n in nodes if n.op == "placeholder"]
        needed = set(self.observers)
        for node in reversed(nodes):
            if node in needed:
                needed.update(self._inputs(node))
        self.nodes = [n for n in nodes if n in needed]
        self.last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            for source in (node, *self._inputs(node)):
                self.last[source] = node

    def __call__(self, batch: Sequence[Any]) -> None:
        values: dict[fx.Node, Any] = dict(zip(self.placeholders, batch, strict=True))
        for node in self.nodes:
            if node not in values:
                values[node] = self._value(node, values)
            for observer in self.observers.get(node, ()):
                observer(values[node])
            for source in (node, *self._inputs(node)):
                if self.last[source] is node:
                    values.pop(source, None)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        """What is needed of a node's inputs: of a quantizer the tensor alone."""
        return node.all_input_nodes[:1] if _passes(self.functions.get(node)) else node.all_input_nodes

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return tensor_at(self.graph_module, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.get)
        function = self.functions[node]
        if node.op == "call_method":
            return getattr(args[0], str(function))(*args[1:], **kwargs)
        return args[0] if _passes(function) else function(*args, **kwargs)


def _passes(function: Any) -> bool:
    return isinstance(function, (AffineQuantizer, WeightQuantizer, BiasQuantizer))
