"""Fidelity: a deployed file, run in its runtime, compared with its simulation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..affine_quantizer import AffineQuantizer
from ..batches import Inputs
from ..cpuinfo import saturates_u8s8
from ..errors import DataError, QdqError
from ..graph.record import Record, record_of
from ..graph.targets import TARGETS
from ..stand_in import StandIn
from .codes import TensorFidelity, compare_codes
from .runtime import OnnxRuntimeRunner, OpenVinoRunner, Runner

Agreement = Callable[[Tensor, Tensor], float]


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How close a deployed file is to its simulation.

    Attributes:
        sqnr_db: 10 log10(sum sim^2 / sum (runtime - sim)^2) over all outputs and batches, in dB; inf when equal.
        max_step_difference: largest difference in steps of the output's quantizer; None where no output has one.
        agreement: share of equal argmax over the last axis of the first output (or the user's function, averaged over
            samples); None where the last axis has one element.
        runtime: what ran the file.
        samples: how many samples were compared (dimension 0 of the first input).
        tensors: per quantized tensor, how its codes compare on the first batch, in the model's order.
        cause: where the rest comes from, in a sentence.
    """

    sqnr_db: float
    max_step_difference: float | None
    agreement: float | None
    runtime: str
    samples: int
    tensors: tuple[TensorFidelity, ...] = ()
    cause: str = ""
    shows_tensors: bool = False

    def __str__(self) -> str:
        steps = "-" if self.max_step_difference is None else f"{self.max_step_difference:.2f} steps"
        agreement = "-" if self.agreement is None else f"{100 * self.agreement:.2f} %"
        lines = [
            f"simulation against {self.runtime}, {self.samples} samples",
            f"  SQNR                {self.sqnr_db:.2f} dB",
            f"  largest difference  {steps}",
            f"  agreement           {agreement}",
        ]
        if self.cause:
            lines.append(f"  {self.cause}")
        if self.shows_tensors:
            lines += ["", "codes that differ, per tensor:", *(f"  {t}" for t in self.tensors)]
        return "\n".join(lines)


# Of a share that is a sum of float32.
_ROUNDING = 1e-6


def compare(
    graph_module: fx.GraphModule,
    path: str,
    feed: Callable[[Callable[..., Any]], None] | Iterable[Inputs],
    agreement: Agreement | None,
    per_tensor: bool,
    simulation: nn.Module | None = None,
) -> Fidelity:
    """Runs simulation and file over the data; see `qdq.verify`. The simulation is the graph, or another model."""
    record = record_of(graph_module)
    runner = _runner(record, path)
    comparison = _Comparison(graph_module, record, runner, agreement, simulation)
    with torch.no_grad():
        if callable(feed):
            feed(comparison)
        else:
            for args, kwargs in feed:
                comparison(*args, **kwargs)
    if comparison.first is None:
        raise DataError("the data function ran the model not once: it must call the model that it is given")
    tensors = compare_codes(graph_module, path, comparison.first, simulation)
    return comparison.result(tensors, per_tensor)


def _runner(record: Record, path: str) -> Runner:
    if record.target is TARGETS["openvino"]:
        return OpenVinoRunner(path)
    # ONNX Runtime stands in for TensorRT. Its own fusions are no part of that, and are wrong for E4M3 behind a ReLU.
    return OnnxRuntimeRunner(path, fuses=record.target is not TARGETS["tensorrt"])


