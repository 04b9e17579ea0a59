"""Calibration of a captured, quantized graph: one pass over the data finds the range of every activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from .affine_quantizer import AffineQuantizer
from .batches import Batches
from .constant_quantizers import BiasQuantizer, WeightQuantizer
from .errors import CalibrationError, DataError, QdqError
from .graph.contract import describe_call
from .graph.record import record_of
from .progress import track
from .stand_in import StandIn


def activation_quantizers(graph_module: fx.GraphModule) -> list[AffineQuantizer]:
    """The activation quantizers in the order in which the graph calls them."""
    modules = dict(graph_module.named_modules())
    called = dict.fromkeys(str(n.target) for n in graph_module.graph.nodes if n.op == "call_module")
    return [m for m in (modules[name] for name in called) if isinstance(m, AffineQuantizer)]


def calibrate(
    graph_module: fx.GraphModule,
    run: Callable[[Callable[..., Any]], None] | Batches,
    progress: bool = True,
    model: nn.Module | None = None,
) -> None:
    """Runs the float graph over the data, collects, and sets the range of every activation quantizer.

    Args:
        graph_module: with quantizers inserted; they are set in place.
        run: the batches, or a callable that takes a model and runs it.
        progress: whether a bar is shown.
        model: the user's, whose parameters and attributes a callable sees; None shows those of the graph.

    Raises:
        DataError: no data, data that the graph does not take or fails on (the batch is named), NaN or infinite values
            in the data or (named, the first in the model's order) in a tensor.
        CalibrationError: a quantizer saw no data; all such are named.
    """
    quantizers = activation_quantizers(graph_module)
    for quantizer in quantizers:
        quantizer.start_collecting()
    feed = _Collecting(graph_module if model is None else model, graph_module, quantizers)
    try:
        with torch.no_grad(), constants_in_float(graph_module):
            if isinstance(run, Batches):
                for args, kwargs in track(run, "calibrating", run.total, progress):
                    feed(*args, **kwargs)
            else:
                run(feed)
        if not feed.calls:
            raise DataError("the data function ran the model not once: it must call the model that it is given")
        for quantizer in track(quantizers, "finding ranges", len(quantizers), progress):
            quantizer.finish_collecting()
    finally:
        for quantizer in quantizers:
            quantizer.collector = None
    missing = [q.name for q in quantizers if not q.calibrated]
    if missing:
        raise CalibrationError(
            f"{len(missing)} quantizers saw no data: {', '.join(missing)}; calibrate with data that reach these "
            "parts of "
            "the model"
        )
    fit_biases(graph_module)


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
        weights.fit_bias(_tensor_at(graph_module, bias), _tensor_at(graph_module, input_step))


@contextmanager
def constants_in_float(graph_module: nn.Module) -> Iterator[None]:
    """Within the block, weights and biases pass their quantizers unchanged."""
    changed = [m for m in graph_module.modules() if isinstance(m, (WeightQuantizer, BiasQuantizer)) and m.enabled]
    for module in changed:
        module.enabled = False
    try:
        yield
    finally:
        for module in changed:
            module.enabled = True


class _Collecting(StandIn):
    """What the data run through: checks at its door, the float graph, and a look for NaN behind it."""

    def __init__(self, model: nn.Module, graph_module: fx.GraphModule, quantizers: list[AffineQuantizer]) -> None:
        contract = record_of(graph_module).contract
        super().__init__(model, contract.signature)
        # In a tuple, so that parameters() gives those of the user's model alone.
        self.run = (graph_module, contract, quantizers)
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        graph_module, contract, quantizers = self.run
        try:
            args, kwargs = contract.check(*self.bind(args, kwargs))
        except DataError as error:
            raise DataError(f"batch {self.calls}: {error}") from None
        try:
            out = graph_module(*args, **kwargs)
        except QdqError:
            raise
        except Exception as error:
            given = describe_call((args, kwargs))
            raise DataError(
                f"the model fails on batch {self.calls}, {given}: {type(error).__name__}: {error}"
            ) from error
        self.calls += 1
        for quantizer in quantizers:
            quantizer.check_finite()
        return out


def _tensor_at(graph_module: fx.GraphModule, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    return getattr(graph_module.get_submodule(owner), leaf)
