"""Improvement: from statistics to ranges, and the algorithms of a recipe applied in its order."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx

from .affine_quantizer import AffineQuantizer
from .algorithms.layer import layers_of
from .algorithms.output_ranges import OutputRanges, Range
from .algorithms.registry import algorithms_of
from .algorithms.walk import Visitor, Walk
from .algorithms.weight_ranges import WeightRanges
from .calib.collectors import HistogramCollector
from .calib.statistics import Inputs, Statistics, count_samples, evenly_spread
from .calibration import (
    activation_quantizers,
    constants_in_float,
    find_ranges,
    fit_biases,
    functions_behind,
    histogram_of,
    quantized_tensors,
)
from .constant_quantizers import CLIPPED_BITS
from .fingerprint import fingerprint_of
from .graph.record import Unrounded, record_of
from .recipe import Recipe

logger = logging.getLogger(__name__)

# What "auto" chooses from: method and percentile.
_RULES = {
    "max": ("max", None),
    "mse": ("mse", None),
    "entropy": ("entropy", None),
    "percentile 99.9": ("percentile", 99.9),
    "percentile 99.99": ("percentile", 99.99),
    "percentile 99.999": ("percentile", 99.999),
}
# Bounds that differ by less of the range are alike: step sizes, and so errors of rounding, differ by as little.
_ALIKE = 0.03
# So many samples show what a range does to the layers that read it.
_COMPARED = 16


class Improved(NamedTuple):
    """What is known of a graph that was improved.

    Attributes:
        statistics: of the float model, with those of tensors that the statistics given did not know.
        seen: what the ranges were found from: others where an algorithm changed tensors, and then of no use for
            another recipe.
        unrounded: as in `graph.record.Record`.
    """

    statistics: Statistics
    seen: Statistics
    unrounded: dict[str, Unrounded]


def improve(graph_module: fx.GraphModule, statistics: Statistics, recipe: Recipe, progress: bool = True) -> Improved:
    """Sets the ranges of a graph with quantizers from statistics and applies the recipe's algorithms, in place.

    Raises:
        CalibrationError: a quantizer saw no data.
        RecipeError: an unknown algorithm or option: `quantize` has looked at them before.
    """
    algorithms = algorithms_of(recipe.algorithms)
    if algorithms and not statistics.samples:
        logger.warning(
            "the statistics hold no inputs: ranges are found, and %s left out", ", ".join(a.name for a in algorithms)
        )
        algorithms = []
    contract = record_of(graph_module).contract
    samples = [contract.flatten(inputs) for inputs in statistics.samples]
    with constants_in_float(graph_module):
        changed = set().union(*(algorithm.prepare(graph_module, samples, progress) for algorithm in algorithms))
    # A quantizer's range comes from one source: counts of few samples and of all data cannot be added up.
    for tensors in quantized_tensors(graph_module).values():
        changed |= set(tensors) if changed.intersection(tensors) else set()
    # What is known of all other tensors still holds, and comes from more data than the samples are.
    kept = {tensor: histogram for tensor, histogram in statistics.histograms.items() if tensor not in changed}
    seen = find_ranges(graph_module, Statistics(kept, statistics.samples), progress)
    chosen = [q for q in activation_quantizers(graph_module) if q.method == "auto" and not q.fixed and not q.keeps_all]
    # What is read through a function has the range of least error in that already.
    settled = functions_behind(graph_module)
    chosen = [q for q in chosen if q.name not in settled]
    visitors: list[Visitor] = [*algorithms]
    unrounded: dict[str, Unrounded] = {}
    most = max((algorithm.walk_samples for algorithm in algorithms), default=0)
    few_bits = any(layer.quantizer.num_bits <= CLIPPED_BITS for layer in layers_of(graph_module).values())
    few_bits = few_bits and recipe.weight_calibration == "auto"
    if chosen or few_bits:
        most = max(most, _COMPARED)
    if most and samples:
        spread = evenly_spread(statistics.samples, most, divisible=contract.divisible)
        compared = _batches_of(_COMPARED, spread)
        if few_bits:
            visitors.insert(0, WeightRanges(compared))
        if chosen:
            proposals = {q.name: _proposals(q, histogram_of(graph_module, q, seen)) for q in chosen}
            visitors.insert(0, OutputRanges(proposals, compared))
        walk = Walk(graph_module, [contract.flatten(inputs) for inputs in spread])
        walk.run(visitors, progress)
        for algorithm in algorithms:
            algorithm.finish(walk, progress)
        fit_biases(graph_module)
        unrounded = _unrounded(graph_module, walk)
    unchanged = {tensor: histogram for tensor, histogram in seen.histograms.items() if tensor not in changed}
    return Improved(Statistics({**statistics.histograms, **unchanged}, statistics.samples), seen, unrounded)


def _unrounded(graph_module: fx.GraphModule, walk: Walk) -> dict[str, Unrounded]:
    """The weights whose codes were chosen, as they were before. (Those of fine-tuning are not on the grid.)"""
    layers = {layer.weight: layer.quantizer for layer in layers_of(graph_module).values()}
    chosen = [path for path in walk.replaced if path in layers]
    return {
        path: Unrounded(walk.original(path).detach(), fingerprint_of(walk.parameter(path)))
        for path in chosen
        if torch.equal(layers[path](walk.parameter(path)), walk.parameter(path))
    }


def _batches_of(samples: int, batches: Sequence[Inputs]) -> int:
    """The fewest of the first batches that hold so many samples; all, where all hold fewer."""
    counts = itertools.accumulate(count_samples([inputs]) for inputs in batches)
    return next((index for index, count in enumerate(counts, 1) if count >= samples), len(batches))


def _proposals(quantizer: AffineQuantizer, histogram: HistogramCollector) -> dict[str, Range]:
    """The range that each rule proposes, the usual one first; but for those that are nearly one before."""
    found: dict[str, Range] = {}
    for rule in sorted(_RULES, key=lambda rule: rule != quantizer.usual_method):
        proposed = quantizer.proposed_range(histogram, *_RULES[rule])
        if not any(_nearly(proposed, known) for known in found.values()):
            found[rule] = proposed
    return found


def _nearly(one: Range, other: Range) -> bool:
    """Whether two ranges differ by less than a comparison of what they do could tell."""
    width = max(one[1] - one[0], other[1] - other[0])
    return all(abs(a - b) <= _ALIKE * width for a, b in zip(one, other, strict=True))
