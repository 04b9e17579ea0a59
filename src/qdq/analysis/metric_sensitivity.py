"""Each quantizer alone on and alone off, by a metric of the user's: the whole model is run for each."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..batches import Inputs
from ..errors import QdqError
from ..graph.contract import InputContract
from ..graph.record import record_of
from ..progress import track
from ..stand_in import StandIn
from .output_sensitivity import difference, entry_of, samples_of
from .partial_run import PartialRun
from .quantizer_switches import QuantizerSwitches
from .quantizer_trials import elements_of, trials_of
from .sensitivity import Sensitivity, in_order

Metric = Callable[[nn.Module], float]


@torch.no_grad()
def metric_sensitivity(
    graph_module: fx.GraphModule,
    metric: Metric,
    example: Inputs,
    kinds: Collection[str],
    bits: Sequence[int] = (),
    float_model: nn.Module | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Runs the metric on the float model, on the quantized one, and on each with one quantizer switched.

    That is twice in all, twice per quantizer, and twice per quantizer and number of other bits.

    Args:
        graph_module: what `qdq.quantize` returned; it is not changed.
        metric: takes a model, which is called as the user's own is, and gives a number: the larger the better.
        example: one batch, as the graph takes it, to tell sizes by.
        kinds, bits, progress: as of `OutputSensitivity`.
        float_model: what the metric in float is taken of; None takes the graph with its quantizers off.

    Raises:
        DataError: the graph does not take the example.
        QdqError: the metric gives no number.
    """
    contract = record_of(graph_module).contract
    switches = QuantizerSwitches(graph_module)
    trials = trials_of(switches, record_of(graph_module), kinds, bits)
    model = _Model(switches.model, contract)
    every = switches.quantizers.keys()

    example = contract.check(*example)
    switches.set(())
    values = PartialRun(switches.model).whole(contract.flatten(example))
    sizes = elements_of(trials, switches, values, samples_of(example))
    del values

    in_float = _number(metric(model if float_model is None else _Model(float_model, contract)), "the float model")
    switches.set(every)
    quantized = _number(metric(model), "the quantized model")
    without: dict[frozenset[str], float] = {}
    entries = []
    for trial, size in track(zip(trials, sizes, strict=True), "each quantizer alone", len(trials), progress):
        switches.set(trial.quantizers.difference(trial.replaced), trial.replaced)
        alone_on = _number(metric(model), f"the model with {trial.name} alone quantized")
        if not trial.tried:
            switches.set(every - trial.quantizers)
            without[trial.quantizers] = _number(metric(model), f"the model with {trial.name} alone in float")
            with_it = quantized
        else:
            switches.set(every - trial.quantizers, trial.replaced)
            with_it = _number(metric(model), f"the model with {trial.name} at {trial.bits} bits")
        entries.append(entry_of(trial, alone_on, difference(without[trial.quantizers], with_it), size))
    return Sensitivity(in_order(entries), quantized, in_float, 0, tuple(kinds), tuple(bits))


class _Model(StandIn):
    """What a metric is given: called as the user's model is, in eval mode and on its device whatever is called."""

    def __init__(self, model: nn.Module, contract: InputContract) -> None:
        super().__init__(model, contract.signature)
        self.contract = contract

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.contract.check(*self.bind(args, kwargs))
        with torch.no_grad():
            return self.model(*args, **kwargs)


def _number(value: Any, what: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise QdqError(f"metric must return a number, larger for a better model; for {what} it returned {value!r}")
    return float(value)
