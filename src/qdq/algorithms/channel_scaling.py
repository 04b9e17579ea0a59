"""Moves factors from the channels of a producer into the layers that read them, and leaves the function as it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx, nn

from ..graph.parameters import tensor_at
from ..graph.record import record_of
from .layer import Layer
from .layer_channels import channel_counts, input_maxima, times_inputs, times_outputs
from .producers import Connection, Reader


class ChannelScaling:
    """Works on float64 copies of parameters, which `store` rounds once and puts in place.

    Args:
        graph_module: quantized.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self._values: dict[str, Tensor] = {}
        self._layers: dict[str, Layer] = {}
        self._input_factors: dict[str, Tensor] = {}
        self._changed: set[str] = set()

    def value(self, path: str) -> Tensor:
        """A parameter as it is now, float64."""
        return self._values[path] if path in self._values else tensor_at(self.graph_module, path).double()

    def input_factors(self, layer: Layer) -> Tensor:
        """[input channels], float64: what the layer's inputs have been divided by."""
        known = self._input_factors.get(layer.name)
        if known is not None:
            return known
        weight = self.value(layer.weight)
        return weight.new_ones(channel_counts(layer, weight)[0])

    def reader_maxima(self, connection: Connection, reader: Reader) -> Tensor:
        """[channels], float64: the largest magnitude of the reader's weights for each of the producer's channels."""
        values = input_maxima(reader.layer, self.value(reader.layer.weight))
        return reader.maxima(values, connection.producer.channels)

    def divide(self, connection: Connection, factors: Tensor) -> None:
        """Divides the producer's channels, and multiplies the weights that read them.

        Args:
            connection: producer and readers.
            factors: [channels], positive; must be 1 for channels that are not free.
        """
        assert bool((factors > 0).all()) and bool((factors[~connection.free] == 1).all())
        factors = factors.double()
        if bool((factors == 1).all()):
            return
        producer = connection.producer
        if producer.layer is not None:
            weight = self.value(producer.layer.weight)
            self._values[producer.layer.weight] = times_outputs(producer.layer, weight, 1 / factors)
            self._layers[producer.layer.name] = producer.layer
        for path in producer.vectors:
            value = self.value(path)
            self._values[path] = (value.flatten() / factors).reshape(value.shape)
        self._changed |= connection.tensors
        for reader in connection.readers:
            self.times_inputs([reader.layer], reader.expand(factors))

    def times_inputs(self, layers: Sequence[Layer], factors: Tensor, divided: str | None = None) -> None:
        """Multiplies the weights that read input channels, which whoever calls has divided: the tensor of that name."""
        self._changed |= set() if divided is None else {divided}
        for layer in layers:
            self._values[layer.weight] = times_inputs(layer, self.value(layer.weight), factors)
            self._input_factors[layer.name] = self.input_factors(layer) * factors
            self._layers[layer.name] = layer

    def store(self) -> set[str]:
        """Puts the parameters in place and fits the step sizes of the changed weights anew.

        Returns:
            The names of the tensors whose values changed.
        """
        for path, value in self._values.items():
            _replace(self.graph_module, path, value)
        method = weight_method(self.graph_module)
        for layer in self._layers.values():
            layer.quantizer.fit(tensor_at(self.graph_module, layer.weight), method)
        changed = self._changed
        self._values, self._layers, self._changed = {}, {}, set()
        return changed


def weight_method(graph_module: fx.GraphModule) -> str:
    """How step sizes are fitted while factors are looked for: as the recipe says, where it names one way.

    "auto" is the whole range here. The range of least squared error of the weight would cut off the very weights that
    factors have made large because of their inputs; the walk looks at outputs, and may take it afterwards.
    """
    recipe = record_of(graph_module).recipe
    return "max" if recipe is None or recipe.weight_calibration == "auto" else recipe.weight_calibration


def _replace(graph_module: fx.GraphModule, path: str, value: Tensor) -> None:
    """Another tensor at a path: never written in place, as the user's model may hold the old one."""
    owner, _, leaf = path.rpartition(".")
    module, old = graph_module.get_submodule(owner), tensor_at(graph_module, path)
    value = value.to(old.dtype).reshape(old.shape)
    known = module._parameters.get(leaf)
    setattr(module, leaf, value if known is None else nn.Parameter(value, requires_grad=known.requires_grad))
