"""`qdq.sensitivity`: which quantizers of a model cost its accuracy most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import fx, nn

from . import api
from .analysis.metric_sensitivity import Metric, metric_sensitivity
from .analysis.output_sensitivity import OutputSensitivity
from .analysis.sensitivity import KINDS, Sensitivity
from .batches import Batches
from .calib.statistics import Statistics
from .errors import DataError, QdqError
from .export.module_graph import has_quantizers
from .fingerprint import fingerprint
from .graph.example import eval_copy
from .graph.parameters import device_of
from .graph.record import has_record, record_of
from .graph.targets import Target
from .recipe import Recipe
from .stand_in import first_call, is_data_function


def sensitivity(
    model: nn.Module,
    batches: Any,
    metric: Metric | None = None,
    *,
    target: str | Target | None = None,
    recipe: Recipe | None = None,
    bits: int | Iterable[int] | None = None,
    kinds: Iterable[str] = ("activation", "weight"),
    float_model: nn.Module | None = None,
    samples_at_once: int | None = 16,
    example_inputs: Any = None,
    inputs_of: Callable[[Any], Any] | None = None,
    dynamic_shapes: Any = None,
    progress: bool = True,
) -> Sensitivity:
    """What each quantizer of a model costs: alone on in the float model, and alone off in the quantized one.

    The measure is the SQNR of the model's float outputs in dB. Only what lies behind a quantizer is run for it. With a
    metric the whole model is run over the metric's own data, twice per quantizer, and twice more for each of `bits`
    that the quantizer is tried at. The model is not changed.

    Args:
        model: what `qdq.quantize` returned; or a float model, which is quantized on the same batches first.
        batches: as for `qdq.quantize`; data that can be gone through twice where the model is float.
        metric: takes a model, called as the user's own is, and gives a number: the larger the better.
        target, recipe, example_inputs, dynamic_shapes: of a float model, as for `qdq.quantize`.
        bits: a number of bits or several, from 2 to 16, at which each quantizer is tried as well, its step size found
            anew; weights with at most 8.
        kinds: what is tried: "activation", "weight", and "layer" (weight and input at once, with its own bits alone).
        float_model: of a quantized model, the float model whose outputs are the reference for `quantized` and
            `alone_off`. None takes the graph with its quantizers off, whose biases are those that bias correction left,
            and whose weights are those of fine-tuning where the recipe has that. (Weights whose codes an algorithm
            chose are those from before.)
        samples_at_once: batches are run in parts of so many samples, where dimension 0 of all inputs is dynamic: all
            values of one part are kept in memory. None runs each batch whole.
        inputs_of, progress: as for `qdq.quantize`.

    Returns:
        An entry for each quantizer (and layer), the worst first; printing it gives a table.

    Raises:
        QdqError: a wrong argument, another float model than the quantized one was made from, a metric that gives no
            number, or a model without float outputs and no metric.
        DataError: no data, data that the model does not take, outputs none of which is finite, or statistics of
            another model.
        CaptureError, CalibrationError, RecipeError, RuntimeMissingError: of a float model, as `qdq.quantize` raises
            them.
    """
    numbers = _check_bits(bits)
    chosen = _check_kinds(kinds)
    if not isinstance(model, nn.Module):
        raise QdqError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if metric is not None and not callable(metric):
        raise QdqError(f"metric must be a callable that takes a model, not {type(metric).__name__}")
    if samples_at_once is not None and (type(samples_at_once) is not int or samples_at_once < 1):
        raise QdqError(f"samples_at_once must be a positive integer or None, not {samples_at_once!r}")
    if float_model is not None and (not isinstance(float_model, nn.Module) or has_record(float_model)):
        raise QdqError(f"float_model must be the float model that model was made from, not {_kind(float_model)}")
    if numbers and set(chosen) == {"layer"}:
        raise QdqError(
            "bits are tried of activations and weights, and layers with their own bits alone: add one of those to kinds"
        )
    if has_record(model):
        if any(given is not None for given in (target, recipe, example_inputs, dynamic_shapes)):
            raise QdqError(
                "model is quantized already: target, recipe, example_inputs and dynamic_shapes are for a float model"
            )
        quantized: Any = model
        _check_origin(quantized, batches, float_model)
    else:
        if has_quantizers(model):
            raise QdqError("model holds TensorQuantizers: pass what qdq.quantize returned, or the float model")
        if float_model is not None:
            raise QdqError("model is the float model itself: float_model is for one that qdq.quantize returned")
        if isinstance(batches, Iterator):
            raise DataError(
                "batches is a one-shot iterator, and is gone through twice, to quantize the float model and to try its "
                "quantizers: pass a list or a DataLoader"
            )
        to = "onnxruntime" if target is None else target
        quantized = api.quantize(
            model, batches, to, recipe, example_inputs, progress, inputs_of=inputs_of, dynamic_shapes=dynamic_shapes
        )
        float_model = model
    reference = None if float_model is None else eval_copy(float_model)
    return _of_graph(quantized, batches, metric, numbers, chosen, reference, samples_at_once, inputs_of, progress)


def _of_graph(
    model: fx.GraphModule,
    batches: Any,
    metric: Metric | None,
    bits: list[int],
    kinds: list[str],
    reference: nn.Module | None,
    samples_at_once: int | None,
    inputs_of: Callable[[Any], Any] | None,
    progress: bool,
) -> Sensitivity:
    contract, run = record_of(model).contract, batches
    data: Statistics | Batches | None = batches.to(device_of(model)) if isinstance(batches, Statistics) else None
    if data is None and not is_data_function(batches):
        data = Batches(batches, contract.signature, inputs_of, contract.fits)
    if metric is not None:
        example = first_call(model, run, contract.signature) if data is None else data.first()
        return metric_sensitivity(model, metric, example, kinds, bits, reference, progress)
    trials = OutputSensitivity(model, kinds, bits, reference, samples_at_once, progress)
    if data is None:
        run(trials)
    else:
        data.first()
        for args, kwargs in data.samples if isinstance(data, Statistics) else data:
            trials.measure(args, kwargs)
    if not trials.calls:
        raise DataError("the data function ran the model not once: it must call the model that it is given")
    return trials.result()


def _check_origin(quantized: fx.GraphModule, batches: Any, float_model: nn.Module | None) -> None:
    """Refuses statistics and a float model that are not of the model that the quantized one was made from."""
    known = record_of(quantized).statistics
    mark = None if known is None else known.model
    if mark is None:
        return
    if isinstance(batches, Statistics) and batches.model not in (None, mark):
        raise DataError(
            "batches are statistics of another float model than the one that model was quantized from: pass its own "
            "(qdq.calib.save of model), or batches"
        )
    if float_model is not None and fingerprint(float_model) != mark:
        raise QdqError(
            "float_model is not the float model that model was made from: its parameters, buffers, modules or their "
            "settings differ; pass the one that qdq.quantize was given, or None"
        )


def _check_bits(bits: Any) -> list[int]:
    numbers = [] if bits is None else list(bits) if isinstance(bits, (list, tuple, set, range)) else [bits]
    for number in numbers:
        if type(number) is not int or not 2 <= number <= 16:
            raise QdqError(f"bits must be an integer from 2 to 16 or a list of such, not {number!r}")
    return list(dict.fromkeys(numbers))


def _check_kinds(kinds: Any) -> list[str]:
    chosen = list(kinds) if isinstance(kinds, Iterable) and not isinstance(kinds, str) else [kinds]
    unknown = [kind for kind in chosen if not isinstance(kind, str) or kind not in KINDS]
    if unknown or not chosen:
        wrong = unknown[0] if unknown else chosen
        raise QdqError(f"kinds must be one or more of {', '.join(KINDS)}, not {wrong!r}")
    return chosen


def _kind(value: Any) -> str:
    return "a quantized one" if isinstance(value, nn.Module) else type(value).__name__
