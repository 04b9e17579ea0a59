"""Codes: every quantized tensor of a file, compared with its simulation on one batch."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..affine_quantizer import AffineQuantizer
from ..batches import Inputs
from ..graph.record import record_of
from ..graph.targets import TARGETS
from ..kernels.reference import affine_quantize
from ..onnx_nodes import QUANTIZER_KEY
from .runtime import OnnxRuntimeRunner, existing_file

# Above this size the file's weights may lie outside of it, and a copy with more outputs would double them in memory.
LARGEST_FILE = 2**30


@dataclasses.dataclass(frozen=True)
class TensorFidelity:
    """One quantized tensor on one batch.

    Attributes:
        name: path of its quantizer.
        share: share of codes that differ, 0 to 1.
        max_difference: largest difference of two codes.
        sqnr_db: of the dequantized values, simulation as reference.
        bits: width of the codes.
    """

    name: str
    share: float
    max_difference: int
    sqnr_db: float
    bits: int = 8

    @property
    def far_apart(self) -> bool:
        """Whether codes differ by more than rounding explains: by more than 3 of 8 bits, or as large a share of 16."""
        return self.max_difference > 3 * 2.0 ** (self.bits - 8)

    def __str__(self) -> str:
        differ = f"{100 * self.share:.4f} % differ, by {self.max_difference} at most"
        return f"{self.name}: {differ}, SQNR {self.sqnr_db:.1f} dB"


def compare_codes(
    graph_module: fx.GraphModule, path: str | os.PathLike[str], inputs: Inputs, model: nn.Module | None = None
) -> tuple[TensorFidelity, ...]:
    """Compares the codes of every quantizer call; empty where the file is too large to be opened for it.

    Args:
        graph_module: what was exported.
        path: of the file.
        inputs: one batch.
        model: whose `TensorQuantizer`s the graph's quantizers came from: then its codes are compared, not the graph's.
    """
    path = existing_file(path)
    if os.path.getsize(path) > LARGEST_FILE or os.path.exists(f"{path}.data"):
        return ()
    record = record_of(graph_module)
    fuses = record.target is not TARGETS["tensorrt"]
    deployed = _deployed_codes(path, record.contract.flatten(inputs), fuses)
    zero_and_step = {n: m for n, m in graph_module.named_modules() if isinstance(m, AffineQuantizer)}
    if model is None:
        simulated = _Codes(graph_module).codes_for(inputs)
    else:
        simulated = _model_codes(model, zero_and_step, inputs)
        # Of calls that repeat values behind operations that move them, the last stands where the model's does.
        deployed = {name: calls[-1:] for name, calls in deployed.items()}
    out = []
    for name, calls in simulated.items():
        found = deployed.get(name, [])
        if len(found) != len(calls):
            continue  # the runtime or the exporter merged calls: there is no telling which is which
        for want, got in zip(calls, found, strict=True):
            if want is not None and want.shape == got.shape:
                out.append(_compare(name, want, got, zero_and_step[name]))
    return tuple(out)


def _compare(name: str, want: Tensor, got: Tensor, quantizer: AffineQuantizer) -> TensorFidelity:
    want = want.cpu()
    difference = (got.double() - want.double()).abs()
    signal = float((want.double() - float(quantizer.zero_point)).square().sum())
    noise = float(difference.square().sum())
    sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf
    share = float((difference > 0).double().mean()) if difference.numel() else 0.0
    return TensorFidelity(name, share, int(difference.max()) if difference.numel() else 0, sqnr, quantizer.num_bits)


class _Codes(fx.Interpreter):
    """Runs the simulation and keeps the codes of every quantizer call (None for calls that only repeat values)."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.codes: dict[str, list[Tensor | None]] = {}

    def codes_for(self, inputs: Inputs) -> dict[str, list[Tensor | None]]:
        with torch.no_grad():
            self.run(*record_of(self.module).contract.flatten(inputs), enable_io_processing=False)  # type: ignore[arg-type]
        return self.codes

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(str(target))
        if isinstance(module, AffineQuantizer):
            repeated = bool(kwargs.get("on_grid"))
            codes = None
            if not repeated:
                codes = affine_quantize(args[0], module.step_size, module.zero_point, module.lo, module.hi)
            self.codes.setdefault(module.name, []).append(codes)
        return super().call_module(target, args, kwargs)


def _model_codes(
    model: nn.Module, quantizers: dict[str, AffineQuantizer], inputs: Inputs
) -> dict[str, list[Tensor | None]]:
    """The codes of a model's `TensorQuantizer`s that run once, by the names of the quantizers they became."""
    seen: dict[str, list[Tensor]] = {}

    def keep(path: str, module: nn.Module, args: Any, output: Tensor) -> None:
        seen.setdefault(path, []).append(output)

    modules = dict(model.named_modules())
    paths = {q.origin for q in quantizers.values() if q.origin in modules}
    # Outputs lie on the grid of the codes, behind whatever else the quantizer does.
    handles = [modules[path].register_forward_hook(functools.partial(keep, path)) for path in paths]
    try:
        with torch.no_grad():
            model(*inputs[0], **inputs[1])
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: [affine_quantize(seen[q.origin][0], q.step_size, q.zero_point, q.lo, q.hi)]
        for name, q in quantizers.items()
        if len(seen.get(q.origin, [])) == 1
    }


def _deployed_codes(path: str, inputs: list[Any], fuses: bool) -> dict[str, list[Tensor]]:
    import onnx

    model = onnx.load(path)
    taps: list[tuple[str, str]] = []
    types = {t.name: t.data_type for t in model.graph.initializer}
    for node in model.graph.node:
        names = [p.value for p in node.metadata_props if p.key == QUANTIZER_KEY]
        if node.op_type in ("QuantizeLinear", "Clip") and names:
            taps.append((names[0], node.output[0]))
            kind = types.get(node.input[2], onnx.TensorProto.UINT8)
            model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], kind, None))
    own = len(model.graph.output) - len(taps)
    runner = OnnxRuntimeRunner(model.SerializeToString(), fuses=fuses)
    arrays = [np.asarray(t.detach().cpu()) for t in inputs if isinstance(t, Tensor)]
    results = runner(arrays)[own:]
    out: dict[str, list[Tensor]] = {}
    for (name, _), array in zip(taps, results, strict=True):
        out.setdefault(name, []).append(torch.from_numpy(array))
    return out
