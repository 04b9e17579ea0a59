"""Improvement: from statistics to ranges, and the algorithms of a recipe applied in its order."""

from __future__ import annotations

import math

from torch import fx

from .affine_quantizer import AffineQuantizer
from .algorithms.output_ranges import OutputRanges, Range
from .algorithms.registry import algorithms_of
from .algorithms.walk import Visitor, Walk
from .calib.collectors import HistogramCollector
from .calib.statistics import Statistics, evenly_spread
from .calibration import activation_quantizers, constants_in_float, find_ranges, fit_biases, histogram_of
from .graph.record import record_of
from .recipe import Recipe

# What "auto" chooses from: method and percentile.
_RULES = {
    "max": ("max", None),
    "mse": ("mse", None),
    "entropy": ("entropy", None),
    "percentile 99.9": ("percentile", 99.9),
    "percentile 99.99": ("percentile", 99.99),
    "percentile 99.999": ("percentile", 99.999),
}
# Bounds that differ by less are alike: the step sizes, and so the errors of rounding, differ by as little.
_ALIKE = 0.03


def improve(
    graph_module: fx.GraphModule, statistics: Statistics, recipe: Recipe, progress: bool = True
) -> tuple[Statistics, Statistics]:
    """Sets the ranges of a graph with quantizers from statistics and applies the recipe's algorithms, in place.

    Returns:
        The statistics of the float model, with those of tensors that they did not know; and the statistics that the
        ranges were found from: others where an algorithm changed tensors, and then of no use for another recipe.

    Raises:
        CalibrationError: a quantizer saw no data.
        RecipeError: an unknown algorithm or option.
    """
    algorithms = algorithms_of(recipe.algorithms)
    contract = record_of(graph_module).contract
    samples = [contract.flatten(inputs) for inputs in statistics.samples]
    with constants_in_float(graph_module):
        changed = set().union(*(algorithm.prepare(graph_module, samples, progress) for algorithm in algorithms))
    # What is known of all other tensors still holds, and comes from more data than the samples are.
    kept = {tensor: histogram for tensor, histogram in statistics.histograms.items() if tensor not in changed}
    seen = find_ranges(graph_module, Statistics(kept, statistics.samples), progress)
    chosen = [q for q in activation_quantizers(graph_module) if q.method == "auto" and not q.fixed and not q.keeps_all]
    visitors: list[Visitor] = [*algorithms]
    most = max((algorithm.walk_samples for algorithm in algorithms), default=0)
    if chosen:
        ranges = OutputRanges({q.name: _proposals(q, histogram_of(graph_module, q, seen)) for q in chosen})
        visitors.insert(0, ranges)
        most = max(most, ranges.samples)
    if most and samples:
        spread = evenly_spread(statistics.samples, most, divisible=contract.divisible)
        walk = Walk(graph_module, [contract.flatten(inputs) for inputs in spread])
        walk.run(visitors, progress)
        for algorithm in algorithms:
            algorithm.finish(walk, progress)
        fit_biases(graph_module)
    return (statistics if changed else seen), seen


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
    return all(math.isclose(a, b, rel_tol=_ALIKE, abs_tol=0.0) for a, b in zip(one, other, strict=True))
