"""What several pipeline tests do: deploy a model, look at what ONNX Runtime makes of its file, run it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import qdq
from qdq.analysis.fidelity import Fidelity
from qdq.analysis.runtime import OnnxRuntimeRunner


class Deployed(NamedTuple):
    """A model on its way: the simulation, the file, and how they compare."""

    qmodel: fx.GraphModule
    path: Path
    fidelity: Fidelity


def quantize(model: nn.Module, batches: Any, **options: Any) -> fx.GraphModule:
    """`qdq.quantize` without a progress bar."""
    return qdq.quantize(model, batches, progress=False, **options)


def deploy(model: nn.Module, batches: Any, path: Path, **options: Any) -> Deployed:
    """Quantize, export and verify, on the same batches."""
    qmodel = quantize(model, batches, **options)
    qdq.export_onnx(qmodel, path)
    return Deployed(qmodel, path, qdq.verify(qmodel, path, batches, progress=False))


def operations(model: onnx.ModelProto) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(node.op_type for node in model.graph.node)


def optimized_graph(path: Path) -> onnx.ModelProto:
    """The graph that ONNX Runtime executes."""
    optimized = path.with_suffix(".optimized.onnx")
    OnnxRuntimeRunner(path, optimized=str(optimized))
    return onnx.load(optimized)


def run_file(path: Path, inputs: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """The outputs of a file for inputs in its order."""
    return OnnxRuntimeRunner(path)([value.numpy() for value in inputs])


@torch.no_grad()
def run_model(model: nn.Module, inputs: Sequence[Any]) -> list[np.ndarray]:
    """The outputs of a model, flat."""
    return [leaf.numpy() for leaf in pytree.tree_leaves(model(*inputs))]


def sqnr_db(reference: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """10 log10(sum ref^2 / sum (other - ref)^2) over several arrays; inf when equal."""
    signal = sum(float(np.square(r.astype(np.float64)).sum()) for r in reference)
    noise = sum(float(np.square(o.astype(np.float64) - r).sum()) for r, o in zip(reference, other, strict=True))
    return float("inf") if noise == 0 else 10 * float(np.log10(signal / noise))


def initializers(path: Path) -> dict[str, np.ndarray]:
    """The constants of a file by name."""
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal values that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
