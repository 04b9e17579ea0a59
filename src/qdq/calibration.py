"""Calibration of a captured, quantized graph: one pass over the data, from which all ranges of activations follow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn

from .affine_quantizer import AffineQuantizer
from .batches import Batches
from .calib.collectors import HistogramCollector
from .calib.statistics import Inputs, SampleKeeper, Statistics
from .constant_quantizers import BiasQuantizer, WeightQuantizer
from .errors import CalibrationError, DataError
from .graph.contract import failing_on
from .graph.elementwise import function_behind
from .graph.names import original_name
from .graph.parameters import tensor_at
from .graph.record import record_of
from .integer_operations import IntegerOperation
from .modes import plain_modes
from .passing import passing
from .progress import track
from .stand_in import StandIn

logger = logging.getLogger(__name__)


def activation_quantizers(graph_module: fx.GraphModule) -> list[AffineQuantizer]:
    """The activation quantizers in the order in which the graph calls them."""
    modules = dict(graph_module.named_modules())
    called = dict.fromkeys(str(n.target) for n in graph_module.graph.nodes if n.op == "call_module")
    return [m for m in (modules[name] for name in called) if isinstance(m, AffineQuantizer)]


def collect(
    graph_module: fx.GraphModule,
    run: Callable[[Callable[..., Any]], None] | Batches,
    progress: bool = True,
    model: nn.Module | None = None,
) -> Statistics:
    """Runs the float graph over the data once, and keeps the histogram of every quantized tensor and some inputs.

    Args:
        graph_module: with quantizers inserted; it is not changed.
        run: the batches, or a callable that takes a model and runs it.
        progress: whether a bar is shown.
        model: the user's, whose parameters and attributes a callable sees; None shows those of the graph.

    Raises:
        DataError: no data, data that the graph does not take or fails on (the batch is named), NaN or infinite values
            in the data or (named, the first in the model's order) in a tensor.
    """
    interpreter = _Histograms(graph_module)
    feed = _Collecting(graph_module if model is None else model, graph_module, interpreter)
    with torch.no_grad(), constants_in_float(graph_module):
        if isinstance(run, Batches):
            for args, kwargs in track(run, "calibrating", run.total, progress):
                feed(*args, **kwargs)
        else:
            run(feed)
    if not feed.calls:
        raise DataError("the data function ran the model not once: it must call the model that it is given")
    return Statistics(interpreter.histograms, feed.keeper.samples())


def collect_again(
    graph_module: fx.GraphModule, statistics: Statistics, tensors: Collection[str], progress: bool = True
) -> Statistics:
    """The statistics with the histograms of these tensors collected (anew) from the inputs that were kept."""
    interpreter = _Histograms(graph_module, tensors)
    contract = record_of(graph_module).contract
    with torch.no_grad(), constants_in_float(graph_module):
        for inputs in track(statistics.samples, "calibrating again", len(statistics.samples), progress):
            interpreter.run(*contract.flatten(inputs))
    return Statistics({**statistics.histograms, **interpreter.histograms}, statistics.samples, statistics.model)


def find_ranges(graph_module: fx.GraphModule, statistics: Statistics, progress: bool = True) -> Statistics:
    """Sets the range of every activation quantizer from the statistics, in place.

    Returns:
        The statistics, with histograms of tensors that they did not know (another recipe quantizes others): those are
        collected from the inputs kept.

    Raises:
        CalibrationError: a quantizer saw no data; all such are named.
    """
    quantizers = activation_quantizers(graph_module)
    unknown = [t for tensors in quantized_tensors(graph_module).values() for t in tensors]
    unknown = [tensor for tensor in unknown if tensor not in statistics.histograms]
    if unknown and statistics.samples:
        logger.info("%d tensors are not in the statistics, and are collected from the inputs kept", len(unknown))
        statistics = collect_again(graph_module, statistics, unknown, progress)
    functions = functions_behind(graph_module)
    for quantizer in track(quantizers, "finding ranges", len(quantizers), progress):
        histogram = histogram_of(graph_module, quantizer, statistics)
        if not quantizer.fixed:
            quantizer.find_range(histogram, through=functions.get(quantizer.name))
    missing = [q.name for q in quantizers if not q.calibrated]
    if missing:
        raise CalibrationError(
            f"{len(missing)} quantizers saw no data: {', '.join(missing)}; calibrate with data that reach these "
            "parts of the model"
        )
    fit_biases(graph_module)
    return statistics


def functions_behind(graph_module: fx.GraphModule) -> dict[str, Callable[[Tensor], Tensor]]:
    """Path of an activation quantizer of one tensor -> the elementwise function of it that is read in its place."""
    calls: dict[str, list[fx.Node]] = {}
    modules = dict(graph_module.named_modules())
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], AffineQuantizer):
            calls.setdefault(str(node.target), []).append(node)
    found = {name: function_behind(graph_module, nodes[0]) for name, nodes in calls.items() if len(nodes) == 1}
    return {name: function for name, function in found.items() if function is not None}


def quantized_tensors(graph_module: fx.GraphModule) -> dict[str, list[str]]:
    """Path of each activation quantizer -> the names of the graph's tensors that it quantizes.

    Such names depend on the model alone, while those of quantizers depend on what a recipe leaves in float.
    """
    found: dict[str, list[str]] = {}
    modules = dict(graph_module.named_modules())
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], AffineQuantizer):
            tensors = found.setdefault(str(node.target), [])
            if not node.kwargs.get("on_grid"):
                tensors.append(original_name(node.all_input_nodes[0]))
    return found


def histogram_of(
    graph_module: fx.GraphModule, quantizer: AffineQuantizer, statistics: Statistics
) -> HistogramCollector:
    """The histogram of all that a quantizer quantizes; empty where the statistics do not know its tensors."""
    total = HistogramCollector()
    for tensor in quantized_tensors(graph_module)[quantizer.name]:
        if tensor in statistics.histograms:
            total.merge(statistics.histograms[tensor])
    return total


def fit_biases(graph_module: fx.GraphModule) -> None:
    """Enlarges the weight steps of channels whose bias would overflow int32."""
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        if not isinstance(graph_module.get_submodule(str(node.target)), BiasQuantizer):
            continue
        bias, input_step, weight_step = (str(a.target) for a in node.args)
        weights = graph_module.get_submodule(weight_step.rpartition(".")[0])
        assert isinstance(weights, WeightQuantizer)
        weights.fit_bias(tensor_at(graph_module, bias), tensor_at(graph_module, input_step))


def constants_in_float(graph_module: nn.Module) -> AbstractContextManager[None]:
    """Within the block, weights and biases pass their quantizers unchanged."""
    return passing(graph_module, (WeightQuantizer, BiasQuantizer))


class _Histograms(fx.Interpreter):
    """Runs the graph in float, and collects every tensor that is quantized in it, or these of them.

    Attributes:
        histograms: by the name of the tensor.
    """

    def __init__(self, graph_module: fx.GraphModule, tensors: Collection[str] | None = None) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        if tensors is None:
            tensors = [t for names in quantized_tensors(graph_module).values() for t in names]
        self.histograms = {tensor: HistogramCollector() for tensor in tensors}
        self._called: dict[str, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The float result of a node."""
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, AffineQuantizer):
            (x,), _ = self.fetch_args_kwargs_from_env(n)
            if not n.kwargs.get("on_grid"):
                tensor = original_name(n.all_input_nodes[0])
                if tensor in self.histograms:
                    self.histograms[tensor].collect(x)
                self._called.setdefault(tensor, module.name)
            return x
        if isinstance(module, IntegerOperation):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return module.operation(*args, **kwargs)
        return super().run_node(n)

    def check_finite(self) -> None:
        """Raises:
        DataError: a tensor held NaN or an infinite value; the first in the order of the model is named.
        """
        for tensor, histogram in self.histograms.items():
            if histogram.nonfinite:
                raise DataError(
                    f"{histogram.nonfinite} NaN or infinite values in the tensor of quantizer "
                    f"{self._called[tensor]!r}, the first in the order of the model: look at the data and at the "
                    "operation before it"
                )


class _Collecting(StandIn):
    """What the data run through: checks at its door, the float graph, and a look for NaN behind it."""

    def __init__(self, model: nn.Module, graph_module: fx.GraphModule, interpreter: _Histograms) -> None:
        contract = record_of(graph_module).contract
        super().__init__(model, contract.signature)
        # In a tuple, so that parameters() gives those of the user's model alone.
        self.run = (interpreter, contract)
        self.keeper = SampleKeeper(divisible=contract.divisible)
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        interpreter, contract = self.run
        try:
            inputs: Inputs = contract.check(*self.bind(args, kwargs))
        except DataError as error:
            raise DataError(f"batch {self.calls}: {error}") from None
        # The data function may have switched on autocast.
        with plain_modes(), failing_on(self.calls, inputs):
            out = interpreter.run(*contract.flatten(inputs))
        self.calls += 1
        interpreter.check_finite()
        self.keeper.add(inputs)
        return out
