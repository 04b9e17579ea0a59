"""Cheapest placement: which operations of a graph compute in integers, when each has a cost in float and in integers.

A tensor that crosses from one side to the other is converted once, whatever the number of its readers. The sum of all
costs is that of a cut between a source (float) and a sink (integers), so that the best placement is a minimum cut:
Picard and Ratliff, "Minimum cuts and related problems", Networks 5 (1975).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from .minimum_cut import minimum_cut


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an operation takes, in any one unit, on either side; infinite where it has no such form."""

    in_float: float
    in_integers: float


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A tensor, and what its conversion takes.

    Attributes:
        producer: the operation that computes it.
        readers: the operations that read it.
        quantize: where the producer is in float and a reader in integers.
        dequantize: where the producer is in integers and a reader in float.
    """

    producer: str
    readers: Sequence[str]
    quantize: float
    dequantize: float


def cheapest_placement(
    costs: Mapping[str, Cost], crossings: Iterable[Crossing], together: Iterable[tuple[str, str]] = ()
) -> frozenset[str]:
    """The operations to compute in integers for the least total cost. Where both ways cost the same, in integers.

    Args:
        costs: of every operation.
        crossings: the tensors between them.
        together: pairs of operations that a runtime fuses, and that must be on the same side.

    Raises:
        ValueError: an operation is infinitely costly on both sides, by itself or with what it must go together with.
    """
    source, sink = ("float",), ("integers",)
    edges: list[tuple[object, object, float]] = []
    for name, cost in costs.items():
        # Cut where the operation is on the other side.
        edges += [(source, name, cost.in_integers), (name, sink, cost.in_float)]
    for index, crossing in enumerate(crossings):
        into, out_of = ("quantized", index), ("dequantized", index)
        edges += [(crossing.producer, into, crossing.quantize), (out_of, crossing.producer, crossing.dequantize)]
        for reader in crossing.readers:
            edges += [(into, reader, math.inf), (reader, out_of, math.inf)]
    for first, second in together:
        edges += [(first, second, math.inf), (second, first, math.inf)]
    in_float = minimum_cut(edges, source, sink)  # type: ignore[arg-type]
    return frozenset(name for name in costs if name not in in_float)