class _Comparison(StandIn):
    """Called as the model is; compares the two on each call."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        record: Record,
        runner: Runner,
        agreement: Agreement | None,
        simulation: nn.Module | None,
    ) -> None:
        super().__init__(graph_module, record.contract.signature)
        self.simulation = graph_module if simulation is None else simulation
        self.graph_module, self.record, self.runner, self.agreement = graph_module, record, runner, agreement
        self.first: Inputs | None = None
        self.samples = 0
        self.signal = self.noise = self.agreed = 0.0
        self.compared = self.nonfinite = 0
        self.max_steps: float | None = None
        modules = dict(graph_module.named_modules())
        self.quantizers = [modules.get(name) if name else None for name in record.outputs]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.record.contract.check(*self.bind(args, kwargs))
        if self.first is None:
            self.first = (args, kwargs)
        simulated = self.simulation(*args, **kwargs)
        expected = [t.detach().cpu() for t in pytree.tree_leaves(simulated) if isinstance(t, Tensor)]
        arrays = [
            np.asarray(t.detach().cpu()) for t in self.record.contract.flatten((args, kwargs)) if isinstance(t, Tensor)
        ]
        deployed = [torch.from_numpy(np.array(a)) for a in self.runner(arrays)]
        if len(expected) != len(deployed):
            raise DataError(
                f"the file gives {len(deployed)} outputs and the simulation {len(expected)}: it is another model's"
            )
        for index, (want, got) in enumerate(zip(expected, deployed, strict=True)):
            self._compare(index, want, got)
        self._agree(expected[0], deployed[0])
        size = int(arrays[0].shape[0]) if arrays and arrays[0].ndim else 1
        self.samples += size
        return simulated

    def _compare(self, index: int, want: Tensor, got: Tensor) -> None:
        if want.shape != got.shape:
            raise DataError(
                f"output {index} has shape {list(got.shape)} in the file and {list(want.shape)} in the simulation: it "
                "is another model's"
            )
        if not want.is_floating_point():
            # A class or a mask has no distance: each that differs is noise of one unit.
            self.signal += float(want.numel())
            self.noise += float((want != got).sum())
            return
        finite = torch.isfinite(want)
        if not torch.equal(finite, torch.isfinite(got)):
            raise DataError(
                f"output {index} has NaN or infinite values in one of file and simulation, not in the other"
            )
        self.nonfinite += int((~finite).sum())
        difference = torch.where(finite, got.double() - want.double(), 0.0)
        self.signal += float(torch.where(finite, want.double(), 0.0).square().sum())
        self.noise += float(difference.square().sum())
        quantizer = self.quantizers[index] if index < len(self.quantizers) else None
        if isinstance(quantizer, AffineQuantizer) and want.numel():
            steps = float(difference.abs().max()) / float(quantizer.step_size)
            self.max_steps = max(steps, self.max_steps or 0.0)

    def _agree(self, want: Tensor, got: Tensor) -> None:
        if self.agreement is not None:
            weight = want.shape[0] if want.dim() else 1
            given: Any = self.agreement(want, got)
            try:
                share = float(given)
            except (TypeError, ValueError, RuntimeError):  # the last of a tensor of several values
                share = math.nan
            if not -_ROUNDING <= share <= 1 + _ROUNDING:
                raise QdqError(f"agreement must give one number from 0 to 1, the share that agrees; it gave {given!r}")
            self.agreed += share * weight
        elif want.dim() == 0 or want.shape[-1] < 2 or not want.is_floating_point():
            return
        else:
            equal = want.argmax(-1) == got.argmax(-1)
            weight = equal.numel()
            self.agreed += float(equal.double().sum())
        self.compared += weight

    def _left_out(self) -> str:
        if not self.nonfinite:
            return ""
        return f"; {self.nonfinite} NaN or infinite values, in both alike, are left out"

    def _changed_weights(self) -> str:
        if self.simulation is self.graph_module or not self.record.reduced_range:
            return ""
        return "; weights whose products would saturate on this processor were changed (export_onnx logged which)"

    def result(self, tensors: tuple[TensorFidelity, ...], per_tensor: bool) -> Fidelity:
        sqnr = math.inf if self.noise == 0 else -math.inf
        if self.noise > 0 and self.signal > 0:
            sqnr = 10 * math.log10(self.signal / self.noise)
        return Fidelity(
            sqnr_db=sqnr,
            max_step_difference=self.max_steps,
            agreement=self.agreed / self.compared if self.compared else None,
            runtime=self.runner.name,
            samples=self.samples,
            tensors=tensors,
            cause=_cause(sqnr, tensors, self.record, self.graph_module) + self._left_out() + self._changed_weights(),
            shows_tensors=per_tensor,
        )


# float32 rounding alone leaves more than this, in dB, in models of any usual depth.
ROUNDING_SQNR = 60.0


def _cause(sqnr_db: float, tensors: tuple[TensorFidelity, ...], record: Record, graph_module: fx.GraphModule) -> str:
    if sqnr_db == math.inf:
        return "every output is equal"
    drawn = [n.name for n in graph_module.graph.nodes if "rand" in str(n.target) or "dropout" in str(n.target)]
    if drawn:
        return f"the model draws random numbers ({', '.join(drawn[:3])}): two runs of it differ in themselves"
    differing = [t for t in tensors if t.share > 0]
    if not differing:
        where = "in the operations left in float"
        if sqnr_db < ROUNDING_SQNR:
            return f"no quantized tensor that could be compared differs: look for the difference {where}"
        return f"every code is equal; the outputs differ by float rounding {where}"
    first = differing[0]
    worst = max(differing, key=lambda t: (t.far_apart, t.max_difference))
    if worst.far_apart and not record.reduced_range and saturates_u8s8():
        return (
            f"codes differ by up to {worst.max_difference} (at {worst.name}): this processor has no VNNI, and its "
            "products of uint8 and int8 saturate at 16 bits; quantize with Recipe(reduce_range=True)"
        )
    if first.far_apart:
        return (
            f"codes of {first.name} differ by up to {first.max_difference}, far beyond rounding: the file was probably "
            "not exported from this model as it is now; export it again"
        )
    return (
        f"{100 * first.share:.4f} % of the codes of {first.name} (the first tensor to differ) are "
        f"{first.max_difference} apart: values within float rounding of the middle between two codes fall to either "
        f"side; up to {worst.max_difference} apart further on"
    )
