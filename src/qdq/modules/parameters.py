"""Which parameter of a model each parameter of its captured graph is, or which part of one, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from ..errors import QdqError
from ..graph.fold import evaluate
from ..graph.ops import WEIGHTED, is_constant, kind_of
from ..graph.parameters import add_parameter, get_attribute, tensor_at
from ..kernels.operations import FAKE_TENSOR_QUANT, SCALED_E4M3

QUANTIZE = (FAKE_TENSOR_QUANT, SCALED_E4M3)


class ModuleParameters:
    """Parameters and buffers of a graph that was captured from a model.

    Weights and biases that are parts of a parameter (attention packs those of three projections into one) become
    parameters of the graph.

    Args:
        model: the user's.
        graph_module: captured from it, not folded yet; changed in place.
    """

    def __init__(self, model: nn.Module, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self._tensors: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
        self._tensors.update(model.named_parameters(remove_duplicate=False))
        self._readings: dict[str, int] = {}
        # Path of a part -> path of the whole, and the place of every value of the part in it.
        self._parts: dict[str, tuple[str, Tensor]] = {}
        self._separate()

    def is_writable(self, path: str) -> bool:
        """Whether a parameter of the graph is one of the model, or a part of one, that nothing else reads."""
        return path in self._readings and self._readings[path] == 1

    def count_readings(self) -> None:
        """Looks at who reads what; for the graph as it is when `is_writable` is asked."""
        own: Counter[object] = Counter()
        keys: dict[str, object] = {}
        taken: dict[str, Tensor] = {}
        overlapping: set[str] = set()
        for node in self.graph_module.graph.nodes:
            path = str(node.target)
            if node.op != "get_attr":
                continue
            if path in self._parts:
                whole, places = self._parts[path]
                seen = taken.setdefault(whole, torch.zeros(self._tensors[whole].numel(), dtype=torch.int64))
                seen[places.flatten().cpu()] += 1
                keys[path] = path
            elif path in self._tensors:
                tensor = self._tensors[path]
                keys[path] = tensor.untyped_storage().data_ptr() if tensor.numel() else path
            else:
                continue
            own[keys[path]] += len(node.users)
        read = {keys[p] for p in keys if p not in self._parts}
        for whole, seen in taken.items():
            if bool((seen > 1).any()) or self._tensors[whole].untyped_storage().data_ptr() in read:
                overlapping.add(whole)
        self._readings = {
            path: 2 if path in self._parts and self._parts[path][0] in overlapping else own[key]
            for path, key in keys.items()
        }

    def destinations(self, changed: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Tensors of the model, and the values that they are to get.

        Args:
            changed: path in the graph -> new value.

        Raises:
            QdqError: a value that is not finite, or of a path that the model does not have.
        """
        wholes: dict[str, Tensor] = {}
        for path, value in changed.items():
            if not bool(torch.isfinite(value).all()):
                raise QdqError(f"an algorithm gave {path!r} NaN or infinite values; the model is as it was")
            whole, places = self._parts.get(path, (path, None))
            if whole not in self._tensors:
                raise QdqError(
                    f"an algorithm changed {path!r}, which the model computes from other parameters, so that it cannot "
                    "be written back; the model is as it was: replace the expression by a parameter first"
                )
            present = self._tensors[whole]
            new = wholes.setdefault(whole, present.detach().clone(memory_format=torch.contiguous_format))
            if places is None:
                new.copy_(value.reshape(present.shape))
            else:
                new.view(-1)[places.flatten()] = value.to(new.dtype).flatten()
        return [(self._tensors[whole], value) for whole, value in wholes.items()]

    def _separate(self) -> None:
        graph = self.graph_module.graph
        for node in list(graph.nodes):
            position = 0 if node.target in QUANTIZE else 2 if kind_of(node) in WEIGHTED and len(node.args) > 2 else None
            operand = None if position is None else node.args[position]
            if not isinstance(operand, fx.Node) or operand.op == "get_attr" or not is_constant(operand):
                continue
            found = self._part(operand)
            if found is None:
                continue
            leaf, places = found
            path = add_parameter(self.graph_module, f"{leaf.target}_part", evaluate(self.graph_module, operand))
            self._parts[path] = str(leaf.target), places
            with graph.inserting_before(node):
                attribute = get_attribute(self.graph_module, path, leaf)
            assert position is not None
            node.update_arg(position, attribute)
        graph.eliminate_dead_code()

    def _part(self, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
        """The parameter that an expression takes values from, and their places; None where it computes something."""
        leaves = _leaves(node)
        if len(leaves) != 1 or str(leaves[0].target) not in self._tensors:
            return None
        (leaf,) = leaves
        whole = tensor_at(self.graph_module, str(leaf.target))
        known = {leaf: torch.arange(whole.numel(), device=whole.device).reshape(whole.shape)}
        try:
            places = _run(node, known)
        except Exception:  # an operation that takes no integers moves no values
            return None
        value = evaluate(self.graph_module, node)
        moved = isinstance(places, Tensor) and places.dtype == torch.int64 and places.shape == value.shape
        if not moved or places.unique().numel() != places.numel() or int(places.max()) >= whole.numel():
            return None
        return (leaf, places) if torch.equal(whole.flatten()[places], value) else None


def _leaves(node: fx.Node) -> list[fx.Node]:
    if node.op == "get_attr":
        return [node]
    return list(dict.fromkeys(leaf for source in node.all_input_nodes for leaf in _leaves(source)))


def _run(node: fx.Node, known: dict[fx.Node, Tensor]) -> Tensor:
    if node in known:
        return known[node]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _run(n, known))
    return node.target(*args, **kwargs)  # type: ignore[operator]
