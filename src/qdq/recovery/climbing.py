"""`qdq.recover`: tries recipe after recipe until the user's metric is near enough to that of the float model."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import numbers
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import api
from ..algorithms.layer import layers_of
from ..batches import Batches, signature_of
from ..calib.statistics import Statistics, count_samples
from ..deployable import check_for_target
from ..errors import CalibrationError, DataError, QdqError, RecipeError
from ..fingerprint import fingerprint
from ..graph.example import eval_copy, runs_on
from ..graph.parameters import device_of
from ..graph.record import has_record, record_of
from ..graph.targets import Target, find_target
from ..quantizer_sensitivity import sensitivity
from ..recipe import Recipe
from ..recipe_values import Override
from ..stand_in import StandIn
from .arguments import check_json, check_path, check_target, seconds_of
from .files import DeployedFiles
from .journal import (
    Journal,
    begin_journal,
    example_text,
    read_journal,
    remove_journal,
    restore_statistics,
    target_text,
    write_journal,
)
from .ladder import FULL_BITS, climb, same_recipe
from .result import Recovery, Rung, pareto_front

logger = logging.getLogger("qdq.recovery")

Evaluate = Callable[[nn.Module], float]
# `api.quantize` of the model, with all its arguments but data and recipe.
_Quantize = Callable[..., fx.GraphModule]

# Samples that layers are compared on.
_SAMPLES = 32


def recover(
    model: nn.Module,
    batches: Any,
    evaluate: Evaluate,
    target: float = 0.99,
    budget: float | str = "10min",
    *,
    deploy_target: str | Target = "onnxruntime",
    recipe: Recipe | None = None,
    journal: str | os.PathLike[str] | None = None,
    example_inputs: Any = None,
    inputs_of: Callable[[Any], Any] | None = None,
    dynamic_shapes: Any = None,
    progress: bool = True,
) -> Recovery:
    """Quantizes a model in better and better ways until it keeps a share of its accuracy, or the budget is spent.

    The recipe given comes first. Then one thing after another is changed that it has not yet: calibration and
    algorithms of the default recipe, equalization, weights per channel, AdaRound, 8 bits for weights of fewer, the
    worst layers with float activations and in float altogether, fine-tuning. What raises the metric is kept, and what
    comes next builds on it. All recipes are quantized from the statistics of one pass over the data. Each is evaluated
    in its simulation, exported for its size, and timed in turn with the float model.

    Args:
        model: float32; it is not changed.
        batches: calibration data, or `Statistics`, as for `qdq.quantize`.
        evaluate: takes a model, called as the user's own is, and gives a number: the larger the better, and above 0
            for the float model. The same model must always give the same number. It must not write into the model's
            parameters.
        target: the share of the float model's metric that is to be reached, above 0 and at most 1.
        budget: seconds, or text such as "90s", "10min", "1h". It is looked at before each rung but the first, so the
            call may take longer by its last rung.
        deploy_target: the runtime, as `target` of `qdq.quantize`.
        recipe: to begin with; None is `Recipe()`.
        journal: path of a JSON file that is written after every rung. The statistics are kept beside it. A later call
            with the same model, recipe, targets, metric, `example_inputs` and `dynamic_shapes` goes on from it, with a
            budget of its own; `batches` are then not looked at.
        example_inputs, inputs_of, dynamic_shapes, progress: as for `qdq.quantize`. The float model's file is made with
            the same `dynamic_shapes`.

    Returns:
        The best model, whether or not the target was reached, its recipe, and all that was measured.

    Raises:
        QdqError: a wrong argument, or a metric of the float model that is no number above 0.
        RecipeError: a budget that is no time, or a recipe that does not fit the model.
        DataError: data that do not fit the model; a journal that is damaged, that other arguments made, or that cannot
            be written.
        CaptureError, CalibrationError, ExportError: of the recipe given. A later rung that fails is recorded as failed,
            whatever the error. What `evaluate` raises by itself passes, at any rung; so does, where there is a journal
            to go on from, an unexpected error while layers are put in order.
    """
    start = time.monotonic()
    seconds = seconds_of(budget)
    share = check_target(target)
    if not isinstance(model, nn.Module):
        raise QdqError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if has_record(model):
        raise QdqError("model was returned by qdq.quantize, and is quantized: pass the float model")
    if not callable(evaluate):
        raise QdqError(f"evaluate must be a callable that takes a model, not {type(evaluate).__name__}")
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe must be a qdq.Recipe, not {type(recipe).__name__}; Recipe.load reads files")
    where = find_target(deploy_target)
    check_for_target(recipe, where)
    path = None if journal is None else check_path(journal)
    if path is not None:
        check_json(recipe)

    given = None
    if example_inputs is not None:
        given = Batches([example_inputs], signature_of(model.forward), inputs_of, runs_on(model)).first()
    known = read_journal(path) if path is not None and path.exists() else None
    asked: dict[str, Any] = {
        "model": fingerprint(model),
        "recipe": recipe,
        "deploy_target": target_text(where),
        "target": share,
        "example_inputs": None if given is None else example_text(given),
        "dynamic_shapes": None if dynamic_shapes is None else repr(dynamic_shapes),
    }
    quantize = functools.partial(
        api.quantize,
        model,
        target=where,
        example_inputs=example_inputs,
        progress=progress,
        inputs_of=inputs_of,
        dynamic_shapes=dynamic_shapes,
    )
    if known is not None and path is not None:
        known.check(path, asked)
        known.check(path, {"baseline": _baseline(evaluate, model)})
        statistics = restore_statistics(path, known).to(device_of(model))
    else:
        statistics = _collect(quantize, batches, recipe)
        begin = _without_tuning(quantize, statistics, recipe)
        known = Journal(**asked, start=begin, baseline=_baseline(evaluate, model))
        if path is not None:
            begin_journal(path, known, statistics)
    with tempfile.TemporaryDirectory(prefix="qdq-") as folder:
        example = statistics.first() if given is None else given
        files = DeployedFiles(model, example, where, Path(folder), dynamic_shapes)
        work = _Work(quantize, evaluate, files, statistics, known, path, progress)
        try:
            return work.run(start + seconds)
        except (RecipeError, CalibrationError):
            if path is not None and not (known.rungs or work.fits):
                remove_journal(path)  # of a recipe that does not fit: it would stand in the way of the corrected one
            raise


class _Work:
    """One climb, with the journal of what is done."""

    def __init__(
        self,
        quantize: _Quantize,
        evaluate: Evaluate,
        files: DeployedFiles,
        statistics: Statistics,
        journal: Journal,
        path: Path | None,
        progress: bool,
    ) -> None:
        self.quantize, self.evaluate, self.files = quantize, evaluate, files
        self.statistics, self.journal, self.path = statistics, journal, path
        self.progress = progress
        self.goal = journal.target * journal.baseline
        self.done: list[Rung] = []
        self.best: Rung | None = None
        # Whether a recipe could be applied: then errors are no longer the first one's.
        self.fits = False
        # The best rung's; None where the rung is from the journal, and nobody asked for the model yet.
        self._best_model: fx.GraphModule | None = None

    def run(self, deadline: float) -> Recovery:
        """Climbs until the goal is reached, the time is past or there is nothing left to try."""
        before = list(self.journal.rungs)
        rungs = climb(self.journal.start, lambda: self._best().recipe, self._worst)
        while not self._reached():
            if len(self.done) >= max(len(before), 1) and time.monotonic() >= deadline:
                logger.info("the budget is spent")
                break
            tried = next(rungs, None)
            if tried is None:
                break
            index = len(self.done)
            if index < len(before):
                self._replay(before[index], *tried)
            else:
                self._try(*tried)
        if len(self.done) < len(before):
            raise DataError(
                f"the journal {str(self.path)!r} holds more rungs than this qdq tries: it is of another "
                "version, or damaged; remove the file to begin anew"
            )
        best = self._best()
        assert best.metric is not None
        return Recovery(
            model=self._model(),
            recipe=best.recipe,
            reached=self._reached(),
            baseline=self.journal.baseline,
            goal=self.goal,
            metric=best.metric,
            rungs=tuple(self.done),
            front=pareto_front(self.done),
            float_size=self.journal.float_size,
        )

    def _reached(self) -> bool:
        return self.best is not None and self.best.metric is not None and self.best.metric >= self.goal

    def _best(self) -> Rung:
        assert self.best is not None
        return self.best

    def _model(self) -> fx.GraphModule:
        if self._best_model is None:
            self._best_model = self._quantize(self._best().recipe)
        return self._best_model

    def _quantize(self, recipe: Recipe) -> fx.GraphModule:
        return self.quantize(self.statistics, recipe=recipe)

    def _replay(self, rung: Rung, name: str, recipe: Recipe) -> None:
        if rung.name != name or not same_recipe(rung.recipe, recipe):
            raise DataError(
                f"rung {len(self.done)} of the journal {str(self.path)!r} is {rung.name!r}, where this qdq tries "
                f"{name!r} with its own recipe: it is of another version, or damaged; remove the file to begin anew"
            )
        self._note(dataclasses.replace(rung, recipe=recipe), None)

    def _try(self, name: str, recipe: Recipe) -> None:
        logger.info("%s ...", name)
        begun = time.monotonic()
        rung, made, evaluating = Rung(name, recipe), None, False
        try:
            made = self._quantize(recipe)
            self.fits = True
            quantized = time.monotonic()
            evaluating = True
            metric = _metric_of(self.evaluate, _Called(made), f"the rung {name!r}")
            if not math.isfinite(metric):
                raise QdqError(f"evaluate returned {metric} for the rung {name!r}: it must be finite")
            evaluating = False
            evaluated = time.monotonic()
            size, ratio = self.files.measure(made)
            logger.info(
                "%s: quantized in %.1f s, evaluated in %.1f s, exported and timed in %.1f s",
                name,
                quantized - begun,
                evaluated - quantized,
                time.monotonic() - evaluated,
            )
            self.journal.float_size = self.files.float_size
            rung = dataclasses.replace(rung, metric=metric, size=size, latency_ratio=ratio)
        except Exception as error:
            expected = isinstance(error, QdqError)
            # What the user's own function raises is the user's to know.
            if not self.done or (evaluating and not expected):
                raise
            if not expected:
                logger.warning("%s failed, which is recorded, and the next is tried", name, exc_info=True)
            rung = dataclasses.replace(rung, error=f"{type(error).__name__}: {error}")
        rung = dataclasses.replace(rung, seconds=time.monotonic() - begun)
        logger.info("%s", _told(rung, self.goal))
        self._note(rung, made)
        self.journal.rungs.append(rung)
        self._write()

    def _note(self, rung: Rung, made: fx.GraphModule | None) -> None:
        self.done.append(rung)
        if rung.metric is not None and (self.best is None or rung.metric > (self.best.metric or 0.0)):
            self.best, self._best_model = rung, made

    def _write(self) -> None:
        if self.path is not None:
            write_journal(self.path, self.journal)

    def _worst(self, change: str) -> list[list[str]]:
        """The layers by the error that each causes alone in the float model, in the best model's bits."""
        if change not in self.journal.orders:
            self.journal.orders[change] = self._order(change)
            self._write()
        return self.journal.orders[change]

    def _order(self, change: str) -> list[list[str]]:
        samples = self.statistics.samples
        count = 1
        while count < len(samples) and count_samples(samples[:count]) < _SAMPLES:
            count += 1
        rounding = change == "rounding"
        try:
            model, part = self._model(), Statistics({}, samples[:count])
            found = sensitivity(model, part, kinds=["weight" if rounding else "layer"], progress=self.progress)
        except Exception as error:
            # A journal keeps the order for good: what may go better another time (memory) is not to be kept, and what
            # was measured is in the journal. Without one nothing is kept but by going on.
            if self.path is not None and not isinstance(error, QdqError):
                raise
            logger.warning("which layers are the worst is not known, so none is changed alone: %s", error)
            return []
        if rounding:
            layers = {layer.name for layer in layers_of(model).values()}  # an embedding has a weight too
            return [list(e.patterns) for e in found if layers.issuperset(e.patterns)]
        return [list(e.patterns) for e in found if change == "float" or e.bits < FULL_BITS]


