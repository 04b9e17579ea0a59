"""Each quantizer alone on and alone off, by the SQNR of the model's outputs.

Of each part of a batch the float model is run once, node by node, and its values are kept; then each quantizer is
switched on alone, and only the nodes behind it are computed anew. The same is done with the quantized model and each
quantizer switched off. So the cost of a quantizer is that of what lies behind it, and the memory that of all values of
one part.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..batches import Inputs
from ..errors import DataError, QdqError
from ..graph.contract import failing_on
from ..graph.record import record_of
from ..progress import track
from ..stand_in import StandIn
from .partial_run import PartialRun, Values
from .quantizer_switches import QuantizerSwitches
from .quantizer_trials import Trial, elements_of, trials_of
from .sensitivity import QuantizerSensitivity, Sensitivity, in_order

logger = logging.getLogger(__name__)


class OutputSensitivity(StandIn):
    """Called with batches as the model is; adds up signal and noise of every trial.

    Args:
        graph_module: what `qdq.quantize` returned; it is not changed.
        kinds: "activation", "weight", "layer".
        bits: at which quantizers are tried as well.
        float_model: whose outputs the quantized model is compared with, in eval mode; None compares with the graph with
            all its quantizers off.
        samples_at_once: a batch is run in parts of so many samples, where dimension 0 of all inputs is dynamic; None
            never splits.
        progress: whether bars are shown.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        kinds: Collection[str],
        bits: Sequence[int] = (),
        float_model: nn.Module | None = None,
        samples_at_once: int | None = None,
        progress: bool = True,
    ) -> None:
        contract = record_of(graph_module).contract
        super().__init__(graph_module, contract.signature)
        self.contract, self.progress, self.samples_at_once = contract, progress, samples_at_once
        # In a tuple, so that parameters() gives those of the model alone.
        self.float_model = (float_model,)
        self.tried = tuple(kinds), tuple(bits)
        self.switches = QuantizerSwitches(graph_module)
        self.trials = trials_of(self.switches, record_of(graph_module), kinds, bits)
        self.graph = PartialRun(self.switches.model)
        self.calls = self.samples = 0
        # Of the outputs that the quantized model's are compared with: how many, and how many are not finite.
        self.values = self.left_out = 0
        self.elements: list[int] = []
        self.quantized = _Noise()
        self.on = [_Noise() for _ in self.trials]
        self.off = [_Noise() for _ in self.trials]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs all trials on a batch and gives the quantized model's output."""
        inputs = self.measure(*self.bind(args, kwargs))
        self.switches.set(self.switches.quantizers)
        with torch.no_grad():
            return self.switches.model(*inputs[0], **inputs[1])

    @torch.no_grad()
    def measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Runs all trials on a batch and gives it as the graph takes it.

        Raises:
            DataError: the graph does not take the batch, or fails on it.
            QdqError: the model has no float output, or `float_model` has others.
        """
        try:
            inputs = self.contract.check(args, kwargs)
        except DataError as error:
            raise DataError(f"batch {self.calls}: {error}") from None
        for part in _parts(inputs, self.samples_at_once if self.contract.divisible else None):
            self._measure(part)
        self.calls += 1
        return inputs

    def result(self) -> Sensitivity:
        """What was found on the batches so far.

        Raises:
            DataError: no output that was to be compared is finite.
        """
        if self.left_out:
            if self.left_out == self.values:
                raise DataError(
                    "no value of the float model's outputs on batches is finite: there is nothing to compare; look for "
                    "infinite inputs or weights"
                )
            logger.warning(
                "%d of %d values of the float model's outputs are NaN or infinite and were left out",
                self.left_out,
                self.values,
            )
        whole = self.quantized.db
        own = {t.quantizers: noise.db for t, noise in zip(self.trials, self.off, strict=True) if not t.tried}
        entries = []
        for trial, size, on, off in zip(self.trials, self.elements, self.on, self.off, strict=True):
            gain = difference(own[trial.quantizers], off.db if trial.tried else whole)
            entries.append(entry_of(trial, on.db, gain, size))
        return Sensitivity(in_order(entries), whole, None, self.samples, *self.tried)

    def _measure(self, inputs: Inputs) -> None:
        flat, count = self.contract.flatten(inputs), samples_of(inputs)
        self.switches.set(())
        values = self._run(flat, inputs)
        own = self._floats(self.graph.outputs(values))
        wanted = own if self.float_model[0] is None else self._float_outputs(inputs, own)
        self.values += sum(x.numel() for x in wanted)
        self.left_out += sum(int((~x.isfinite()).sum()) for x in wanted)
        self.elements = self.elements or elements_of(self.trials, self.switches, values, count)
        for noise, trial in self._tracked(self.on, "alone on"):
            noise.add(own, self._after(values, (), trial.quantizers.difference(trial.replaced), trial))
        del values  # before those of the quantized model are there
        every = self.switches.quantizers.keys()
        self.switches.set(every)
        values = self._run(flat, inputs)
        self.quantized.add(wanted, self._floats(self.graph.outputs(values)))
        for noise, trial in self._tracked(self.off, "alone off"):
            noise.add(wanted, self._after(values, every, every - trial.quantizers, trial))
        self.samples += count

    def _run(self, flat: Sequence[Any], inputs: Inputs) -> Values:
        with failing_on(self.calls, inputs):
            return self.graph.whole(flat)

    def _tracked(self, noises: list[_Noise], what: str) -> Iterator[tuple[_Noise, Trial]]:
        label = f"each quantizer {what}, batch {self.calls + 1}"
        pairs = zip(noises, self.trials, strict=True)
        return track(pairs, label, len(self.trials), self.progress)

    def _after(self, values: Values, before: Collection[str], after: Collection[str], trial: Trial) -> list[Tensor]:
        self.switches.set(after, trial.replaced)
        changed = self.switches.changed(before, after, trial.replaced)
        return self._floats(self.graph.after(values, changed))

    def _floats(self, outputs: Iterable[Any]) -> list[Tensor]:
        found = [x for x in outputs if isinstance(x, Tensor) and x.is_floating_point()]
        if not found:
            raise QdqError("the model has no float output, whose SQNR could be measured: pass a metric")
        return found

    def _float_outputs(self, inputs: Inputs, own: list[Tensor]) -> list[Tensor]:
        model = self.float_model[0]
        assert model is not None
        found = self._floats(pytree.tree_leaves(model(*inputs[0], **inputs[1])))
        if [x.shape for x in found] != [x.shape for x in own]:
            theirs, ours = ([list(x.shape) for x in outputs] for outputs in (found, own))
            raise QdqError(f"float_model gives outputs of shapes {theirs}, model {ours}: it is not the same model")
        return found


class _Noise:
    """Signal and noise over several outputs and batches."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, wanted: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        """Adds outputs. Where those wanted are NaN or infinite there is nothing to compare."""
        for want, got in zip(wanted, given, strict=True):
            finite = torch.isfinite(want)
            self.signal += float(torch.where(finite, want, 0.0).double().square().sum())
            self.noise += float(torch.where(finite, got.double() - want.double(), 0.0).square().sum())

    @property
    def db(self) -> float:
        """SQNR; infinite without noise, minus infinity without signal or with NaN in the outputs."""
        if self.noise == 0:
            return math.inf
        if math.isnan(self.noise) or math.isinf(self.noise) or self.signal == 0:
            return -math.inf
        return 10 * math.log10(self.signal / self.noise)


def entry_of(trial: Trial, alone_on: float, alone_off: float, elements: int) -> QuantizerSensitivity:
    """The entry of a trial."""
    return QuantizerSensitivity(
        trial.name, trial.kind, trial.bits, trial.tried, alone_on, alone_off, elements, trial.patterns
    )


def difference(after: float, before: float) -> float:
    """after - before; 0 where both are infinite alike."""
    return 0.0 if after == before else after - before


def samples_of(inputs: Inputs) -> int:
    """The size of dimension 0 of the first tensor."""
    return next((int(x.shape[0]) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()), 1)


def _parts(inputs: Inputs, size: int | None) -> Iterator[Inputs]:
    count = samples_of(inputs)
    if size is None or count <= size or any(x.shape[:1] != (count,) for x in _tensors(inputs)):
        yield inputs
        return
    for start in range(0, count, size):
        args, kwargs = pytree.tree_map_only(Tensor, lambda x, at=start: x[at : at + size], inputs)
        yield args, kwargs


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
