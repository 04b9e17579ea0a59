"""Producers and their readers: tensors whose channels may be divided by factors that the layers behind take back.

A producer is a layer, or the weight and bias of a normalization. What it computes may go through operations that pass
a factor per channel (`channel_labels`) on its way to the layers that read it. A channel that reaches anything else (a
residual addition, an output of the model, a softmax) is not free: its factor must stay 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..affine_quantizer import AffineQuantizer
from ..graph.names import original_name
from ..graph.ops import clip_bounds
from ..graph.parameters import tensor_at
from ..graph.record import record_of
from .channel_labels import OTHER, along, pass_labels
from .float_values import observe_float_values, operation_of
from .layer import Layer, layers_of
from .layer_channels import channel_counts, channel_dim

aten = torch.ops.aten

_CLIPS = {aten.hardtanh.default, aten.relu6.default, aten.clamp.default, aten.clamp_min.default}
# Position of the weight (the bias follows it, if there is one), and the dimension of the channels; None: the last.
_NORMS = {
    aten.layer_norm.default: (2, None),
    aten.rms_norm.default: (2, None),
    aten.group_norm.default: (2, 1),
    aten.batch_norm.default: (1, 1),
    aten._native_batch_norm_legit_no_training.default: (1, 1),
}


@dataclass(frozen=True)
class Producer:
    """What computes the channels.

    Attributes:
        name: path of its weight in the model.
        output: the node whose channels they are.
        dim: of `output`, the channels; counted from the end.
        channels: their number.
        layer: None where it is a normalization.
        vectors: paths of parameters with one value per channel: the layer's bias, the normalization's weight and bias.
    """

    name: str
    output: fx.Node
    dim: int
    channels: int
    layer: Layer | None
    vectors: tuple[str, ...]


@dataclass(frozen=True)
class Reader:
    """A layer that reads channels of a producer.

    Attributes:
        source: the node that it reads.
        layer: the layer.
        dim: of the source, the layer's input channels; counted from the end.
        channels: int64 [input channels], of each the producer's channel, `OTHER` where it comes from elsewhere.
    """

    source: fx.Node
    layer: Layer
    dim: int
    channels: Tensor

    def expand(self, factors: Tensor) -> Tensor:
        """[input channels]: the factors of the producer's channels, 1 for what comes from elsewhere."""
        return torch.where(self.channels == OTHER, 1.0, factors[self.channels.clamp(min=0)])

    def maxima(self, values: Tensor, channels: int) -> Tensor:
        """[channels]: of one value per input channel the largest for each of the producer's channels, at least 0."""
        own = self.channels != OTHER
        zeros = values.new_zeros(channels)
        return zeros.scatter_reduce(0, self.channels[own], values[own], "amax")


@dataclass(frozen=True)
class Clip:
    """A clip with bounds other than zero that channels go through on their way.

    Attributes:
        source: the node that it clips.
        low, high: the bounds.
        dim, channels: as those of a reader.
    """

    source: fx.Node
    low: float
    high: float
    dim: int
    channels: Tensor


@dataclass(frozen=True)
class Connection:
    """A producer and all that reads its free channels.

    Attributes:
        producer: what computes the channels.
        readers: the layers that read them, in the order of the graph.
        clips: on the way.
        free: bool [channels], those that layers alone read.
        tensors: the names of all that holds the channels, from the producer to the readers.
    """

    producer: Producer
    readers: tuple[Reader, ...]
    clips: tuple[Clip, ...]
    free: Tensor
    tensors: frozenset[str]


def find_connections(graph_module: fx.GraphModule, samples: Sequence[Sequence[Any]]) -> list[Connection]:
    """The connections of a quantized graph, in the order of their producers.

    Args:
        graph_module: quantized.
        samples: of which the first batch is run, for the sizes of the tensors: two samples of it, where it may be
            split.
    """
    finder = _Finder(graph_module, _sizes(graph_module, _few(graph_module, samples)))
    found = (finder.follow(producer) for producer in finder.producers())
    return [c for c in found if c.readers and bool(c.free.any())]


