"""`qdq.improve_modules`: the algorithms of recipes, applied to a calibrated model of quantized modules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ..algorithms.algorithm import Algorithm
from ..algorithms.bias_correction import BiasCorrection
from ..algorithms.equalization import Equalization
from ..algorithms.registry import algorithms_of
from ..algorithms.walk import Walk
from ..batches import Batches, signature_of
from ..calib.statistics import SampleKeeper
from ..calibration import constants_in_float
from ..errors import CalibrationError, DataError, QdqError
from ..export.module_graph import has_quantizers
from ..graph.example import runs_on
from ..graph.record import has_record, record_of
from ..progress import track
from ..recipe import Recipe
from .view import ModuleView

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


def improve_modules(
    model: M,
    batches: Any,
    algorithms: Mapping[str, Mapping[str, Any]] | Sequence[str],
    *,
    inputs_of: Callable[[Any], Any] | None = None,
    progress: bool = True,
    dynamic_shapes: Any = None,
) -> M:
    """Applies algorithms to a calibrated model of quantized modules, in place: all of them, or none after an error.

    What they do is what they do in `qdq.quantize(recipe=Recipe(algorithms=...))`: the eval-mode model is captured, and
    weights, biases, amax and means of batch norms get the values that the algorithms find in the graph. Ranges of
    activations stay as they were calibrated, but those of tensors that an algorithm has changed (equalization,
    SmoothQuant, AWQ) become the largest magnitudes over the samples. Multiplications of SmoothQuant become the
    `pre_quant_scale` of input quantizers. At most 128 samples of the batches are looked at.

    Layers whose weight is E4M3, unsigned, of more than 8 bits or with a learned range, that is read more than once
    (shared modules, tied weights, modules called twice) or computed from other parameters, stay as they are, which is
    logged. `bias_correction` corrects layers without a bias where a batch norm follows.

    Args:
        model: with modules of `qdq.nn`, calibrated. Its mode and its quantizers' stages stay as they are.
        batches: an iterable, on the model's device; one pass is made. As for `qdq.quantize`.
        algorithms: names in the order of their application, or names with options, as in `Recipe`.
        inputs_of, progress, dynamic_shapes: as for `qdq.quantize`.

    Returns:
        The model.

    Raises:
        QdqError: not a module with quantizers, or none of its weights can be improved (it is said why).
        RecipeError: an unknown algorithm or option.
        CalibrationError: quantizers without a range, or that still collect data; all such are named.
        CaptureError: `torch.export` cannot capture the model.
        DataError: no data, or data of the wrong shape or with NaN.
    """
    if not isinstance(model, nn.Module):
        raise QdqError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if has_record(model):
        raise QdqError("model was returned by qdq.quantize, which applies algorithms itself: name them in its recipe")
    if not has_quantizers(model):
        raise CalibrationError("the model has no quantizers: convert it with qdq.nn.quantize_modules first")
    recipe = Recipe(algorithms=algorithms)
    asked = algorithms_of(recipe.algorithms)
    data = Batches(batches, signature_of(model.forward), inputs_of, runs_on(model))
    with torch.inference_mode(False), torch.no_grad():
        view = ModuleView(model, data.first(), recipe, dynamic_shapes)
        for algorithm in asked:
            algorithm.check(view.graph_module.graph)
        _tell(view, asked)
        samples = _samples(view, data, progress)
        _run(view, asked, samples, progress)
        view.write()
    return model


def _samples(view: ModuleView, data: Batches, progress: bool) -> list[list[Any]]:
    contract = record_of(view.graph_module).contract
    keeper = SampleKeeper(divisible=contract.divisible)
    for index, (args, kwargs) in enumerate(track(data, "collecting samples", data.total, progress)):
        try:
            keeper.add(contract.check(args, kwargs))
        except DataError as error:
            raise DataError(f"batch {index}: {error}") from None
    return [contract.flatten(inputs) for inputs in keeper.samples()]


def _run(view: ModuleView, asked: Sequence[Algorithm], samples: list[list[Any]], progress: bool) -> None:
    graph_module = view.graph_module
    preparing = [a for a in asked if type(a).prepare is not Algorithm.prepare]
    if preparing:
        before = view.extremes(samples, progress)
        with constants_in_float(graph_module):
            changed = [algorithm.prepare(graph_module, samples, progress) for algorithm in preparing]
        for algorithm, has_changed in zip(preparing, changed, strict=True):
            if not has_changed:
                norms = "; batch norms part layers: fuse them before the conversion (torch.nn.utils.fusion)"
                logger.warning(
                    "%s found nothing to change%s", algorithm.name, norms if isinstance(algorithm, Equalization) else ""
                )
        if any(changed):
            view.widen(before, view.extremes(samples, progress))
    walk = Walk(graph_module, samples)
    walk.run([*asked], progress)
    for algorithm in asked:
        algorithm.finish(walk, progress)


def _tell(view: ModuleView, asked: Sequence[Algorithm]) -> None:
    left = "; ".join(f"{path}: {reason}" for path, reason in view.left.items())
    if not view.layers:
        told = left or "no weight of a convolution or linear is quantized"
        raise QdqError(f"no weight of this model can be improved: {told}")
    if left:
        logger.warning("these weights stay as they are: %s", left)
    without = [layer.name for layer in view.layers if layer.bias is None]
    if without and any(isinstance(algorithm, BiasCorrection) for algorithm in asked):
        logger.warning("bias_correction leaves layers without a bias alone: %s", ", ".join(without))
