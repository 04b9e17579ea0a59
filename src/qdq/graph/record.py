"""Record: what a graph module knows of its own making."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor, nn

from ..calib.statistics import Statistics
from ..errors import QdqError
from ..recipe import Recipe
from .contract import InputContract
from .explanation import Explanation
from .targets import Target

KEY = "qdq"


@dataclasses.dataclass(frozen=True)
class Unrounded:
    """A weight before an algorithm chose its codes. The graph has codes times step sizes: rounding leaves those alone.

    The tensor takes as much memory again as the weight.

    Attributes:
        weight: from before.
        chosen: the fingerprint of the weight with the chosen codes. Where the model's differs, it was written to since.
    """

    weight: Tensor
    chosen: str


@dataclasses.dataclass(frozen=True)
class Record:
    """Stored in `graph_module.meta`, by `qdq.quantize` and where a module is captured to be exported or verified.

    Attributes:
        contract: the inputs that the graph takes.
        target: what it was quantized or exported for; None in a float graph.
        recipe: how `qdq.quantize` quantized it, else None.
        reduced_range: whether the weights of integer operations avoid saturation (`Target.reduce_range`).
        explanation: of every tensor.
        outputs: for every output of the model, the path of its quantizer, None where it is float.
        output_names: of the exported file.
        statistics: what calibration saw in the float model.
        seen: what the ranges were found from: differs where an algorithm changed tensors.
        unrounded: by their paths, the weights whose codes an algorithm chose.
    """

    contract: InputContract
    output_names: tuple[str, ...]
    target: Target | None = None
    recipe: Recipe | None = None
    reduced_range: bool = False
    explanation: Explanation | None = None
    outputs: tuple[str | None, ...] = ()
    statistics: Statistics | None = None
    seen: Statistics | None = None
    unrounded: Mapping[str, Unrounded] = dataclasses.field(default_factory=dict)


def has_record(module: object) -> bool:
    """Whether `qdq.quantize` made a module. An attribute `meta` of a user's own model may be anything."""
    meta = getattr(module, "meta", None)
    return isinstance(meta, dict) and isinstance(meta.get(KEY), Record)


def record_of(graph_module: nn.Module) -> Record:
    """The record of a graph module.

    Raises:
        QdqError: the module was not made by `qdq.quantize`.
    """
    if not has_record(graph_module):
        raise QdqError(
            f"expected a model that qdq.quantize returned, not a {type(graph_module).__name__}: quantize it first"
        )
    record: Record = graph_module.meta[KEY]  # type: ignore[index,assignment]
    return record