def _sizes(graph_module: fx.GraphModule, samples: Sequence[Sequence[Any]]) -> dict[fx.Node, Any]:
    sizes: dict[fx.Node, Any] = {}

    def size_of(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [size_of(v) for v in value]
        return value.shape if isinstance(value, Tensor) else value

    nodes = [n for n in graph_module.graph.nodes if n.op not in ("get_attr", "output")]
    nodes = [n for n in nodes if not (n.op == "call_module" and n.all_input_nodes[0].op == "get_attr")]
    observe_float_values(
        graph_module,
        samples,
        [(node, lambda value, node=node: sizes.__setitem__(node, size_of(value))) for node in nodes],
        progress=False,
    )
    return sizes


def _few(graph_module: fx.GraphModule, samples: Sequence[Sequence[Any]]) -> list[list[Any]]:
    divisible = record_of(graph_module).contract.divisible
    return [[x[:2] if divisible and isinstance(x, Tensor) else x for x in batch] for batch in samples[:1]]


class _Finder:
    def __init__(self, graph_module: fx.GraphModule, sizes: dict[fx.Node, Any]) -> None:
        self.graph_module, self.sizes = graph_module, sizes
        self.nodes = [n for n in graph_module.graph.nodes if n in sizes or n.op == "output"]
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.operations = {n: operation_of(graph_module, n) for n in self.nodes if n.op.startswith("call")}
        readings: Counter[int] = Counter()
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                readings[self._storage(str(node.target))] += len(node.users)
        self.readings = readings
        # The same tensor may be a parameter of several paths.
        self.layers = {
            node: layer
            for node, layer in layers_of(graph_module).items()
            if all(self._is_own(path) for path in (layer.weight, layer.bias) if path is not None)
        }

    def producers(self) -> list[Producer]:
        found = [self._producer(node) for node in self.nodes]
        return [p for p in found if p is not None]

    def follow(self, producer: Producer) -> Connection:
        size = self.sizes[producer.output]
        shape = [-1 if d == len(size) + producer.dim else 1 for d in range(len(size))]
        device = tensor_at(self.graph_module, producer.name).device
        channels = torch.arange(producer.channels, device=device)
        labels: dict[fx.Node, Any] = {producer.output: channels.reshape(shape).expand(size)}
        free = torch.ones(producer.channels, dtype=torch.bool, device=device)
        readers: list[Reader] = []
        clips: list[Clip] = []
        for node in self.nodes[self.order[producer.output] + 1 :]:
            given = [n for n in node.all_input_nodes if n in labels]
            if not given or self.operations.get(node) is aten.sym_size.int:
                continue
            reader = self._reader(node, given, labels)
            clip = self._clip(node, labels)
            passed = None
            if reader is not None:
                readers.append(reader)
            elif clip is not None:
                clips += [clip] if clip.dim else []
                labels[node] = labels[given[0]]
            elif (passed := self._passed(node, labels)) is not None:
                labels[node] = passed
            else:
                for source in given:
                    _withdraw(free, labels[source])
        return Connection(producer, tuple(readers), tuple(clips), free, frozenset(map(original_name, labels)))

    def _passed(self, node: fx.Node, labels: dict[fx.Node, Any]) -> Any:
        operation = self.operations.get(node)
        if isinstance(operation, AffineQuantizer):
            # A range that the user has set speaks of the values as they are.
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return None if operation.fixed else labels[source]
        return pass_labels(node, operation, labels, self._value)

    def _value(self, node: fx.Node) -> Any:
        return tensor_at(self.graph_module, str(node.target)).shape if node.op == "get_attr" else self.sizes[node]

    def _reader(self, node: fx.Node, given: list[fx.Node], labels: dict[fx.Node, Any]) -> Reader | None:
        layer = self.layers.get(node)
        source = node.args[0] if node.args else None
        if layer is None or given != [source] or not isinstance(labels[given[0]], Tensor):
            return None
        dim = channel_dim(tensor_at(self.graph_module, layer.weight))
        channels = along(labels[given[0]], dim)
        return None if channels is None else Reader(given[0], layer, dim, channels)

    def _clip(self, node: fx.Node, labels: dict[fx.Node, Any]) -> Clip | None:
        """With dim 0 where its bounds are zero or infinite, and every factor passes."""
        if self.operations.get(node) not in _CLIPS or len(node.all_input_nodes) != 1:
            return None
        source = node.all_input_nodes[0]
        low, high = clip_bounds(node)
        if low > 0 or high < 0:
            return None
        bounded = [b for b in (low, high) if b not in (0.0, float("inf"), -float("inf"))]
        if not bounded:
            return Clip(source, low, high, 0, torch.empty(0))
        for dim in range(-labels[source].dim(), 0):
            channels = along(labels[source], dim)
            if channels is not None and labels[source].shape[dim] > 1:
                return Clip(source, low, high, dim, channels)
        return None

    def _producer(self, node: fx.Node) -> Producer | None:
        layer = self.layers.get(node)
        if layer is not None:
            weight = tensor_at(self.graph_module, layer.weight)
            vectors = () if layer.bias is None else (layer.bias,)
            return Producer(layer.name, node, channel_dim(weight), channel_counts(layer, weight)[1], layer, vectors)
        operation = self.operations.get(node)
        if operation in _NORMS:
            return self._norm(node, *_NORMS[operation])
        return self._product(node) if operation is aten.mul.Tensor else None

    def _norm(self, node: fx.Node, position: int, dim: int | None) -> Producer | None:
        vectors = []
        for operand in node.args[position : position + 2]:
            if isinstance(operand, fx.Node):
                path = self._vector(operand)
                if path is None:
                    return None
                vectors.append(path)
        if not vectors or not isinstance(node.args[position], fx.Node):
            return None
        if node.target is aten._native_batch_norm_legit_no_training.default:
            parts = [u for u in node.users if u.args[1:] == (0,)]
            if len(parts) != 1 or len(node.users) != 1:
                return None
            node = parts[0]
        counts = {tensor_at(self.graph_module, path).shape for path in vectors}
        size = self.sizes[node]
        place = -1 if dim is None else dim - len(size)
        if counts != {torch.Size([size[place]])}:
            return None
        return Producer(vectors[0], node, place, size[place], None, tuple(vectors))

    def _product(self, node: fx.Node) -> Producer | None:
        """A tensor times a parameter with one value per channel, and the parameter that is added to it."""
        paths = [self._vector(a) for a in node.args[:2] if isinstance(a, fx.Node) and a.op == "get_attr"]
        if len(paths) != 1 or paths[0] is None or len(node.all_input_nodes) != 2:
            return None
        dim = _only_dim(tensor_at(self.graph_module, paths[0]))
        if dim is None:
            return None
        vectors = [paths[0]]
        following = next(iter(node.users)) if len(node.users) == 1 else None
        if following is not None and following.target is aten.add.Tensor and not following.kwargs:
            shifts = [self._vector(a) for a in following.all_input_nodes if a.op == "get_attr"]
            if len(shifts) == 1 and shifts[0] is not None and len(following.all_input_nodes) == 2:
                shift = tensor_at(self.graph_module, shifts[0])
                if _only_dim(shift) == dim and shift.numel() == tensor_at(self.graph_module, paths[0]).numel():
                    vectors.append(shifts[0])
                    node = following
        return Producer(paths[0], node, dim, self.sizes[node][dim], None, tuple(vectors))

    def _vector(self, node: fx.Node) -> str | None:
        path = str(node.target)
        return path if node.op == "get_attr" and self._is_own(path) else None

    def _is_own(self, path: str) -> bool:
        """Whether one operation alone reads a parameter."""
        return self.readings[self._storage(path)] == 1

    def _storage(self, path: str) -> int:
        return tensor_at(self.graph_module, path).untyped_storage().data_ptr()


def _only_dim(value: Tensor) -> int | None:
    """The one dimension with more than one value, counted from the end."""
    dims = [d - value.dim() for d, n in enumerate(value.shape) if n > 1]
    return dims[0] if len(dims) == 1 and value.is_floating_point() else None


def _withdraw(free: Tensor, labels: Any) -> None:
    """Channels that something else than layers reads are not free."""
    for part in labels if isinstance(labels, (list, tuple)) else (labels,):
        # Along expanded dimensions all labels are the same: one is enough.
        found = torch.unique(part[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in part.stride())])
        free[found[found != OTHER]] = False