class _Called(StandIn):
    """What `evaluate` is given: called as the user's model is, in eval mode and on its device whatever is called."""

    def __init__(self, model: fx.GraphModule) -> None:
        self.contract = record_of(model).contract
        super().__init__(model, self.contract.signature)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.contract.check(*self.bind(args, kwargs))
        with torch.no_grad():
            return self.model(*args, **kwargs)


def _collect(quantize: _Quantize, batches: Any, recipe: Recipe) -> Statistics:
    """Of all quantizers that any rung may have."""
    widest = dataclasses.replace(
        recipe,
        algorithms={},
        calibration="max",
        weight_calibration="max",
        # What an override speaks of is quantized where the target would leave it in float. Those that change nothing
        # have the patterns of the recipe looked for in the model, before the pass over the data.
        overrides={**dict.fromkeys(recipe.patterns(), Override()), "*": Override(weights=recipe.weights)},
        exclude=(),
        tune=None,
    )
    statistics = record_of(quantize(batches, recipe=widest)).statistics
    assert statistics is not None
    return statistics


def _without_tuning(quantize: _Quantize, statistics: Statistics, recipe: Recipe) -> Recipe:
    """The recipe with what `tune` left in float: timings differ from call to call, and recipes must not."""
    if recipe.tune is None:
        return recipe
    ranges_alone = dataclasses.replace(recipe, algorithms={}, calibration="max", weight_calibration="max")
    tuned = record_of(quantize(statistics, recipe=ranges_alone)).recipe
    assert tuned is not None
    return dataclasses.replace(recipe, exclude=tuned.exclude, tune=None)


def _metric_of(evaluate: Evaluate, model: nn.Module, what: str) -> float:
    value: Any = evaluate(model)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise QdqError(f"evaluate must return a number, larger for a better model; for {what} it returned {value!r}")
    return float(value)


def _baseline(evaluate: Evaluate, model: nn.Module) -> float:
    value = _metric_of(evaluate, eval_copy(model), "the float model")
    if not math.isfinite(value) or value <= 0:
        raise QdqError(
            f"evaluate returned {value} for the float model: a share of it can be asked for where it is above 0; give "
            "a metric that is, such as 1 / loss"
        )
    return value


def _told(rung: Rung, goal: float) -> str:
    if rung.metric is None:
        return f"{rung.name}: failed after {rung.seconds:.1f} s: {rung.error}"
    size = "" if rung.size is None else f", {rung.size / 1024:.1f} KiB"
    latency = "" if rung.latency_ratio is None else f", latency {rung.latency_ratio:.2f}x that of float"
    return f"{rung.name}: metric {rung.metric:.6g} (goal {goal:.6g}){size}{latency}, {rung.seconds:.1f} s"
