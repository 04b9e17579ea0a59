"""Latency tuning: which operations of a quantized model to leave in float, so that the deployed file is the fastest.

The quantized file and the float file are profiled per operation in the target's runtime, in turn. From what each
operation takes on either side, and from what conversions take, the cheapest placement follows (`cheapest_placement`).
The files of a few such placements, of the quantized model and of the float model are then timed as a whole, in turn:
what is kept is what was measured to be the fastest, not what was computed to be.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..analysis.conversion_times import conversion_times
from ..analysis.operation_times import open_session, operation_times, session_options
from ..batches import Inputs
from ..errors import DataError, RecipeError
from ..export.marked_file import MarkedFile
from ..graph.contract import InputContract
from ..graph.place import place
from ..graph.plan import Plan
from ..graph.record import record_of
from ..graph.targets import ONNXRUNTIME, Target
from ..progress import track
from ..recipe import Recipe
from .placement_costs import OperationCost, PlacementCosts, patterns_for

logger = logging.getLogger(__name__)

# Conversions cost more or less than estimated, by where they fall: a placement is computed for each of these factors.
_FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
# Whole files: rounds of each, and the length of one. What is not faster by this share is not taken for faster.
_ROUNDS, _ROUND_SECONDS, _MARGIN = 15, 0.1, 0.01


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Attributes:
        recipe: gives the fastest placement: the recipe given, with patterns in `exclude` and without `tune`.
        milliseconds: median latency of each file that was timed: "quantized" (all), "float", and placements between.
        chosen: the key of the fastest.
        operations: in the order of the graph.
    """

    recipe: Recipe
    milliseconds: Mapping[str, float]
    chosen: str
    operations: tuple[OperationCost, ...]


def check_tunable(recipe: Recipe, target: Target) -> None:
    """Refuses a recipe whose tuning cannot be carried out.

    Raises:
        RecipeError: the target is not ONNX Runtime.
        RuntimeMissingError: onnxruntime is not installed.
    """
    if recipe.tune is None:
        return
    if target.name != ONNXRUNTIME.name:
        raise RecipeError(f"tune={recipe.tune!r} needs target 'onnxruntime', not {target.name!r}: set tune=None")
    session_options()


def one_sample(contract: InputContract, inputs: Inputs) -> Inputs:
    """The first sample of a batch, as a deployed model gets it; the batch where the graph does not take just one."""
    if not contract.divisible:
        return inputs
    first = pytree.tree_map_only(Tensor, lambda x: x[:1], inputs)
    try:
        return contract.check(*first)
    except DataError:
        return inputs


