"""`Algorithm`: the one form of everything that makes a quantized model better after its ranges are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import fx

from ..calib.statistics import MOST_SAMPLES
from .walk import LayerVisit, TensorVisit, Walk

# Per batch, the values of the graph's placeholders in their order.
Samples = Sequence[Sequence[Any]]
# Of a walk for means of many positions, or for a few codes a layer: twice as many give no better ones.
FEW_SAMPLES = 64


class Algorithm:
    """A published method of post-training quantization; the options are its fields (a frozen dataclass).

    The algorithms of a recipe are applied in its order. `check` of each comes before calibration. After it comes first
    `prepare` of each, on the whole graph, with weights and activations in float; then one `Walk` with all of them as
    visitors, then `finish` of each. A subclass overrides what it needs.

    Attributes:
        name: in recipes.
        citation: the paper.
    """

    name: ClassVar[str]
    citation: ClassVar[str]

    @property
    def walk_samples(self) -> int:
        """How many samples it wants the walk to compute: each costs a pass of both models."""
        return MOST_SAMPLES

    def check(self, graph: fx.Graph) -> None:
        """Refuses options that do not fit a captured model.

        Raises:
            RecipeError: it says which.
        """

    def prepare(self, graph_module: fx.GraphModule, samples: Samples, progress: bool = True) -> set[str]:
        """Changes the graph's float weights (and what is to be changed with them), leaving its function as it is.

        Returns:
            The names (:func:`qdq.graph.names.original_name`) of the tensors whose values changed: the ranges of those
            that are quantized are then found anew.
        """
        return set()

    def visit_tensor(self, visit: TensorVisit) -> None:
        """Where the walk reaches an activation quantizer."""

    def visit_layer(self, visit: LayerVisit) -> None:
        """Where the walk reaches a layer: its weight and bias may be replaced."""

    def finish(self, walk: Walk, progress: bool = True) -> None:
        """After the walk, with all ranges set: weights and biases of the whole graph may be replaced."""
