"""The public calls: each a page that reads as the recipe it is."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .analysis.fidelity import Agreement, Fidelity, compare
from .analysis.latency import Speed, measure
from .atomic_file import path_of
from .batches import Batches, Inputs, signature_of
from .calib.statistics import Statistics
from .calibration import collect, find_ranges
from .deployable import check_for_target
from .errors import CaptureError, DataError, QdqError, RecipeError
from .export.integer_layers import quantize_outputs, store_constants
from .export.lowering import lower
from .export.module_graph import check_stages, convert_quantizers, has_quantizers, is_quantized, keep_quantizers
from .export.onnx import check_writable, target_of_file, write_onnx
from .fingerprint import fingerprint
from .graph.capture import capture
from .graph.contract import InputContract
from .graph.example import eval_copy, runs_on
from .graph.explanation import Explanation
from .graph.fold import fold
from .graph.insert import insert
from .graph.outputs import output_names, output_quantizers
from .graph.parameters import device_of
from .graph.place import check_patterns, place
from .graph.record import KEY, Record, has_record, record_of
from .graph.targets import ONNXRUNTIME, Target, find_target, reduces_range
from .improvement import improve
from .kept_memory import freed_memory_kept
from .modes import plain_modes
from .progress import track
from .quiet import pytorch_internals
from .recipe import Recipe
from .stand_in import first_call, is_data_function
from .tuning.latency import one_sample, tune_latency

logger = logging.getLogger("qdq.api")


@freed_memory_kept()
@plain_modes()
def quantize(
    model: nn.Module,
    batches: Any,
    target: str | Target = "onnxruntime",
    recipe: Recipe | None = None,
    example_inputs: Any = None,
    progress: bool = True,
    *,
    inputs_of: Callable[[Any], Any] | None = None,
    dynamic_shapes: Any = None,
) -> fx.GraphModule:
    """A calibrated, fake-quantized copy of a trained model: the simulation of its deployment.

    Args:
        model: float32; neither it nor its train/eval mode is changed. The copy computes as in eval mode.
        batches: calibration data: an iterable of tensors, tuples (positional arguments) or dicts (keyword arguments),
            or a callable that takes a model and runs it. A tuple's items beyond the parameters of `forward` (a label)
            are dropped; `((a, b), label)` and `({...}, label)` are unwrapped; where `forward` could take a batch in two
            ways, the one that the model runs on is meant. One pass is made. A callable is called twice, the first time
            for its first batch alone, unless `example_inputs` are given: one that goes through a generator made outside
            of it loses that batch without them. Or the `Statistics` of an earlier calibration of the same model
            (`qdq.calib.load`), for another recipe, target or number of bits without the data.
        target: "onnxruntime", "openvino", "tensorrt", or a `Target`: one of `qdq.graph.targets` with other fields.
        recipe: None is `Recipe()`.
        example_inputs: what the model is captured with, like one batch; None takes the first batch.
        progress: whether progress bars are shown (on a terminal).
        inputs_of: takes a batch and gives the model's inputs, where the rules above do not fit.
        dynamic_shapes: as `torch.export.export` takes them; None makes dimension 0 of every input dynamic, "static"
            nothing.

    Returns:
        A GraphModule with the model's own module and parameter names; `qdq.explain` says what was quantized.

    Raises:
        CaptureError: `torch.export` cannot capture the model, or a parameter of it holds NaN.
        DataError: no data, data of the wrong shape or with NaN, or data that the model fails on; statistics of another
            model, or whose inputs the captured graph does not take.
        RecipeError: an unknown target, algorithm or option of one, a pattern of the recipe that matches nothing, bits
            that the target does not take, overrides that ask for different codes of one weight, or `tune` for another
            target than "onnxruntime".
        CalibrationError: a quantizer saw no data, or the data leave GPTQ's Hessian singular.
        RuntimeMissingError: the recipe has `tune`, and the extra `onnx` is not installed.
        QdqError: model is no module, or was returned by `quantize` itself. All of these derive from it.
    """
    target = find_target(target)
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe must be a qdq.Recipe, not {type(recipe).__name__}; Recipe.load reads files")
    algorithms = check_for_target(recipe, target)
    _check_model(model)
    if has_record(model):
        raise QdqError("model was returned by qdq.quantize, and is quantized: pass the float model")
    signature = signature_of(model.forward)
    runs = runs_on(model)
    data: Any = batches
    if isinstance(data, Statistics):
        if data.model is not None:
            data.check_model(fingerprint(model))
        data = data.to(device_of(model))
    if not isinstance(batches, Statistics) and not is_data_function(batches):
        data = Batches(batches, signature, inputs_of, runs)
    if example_inputs is not None:
        example = Batches([example_inputs], signature, inputs_of, runs).first()
    elif isinstance(data, Statistics):
        example = data.first()
    else:
        example = data.first() if isinstance(data, Batches) else first_call(model, data, signature)

    graph_module = fold(capture(model, *example, dynamic_shapes=dynamic_shapes))
    contract = InputContract(graph_module.graph, signature, example)
    contract.try_parts(graph_module, example)
    check_patterns(graph_module.graph, recipe, dict(model.named_modules(remove_duplicate=False)))
    for algorithm in algorithms:
        algorithm.check(graph_module.graph)
    captured = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    graph_module = _with_quantizers(graph_module, contract, target, recipe)
    known = isinstance(data, Statistics)
    mark = data.model if known else fingerprint(model)
    seen = _with_inputs_checked(data, contract) if known else collect(graph_module, data, progress, model)
    if recipe.tune:
        seen = find_ranges(graph_module, seen, progress)
        timed = example if example_inputs is not None else one_sample(contract, example)
        recipe = tune_latency(captured.graph, graph_module, recipe, contract.flatten(timed), progress).recipe
        graph_module = _with_quantizers(captured, contract, target, recipe)
    _tell_if_all_float(explain(graph_module))
    improved = improve(graph_module, seen, recipe, progress)
    statistics = Statistics(improved.statistics.histograms, improved.statistics.samples, mark)
    graph_module.meta[KEY] = dataclasses.replace(
        record_of(graph_module), statistics=statistics, seen=improved.seen, unrounded=improved.unrounded
    )
    return graph_module


@plain_modes()
def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    target: str | Target | None = None,
    dynamic_shapes: Any = None,
) -> Path:
    """Writes a quantized model as a Q/DQ ONNX file, or a float model as a float ONNX file.

    Weights are stored as integers with DequantizeLinear. Linears that `quantize` has left to compute from float
    activations are stored as MatMulNBits of com.microsoft for "onnxruntime" (docs/recipes.md, "Weights of few bits in
    files"). The file is checked and put in place at once.

    Of a model with `TensorQuantizer`s (`qdq.nn`) the file computes what the model does in eval mode, whose values and
    mode are not changed: each quantizer that is on becomes QuantizeLinear and DequantizeLinear. For "onnxruntime"
    signed activations are stored as uint8 with zero point 128, or 0 behind a ReLU, and codes are clipped where the
    quantizer has fewer than 8 bits or a narrow range; batch norms are folded into the step sizes of the weights before
    them; biases of integer layers are rounded to int32 of step input step x weight step.

    Args:
        model: what `quantize` returned; or any other module, with `example_inputs`.
        path: of the file; its folder must exist.
        example_inputs: of a module: one batch (tensor, tuple or dict), with dimension 0 dynamic.
        target: of a module with quantizers, as for `quantize`; None is "onnxruntime". What `quantize` returned has a
            target already.
        dynamic_shapes: of a module, as for `quantize`.

    Raises:
        QdqError: `path` is no path.
        ExportError: the path cannot be written, PyTorch's exporter does not know an operation, or the target has no
            codes for a quantizer.
        CalibrationError: a quantizer has no range, or still collects data; all such are named.
        CaptureError: `torch.export` cannot capture the module.
        RuntimeMissingError: the extra `onnx` is not installed.
    """
    path = path_of(path)
    check_writable(path)
    _check_model(model)
    metadata = {"producer": "qdq"}
    if not has_record(model):
        if example_inputs is None:
            kind = "Q/DQ" if has_quantizers(model) else "float"
            raise QdqError(
                f"model is a {type(model).__name__} that qdq.quantize did not make: to write it as {kind} ONNX, pass "
                "example_inputs"
            )
        signature = signature_of(model.forward)
        example = Batches([example_inputs], signature, runs=runs_on(model)).first()
        model = _captured(model, example, dynamic_shapes, find_target(ONNXRUNTIME if target is None else target))
    elif target is not None and find_target(target) is not record_of(model).target:
        asked, made = find_target(target).name, getattr(record_of(model).target, "name", None)
        raise QdqError(f"model was quantized for {made!r}, not for {asked!r}: quantize it for that target")
    record = record_of(model)
    opset = (record.target or ONNXRUNTIME).opset
    if record.target is not None:
        metadata["qdq.target"] = record.target.name
    assert isinstance(model, fx.GraphModule)
    with pytorch_internals():
        lowered = lower(model)
    return write_onnx(lowered, path, record.contract.names, list(record.output_names), opset, metadata)


@plain_modes()
def verify(
    qmodel: nn.Module,
    path: str | os.PathLike[str],
    batches: Any,
    *,
    agreement: Agreement | None = None,
    per_tensor: bool = False,
    inputs_of: Callable[[Any], Any] | None = None,
    progress: bool = True,
    dynamic_shapes: Any = None,
) -> Fidelity:
    """Runs an exported file in the target's runtime and compares it with its simulation.

    Args:
        qmodel: what `quantize` returned; or a model with `TensorQuantizer`s, which is its own simulation, in eval mode.
        path: what `export_onnx` wrote from it.
        batches: as for `quantize`.
        agreement: takes the first output of simulation and file (tensors of one batch) and gives a share from 0 to 1;
            None compares the argmax over the last axis.
        per_tensor: whether printing the result lists every quantized tensor.
        inputs_of, progress: as for `quantize`.
        dynamic_shapes: of a model with `TensorQuantizer`s, as for `export_onnx`.

    Returns:
        The fidelity. A TensorRT file is run in ONNX Runtime, which executes the same Q/DQ definition.

    Raises:
        DataError: no data, or data or a file of another model.
        ExportError: the file is missing or the runtime refuses it.
        QdqError: `path` is no path; `agreement` cannot be called, or gives no share from 0 to 1.
    """
    if agreement is not None and not callable(agreement):
        raise QdqError(f"agreement must be a callable of two tensors, not {type(agreement).__name__}")
    path = path_of(path)
    simulation: nn.Module | None = None
    if isinstance(qmodel, nn.Module) and not has_record(qmodel) and has_quantizers(qmodel):
        signature, runs = signature_of(qmodel.forward), runs_on(qmodel)
        data = batches if is_data_function(batches) else Batches(batches, signature, inputs_of, runs)
        example = data.first() if isinstance(data, Batches) else first_call(qmodel, data, signature)
        simulation = eval_copy(qmodel)
        qmodel = _captured(qmodel, example, dynamic_shapes, target_of_file(path))
        batches = data
    record = record_of(qmodel)
    assert isinstance(qmodel, fx.GraphModule)
    if is_data_function(batches):
        return compare(qmodel, str(path), batches, agreement, per_tensor, simulation)
    if not isinstance(batches, Batches):
        batches = Batches(batches, record.contract.signature, inputs_of, record.contract.fits)
    feed = track(batches, "verifying", batches.total, progress)
    return compare(qmodel, str(path), feed, agreement, per_tensor, simulation)


def explain(qmodel: nn.Module) -> Explanation:
    """Every tensor of a quantized model: quantized or not, by which rule, shared with whom, and why not if not.

    Its `recipe` is what the model was quantized by.

    Raises:
        QdqError: not a model that `quantize` returned.
    """
    if isinstance(qmodel, nn.Module) and not has_record(qmodel) and has_quantizers(qmodel):
        raise QdqError(
            "explain says where qdq.quantize placed quantizers; in this model they are modules: print(model) shows them"
        )
    explanation = record_of(qmodel).explanation
    assert explanation is not None
    return explanation


def benchmark(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    inputs: Any = None,
    batch_size: int = 1,
    threads: int | None = None,
    rounds: int = 30,
    progress: bool = True,
) -> Speed:
    """Times an ONNX file in ONNX Runtime, in turn with another one.

    Args:
        path, against: the files. Rounds of the two alternate; medians and the spread of their ratio are reported.
        inputs: one batch: an array or tensor, a sequence of them in the order of the file's inputs, or a dict by name;
            None draws normal values.
        batch_size: of the values drawn.
        threads: threads of one operation; None leaves it to the runtime.
        rounds: how many, of about 50 ms a file each.
        progress: whether a progress bar is shown (on a terminal).

    Raises:
        QdqError: `path` or `against` is no path.
        ExportError: a file is missing or the runtime refuses it.
        DataError: inputs do not fit, or are needed because the file's shapes or dtypes do not tell them.
    """
    path, against = path_of(path), None if against is None else path_of(against, "against")
    arrays = None if inputs is None else _arrays(inputs)
    return measure(path, against, arrays, batch_size, threads, rounds, progress)


def _with_quantizers(
    graph_module: fx.GraphModule, contract: InputContract, target: Target, recipe: Recipe
) -> fx.GraphModule:
    """The captured graph with quantizers placed in it, without ranges, and the record of its making."""
    names = tuple(output_names(graph_module))
    plan = place(graph_module.graph, target, recipe)
    graph_module, explanation = insert(graph_module, plan, target, recipe)
    graph_module.meta[KEY] = Record(
        contract=contract,
        output_names=names,
        target=target,
        recipe=recipe,
        reduced_range=reduces_range(target, recipe.reduce_range),
        explanation=explanation,
        outputs=tuple(output_quantizers(graph_module)),
    )
    return graph_module


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise QdqError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("model is TorchScript, which torch.export cannot capture: pass the nn.Module it came from")


def _with_inputs_checked(statistics: Statistics, contract: InputContract) -> Statistics:
    samples = []
    for index, (args, kwargs) in enumerate(statistics.samples):
        try:
            samples.append(contract.check(args, kwargs))
        except DataError as error:
            raise DataError(
                f"batch {index} of the inputs that the statistics hold: {error}; give dynamic_shapes and "
                "example_inputs as they were when the statistics were collected, or batches, to calibrate anew"
            ) from None
    return Statistics(statistics.histograms, samples, statistics.model)


def _tell_if_all_float(explanation: Explanation) -> None:
    if any(entry.quantized for entry in explanation):
        return
    reasons = Counter(entry.reason for entry in explanation).most_common(1)
    reason = reasons[0][0] if reasons else "it has no float tensors"
    logger.warning("no operation of this model was quantized: %s; see qdq.explain", reason)


def _captured(model: nn.Module, example: Inputs, dynamic_shapes: Any, target: Target) -> fx.GraphModule:
    """A module as a graph ready to be lowered, with the codes of `target` where something is quantized."""
    check_stages(model)
    graph_module = fold(keep_quantizers(capture(model, *example, dynamic_shapes=dynamic_shapes)))
    contract = InputContract(graph_module.graph, signature_of(model.forward), example)
    names = tuple(output_names(graph_module))
    if not is_quantized(graph_module):
        graph_module.meta[KEY] = Record(contract, names)
        return graph_module
    reduced = reduces_range(target, None)
    coded = convert_quantizers(graph_module, target)
    quantize_outputs(graph_module, coded, target)
    store_constants(graph_module, coded, target, reduced)
    graph_module.graph.lint()
    graph_module.recompile()
    outputs = tuple(output_quantizers(graph_module))
    graph_module.meta[KEY] = Record(contract, names, target, reduced_range=reduced, outputs=outputs)
    return graph_module


def _arrays(inputs: Any) -> Sequence[np.ndarray] | dict[str, np.ndarray]:
    if isinstance(inputs, dict):
        return {str(name): _array(value) for name, value in inputs.items()}
    if isinstance(inputs, (Tensor, np.ndarray)):
        return [_array(inputs)]
    if not isinstance(inputs, (list, tuple)):
        raise DataError(f"inputs must be an array, a list of arrays or a dict of them, not {type(inputs).__name__}")
    return [_array(value) for value in inputs]


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