def tune_latency(
    captured: fx.Graph, quantized: fx.GraphModule, recipe: Recipe, inputs: Sequence[object], progress: bool = True
) -> Tuning:
    """Finds the operations that are better left in float.

    Args:
        captured: the folded graph, before quantizers were inserted.
        quantized: the same with quantizers and ranges.
        recipe: what it was quantized by.
        inputs: flat inputs of the graph: the latency is that of this batch.
        progress: whether bars are shown.
    """
    target = record_of(quantized).target
    assert target is not None
    plan = place(captured, target, recipe)
    if not plan.operations and not plan.weighted:  # float as it is: there is nothing to choose from
        return Tuning(dataclasses.replace(recipe, tune=None), {}, "quantized", ())
    arrays = [np.asarray(x.detach().cpu()) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    with tempfile.TemporaryDirectory(prefix="qdq-") as name:
        folder = Path(name)
        marked = MarkedFile(quantized)
        files = {
            "quantized": _save(marked, folder / "quantized.onnx", plan),
            "float": _save(marked, folder / "float.onnx", Plan()),
        }
        in_float, in_integers = operation_times([files["float"], files["quantized"]], arrays, progress=progress)
        costs = PlacementCosts(captured, plan, marked, in_float, in_integers, conversion_times())
        recipes = {"quantized": recipe, "float": dataclasses.replace(recipe, exclude=(*recipe.exclude, "*"))}
        for factor in _FACTORS:
            excluded = costs.better_in_float(factor)
            candidate = dataclasses.replace(recipe, exclude=(*recipe.exclude, *patterns_for(plan, excluded)))
            # `place` leaves more in float than was asked for, where nothing reads the codes of an operation any more.
            placed = place(captured, target, candidate)
            if candidate in recipes.values() or not placed.tensors:
                continue
            recipes[f"mixed {factor:g}"] = candidate
            files[f"mixed {factor:g}"] = _save(marked, folder / f"{factor}.onnx", placed)
        milliseconds = in_turn(files, arrays, progress=progress)
    chosen = fastest(milliseconds)
    placed = place(captured, target, recipes[chosen])
    operations = costs.table(placed)
    _tell(milliseconds, chosen, operations)
    return Tuning(dataclasses.replace(recipes[chosen], tune=None), milliseconds, chosen, operations)


def fastest(milliseconds: Mapping[str, float]) -> str:
    """The file to keep: the fastest of the quantized ones, unless float is faster than it by more than noise."""
    best = min((key for key in milliseconds if key != "float"), key=lambda key: milliseconds[key])
    if milliseconds["quantized"] <= milliseconds[best] * (1 + _MARGIN):
        best = "quantized"
    return "float" if milliseconds["float"] * (1 + _MARGIN) < milliseconds[best] else best


def in_turn(
    files: Mapping[str, Path], arrays: Sequence[np.ndarray], rounds: int = _ROUNDS, progress: bool = True
) -> dict[str, float]:
    """Milliseconds of one run of each file: the median over rounds in which each has its turn, in rotating order."""
    runs = {}
    for key, path in files.items():
        session = open_session(path, session_options())
        feed = {i.name: a for i, a in zip(session.get_inputs(), arrays, strict=True)}
        runs[key] = (session, feed)
    taken: dict[str, list[float]] = {key: [] for key in runs}
    keys = list(runs)
    for index in track(range(rounds), "timing placements", rounds, progress):
        shift = index % len(keys)
        for key in keys[shift:] + keys[:shift]:
            taken[key].append(_turn(*runs[key]))
    return {key: 1e3 * statistics.median(values) for key, values in taken.items()}


def _turn(session: object, feed: dict[str, np.ndarray]) -> float:
    """The lower quartile of the runs of one turn, in seconds: other work on the machine only adds to a run."""
    session.run(None, feed)  # type: ignore[attr-defined]
    samples: list[float] = []
    end = time.perf_counter() + _ROUND_SECONDS
    while len(samples) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, feed)  # type: ignore[attr-defined]
        samples.append(time.perf_counter() - start)
    return float(np.quantile(samples, 0.25))


def _save(marked: MarkedFile, path: Path, plan: Plan) -> Path:
    tensors = {tensor.name for tensor in plan.tensors}
    codes = {tensor.name for tensor in plan.integer}
    operands = {(t.name, node.name) for node, tensors in plan.operations.items() for t in tensors}
    integers = {node.name for node in plan.operations}
    weighted = {node.name for node in plan.weighted}

    def reads_codes(tensor: str, reader: str) -> bool:
        return tensor in tensors and (tensor in codes or (tensor, reader) in operands)

    return marked.save(path, reads_codes, integers.__contains__, weighted.__contains__)


def _tell(milliseconds: Mapping[str, float], chosen: str, operations: Sequence[OperationCost]) -> None:
    figures = ", ".join(f"{key} {value:.3f} ms" for key, value in milliseconds.items())
    if chosen == "float":
        logger.warning("in float the model is faster than with any part quantized, and stays so: %s", figures)
    else:
        count = sum(operation.quantized for operation in operations)
        logger.info("fastest: %s, with %d of %d operations quantized; %s", chosen, count, len(operations), figures)
    for operation in operations:
        logger.debug("%s", operation)
