"""Improvement: from statistics to ranges, and the algorithms of a recipe applied in its order."""

from __future__ import annotations

from torch import fx

from .affine_quantizer import AffineQuantizer
from .algorithms.output_ranges import OutputRanges, Range
from .algorithms.registry import algorithms_of
from .algorithms.walk import Visitor, Walk
from .calib.collectors import HistogramCollector
from .calib.statistics import Statistics
from .calibration import activation_quantizers, collect_again, constants_in_float, find_ranges, fit_biases, histogram_of
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
        changed = [algorithm.prepare(graph_module, samples, progress) for algorithm in algorithms]
    seen = collect_again(graph_module, statistics, progress) if any(changed) else statistics
    seen = find_ranges(graph_module, seen, progress)
    chosen = [q for q in activation_quantizers(graph_module) if q.method == "auto" and not q.fixed]
    visitors: list[Visitor] = [*algorithms]
    if chosen:
        proposals = {q.name: _proposals(q, histogram_of(graph_module, q, seen)) for q in chosen}
        visitors.insert(0, OutputRanges(proposals))
    if visitors and samples:
        walk = Walk(graph_module, samples)
        walk.run(visitors, progress)
        for algorithm in algorithms:
            algorithm.finish(walk, progress)
        fit_biases(graph_module)
    return (statistics if any(changed) else seen), seen


def _proposals(quantizer: AffineQuantizer, histogram: HistogramCollector) -> dict[str, Range]:
    """The range that each rule proposes, the usual one first."""
    order = sorted(_RULES, key=lambda rule: rule != quantizer.usual_method)
    return {rule: quantizer.proposed_range(histogram, *_RULES[rule]) for rule in order}
