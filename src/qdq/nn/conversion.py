"""Conversion of an existing model: its modules become quantized ones in place, and float ones again."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..descriptor import QuantDescriptor
from ..errors import QdqError, RecipeError
from ..quantizer import TensorQuantizer
from ..recipe import Recipe, matches
from .attention import QuantMultiheadAttention
from .conv import QuantConv1d, QuantConv2d, QuantConv3d
from .conv_transpose import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from .embedding import QuantEmbedding
from .gru import QuantGRU
from .linear import QuantLinear
from .lstm import QuantLSTM, QuantLSTMCell
from .pooling import (
    QuantAdaptiveAvgPool1d,
    QuantAdaptiveAvgPool2d,
    QuantAdaptiveAvgPool3d,
    QuantAvgPool1d,
    QuantAvgPool2d,
    QuantAvgPool3d,
)
from .quantized_module import QuantInputMixin, QuantMixin, QuantWeightMixin

_log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

# Float class -> quantized class. Max pools pick values and instance norms are computed in float by runtimes: both gain
# nothing from a quantized input, so they stay in float unless a model is written with their quantized classes.
QUANTIZED_CLASSES: dict[type[nn.Module], type[Any]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.LSTM: QuantLSTM,
    nn.LSTMCell: QuantLSTMCell,
    nn.GRU: QuantGRU,
    nn.Embedding: QuantEmbedding,
    nn.MultiheadAttention: QuantMultiheadAttention,
    nn.AvgPool1d: QuantAvgPool1d,
    nn.AvgPool2d: QuantAvgPool2d,
    nn.AvgPool3d: QuantAvgPool3d,
    nn.AdaptiveAvgPool1d: QuantAdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d: QuantAdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d: QuantAdaptiveAvgPool3d,
}
_FLOAT_CLASSES: dict[type[Any], type[nn.Module]] = {
    quantized: float_ for float_, quantized in QUANTIZED_CLASSES.items()
}

# Kept here, because names in torch.nn may be replaced later (qdq.nn.replacement).
_Attention, _Embedding = nn.MultiheadAttention, nn.Embedding

# What sends a whole encoder through a fused kernel that reads the weights itself, and the value that does not.
_FUSED_PATHS = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_SAVED = "_before_quantization_"
_OWN_QUANTIZER = re.compile(r"_\w+_quantizers?")
# Fields of a recipe without a meaning here, and what takes their place.
_CALIBRATING = "qdq.calibrating(model, method=...) and qdq.calib.calibrate_weights take a method"
_UNUSED_FIELDS = {
    "calibration": _CALIBRATING,
    "percentile": _CALIBRATING,
    "weight_calibration": _CALIBRATING,
    "algorithms": "qdq.improve_modules runs algorithms on a calibrated model",
    "reduce_range": "qdq.export_onnx decides by its target",
    "tune": "tuning is for qdq.quantize",
}


@dataclasses.dataclass(frozen=True)
class _Change:
    """One module to convert: its path, its new class, and the arguments of its `add_quantizers`."""

    path: str
    module: nn.Module
    quantized: type[Any]
    descriptors: tuple[QuantDescriptor, ...]


def quantize_modules(model: M, recipe: Recipe | None = None) -> M:
    """Converts the modules of a model to quantized ones, in place; `torch.nn` itself is not touched.

    Converted: Linear, Conv1d to 3d, ConvTranspose1d to 3d, LSTM, LSTMCell, GRU, Embedding, MultiheadAttention, and the
    inputs of AvgPool1d to 3d and AdaptiveAvgPool1d to 3d. Max pools and instance norms are not. A converted module
    stays the same object, with its parameters, hooks, device, dtype and training flag; its class becomes the quantized
    one and it gains quantizers, so that optimizers and state dicts of the float model still fit. A module registered in
    several places is converted once, and one that is quantized already stays as it is.

    Left in float, and named by a log line: subclasses of these classes (their forward is not known; those that
    `torch.nn.utils.parametrize` makes are among them), modules whose `forward` was replaced on the instance, LSTM
    with `proj_size`, and Embedding with `sparse=True`.

    The fused path of `nn.TransformerEncoderLayer` and the nested tensors of `nn.TransformerEncoder` would walk around
    the quantizers. They are turned off where something inside was converted; so convert an encoder, not its parts.

    Args:
        model: any module; it may itself be, say, a Linear.
        recipe: its `weights` and `activations` are the descriptors, where `axis=0` of weights means their output
            channels, and `block_size` is for those of Linear alone; `overrides` and `exclude` are matched with module
            paths and parameter names (an attention module is one unit); `attention=False` leaves the products of
            attention in float. Where activations have an `amax`, it is kept, and the quantizers have no calibrator. The
            fields about calibration, algorithms and runtimes have no meaning here, which a log line says where they are
            set: `qdq.calibrating` takes a method, `qdq.improve_modules` runs algorithms. None takes the default
            descriptors of the quantized classes (`QuantLinear.set_default_quant_desc_input`, ...).

    Returns:
        `model`, ready for `qdq.calibrating`.

    Raises:
        QdqError: not a module; TorchScript; a lazy module that has not run yet. Nothing is converted.
        RecipeError: not a Recipe, or a pattern that matches nothing. Nothing is converted.
        ValueError: a descriptor that a layer does not take, such as one with an axis for attention. As above.
    """
    _check_model(model)
    if recipe is not None and not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe must be a qdq.Recipe, not {type(recipe).__name__}; Recipe.load reads files")
    if recipe is not None:
        recipe.check_modules()
    changes, left = _plan(model, recipe)
    done: list[nn.Module] = []
    try:
        for change in changes:
            done.append(change.module)
            _convert(model, change, recipe)
    except Exception:
        for module in done:
            _to_float(module)
        raise
    _leave_fused_paths(model)
    if recipe is not None:
        _tell_of_unused_fields(recipe)
    if left:
        _log.warning("left in float: %s", "; ".join(f"{path or 'the model'} ({why})" for path, why in left))
    return model


def dequantize_modules(model: M) -> M:
    """Takes :func:`quantize_modules` back, in place: float classes, no quantizers, the state-dict keys of before.

    Weights stay as they are. Modules that were built as quantized ones become float ones just the same. Quantizers of
    classes that have no float class (`QuantAdd`, your own) remain, and a log line names them.

    Raises:
        QdqError: not a module.
    """
    _check_model(model)
    for module in model.modules():
        _to_float(module)
    remaining = [name for name, module in model.named_modules() if isinstance(module, TensorQuantizer)]
    if remaining:
        _log.warning("quantizers of modules without a float class remain: %s", ", ".join(remaining))
    _restore_fused_paths(model)
    return model


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise QdqError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise QdqError("model is TorchScript, whose modules cannot be converted: pass the nn.Module it came from")


def _paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all the paths it is registered under, but for the parts of attention modules.

    These compute with the parameters of their children and do not call them.
    """
    paths: dict[nn.Module, list[str]] = {}
    parts: set[nn.Module] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
        if isinstance(module, _Attention):
            parts.update(module.children())
    return {module: names for module, names in paths.items() if module not in parts}


def _parameters(module: nn.Module, path: str) -> list[str]:
    prefix = f"{path}." if path else ""
    return [prefix + name for name, _ in module.named_parameters(recurse=False)]


def _check_patterns(paths: dict[nn.Module, list[str]], recipe: Recipe) -> None:
    known = {name for module, names in paths.items() for path in names for name in (path, *_parameters(module, path))}
    for pattern in recipe.patterns():
        if not any(matches(pattern, name) for name in known):
            modules = [name for names in paths.values() for name in names if name][:8]
            raise RecipeError(
                f"recipe pattern {pattern!r} matches no module of the model; modules are such as {modules}"
            )


def _plan(model: nn.Module, recipe: Recipe | None) -> tuple[list[_Change], list[tuple[str, str]]]:
    """What to convert, and what stays in float against expectation (path, why). Nothing is changed."""
    paths = _paths(model)
    if recipe is not None:
        _check_patterns(paths, recipe)
    changes: list[_Change] = []
    left: list[tuple[str, str]] = []
    for module, names in paths.items():
        if not isinstance(module, tuple(QUANTIZED_CLASSES)) or _is_quantized(module):
            continue
        weights = activations = None
        if recipe is not None:
            known = (*names, *(name for path in names for name in _parameters(module, path)))
            if not recipe.for_name(*known).quantize:
                continue
            weights, activations = recipe.weights_for(*known), recipe.activations_for(*known)
        quantized = QUANTIZED_CLASSES.get(type(module))
        why = _about_subclass(module, names[0]) if quantized is None else _unsupported(module)
        if quantized is None or why:
            left.append((names[0], why))
        else:
            changes.append(_Change(names[0], module, quantized, _descriptors(quantized, weights, activations)))
    return changes, left


def _tell_of_unused_fields(recipe: Recipe) -> None:
    default = Recipe()
    unused = {n: hint for n, hint in _UNUSED_FIELDS.items() if getattr(recipe, n) != getattr(default, n)}
    if any(override.calibration is not None for override in recipe.overrides.values()):
        unused["calibration of overrides"] = _CALIBRATING
    if unused:
        _log.warning(
            "quantize_modules does not use these fields of the recipe: %s; %s",
            ", ".join(unused),
            "; ".join(dict.fromkeys(unused.values())),
        )


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, (QuantMixin, QuantInputMixin, QuantWeightMixin)) or any(
        isinstance(child, TensorQuantizer) for child in module.children()
    )


def _unsupported(module: nn.Module) -> str:
    """Why a module of a known class is left in float, or nothing."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if isinstance(module, nn.RNNBase) and module.proj_size:
        return "proj_size is not supported"
    if isinstance(module, _Embedding) and module.sparse:
        return "sparse gradients cannot pass a quantizer"
    return ""


def _about_subclass(module: nn.Module, path: str) -> str:
    if isinstance(module, LazyModuleMixin):
        raise QdqError(
            f"module {path or 'model'!r} is a {type(module).__name__} that has not run yet: run the model once on a "
            "batch before quantize_modules, or exclude it"
        )
    if parametrize.is_parametrized(module):
        return "it is parametrized: use remove_parametrizations first"
    return f"{type(module).__name__} is a subclass with a forward that is not known"


def _descriptors(
    quantized: type[Any], weights: QuantDescriptor | None, activations: QuantDescriptor | None
) -> tuple[QuantDescriptor, ...]:
    """Arguments of `add_quantizers`: the recipe's descriptors, or the defaults of the class."""
    found: list[QuantDescriptor] = []
    if hasattr(quantized, "default_quant_desc_input"):
        found.append(activations or quantized.default_quant_desc_input)
    if hasattr(quantized, "default_quant_desc_weight"):
        default = quantized.default_quant_desc_weight
        if weights is not None and weights.block_size is not None and not issubclass(quantized, QuantLinear):
            whole: dict[str, Any] = {**weights.dict(), "block_size": None}
            weights = QuantDescriptor(**whole)
        if weights is not None and weights.axis is not None and issubclass(quantized, _ConvTransposeNd):
            fields: dict[str, Any] = {**weights.dict(), "axis": 1}  # where its output channels are
            weights = QuantDescriptor(**fields)
        found.append(weights or default)
    return tuple(found)


def _convert(model: nn.Module, change: _Change, recipe: Recipe | None) -> None:
    module: Any = change.module
    before = set(module.modules())
    module.__class__ = change.quantized
    module.add_quantizers(*change.descriptors)
    device = _device(model, change.path)
    for quantizer in module.modules():
        if quantizer in before:
            continue
        quantizer.train(module.training)
        if device is not None:
            quantizer.to(device)
        if recipe is not None and isinstance(quantizer, TensorQuantizer) and quantizer.amax is not None:
            quantizer._calibrator = None
    if recipe is not None and recipe.attention is False and isinstance(module, QuantMultiheadAttention):
        for operand in (module._q_quantizer, module._k_quantizer, module._probs_quantizer, module._v_quantizer):
            operand.disable()


def _device(model: nn.Module, path: str) -> torch.device | None:
    """Of the module's first tensor, or else that of the nearest module around it that has one."""
    while True:
        module = model.get_submodule(path)
        tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
        if tensor is not None:
            return None if tensor.device.type == "meta" else tensor.device  # on meta an amax would lose its value
        if not path:
            return None
        path = path.rpartition(".")[0]


def _to_float(module: nn.Module) -> None:
    float_class = _FLOAT_CLASSES.get(type(module))
    if float_class is None:
        return
    for name, child in list(module.named_children()):
        of_list = isinstance(child, nn.ModuleList) and len(child) and all(isinstance(q, TensorQuantizer) for q in child)
        # The names that layers give theirs; others are the user's own.
        if _OWN_QUANTIZER.fullmatch(name) and (of_list or isinstance(child, TensorQuantizer)):
            delattr(module, name)
    module.__class__ = float_class


def _leave_fused_paths(model: nn.Module) -> None:
    for module in model.modules():
        for kind, switch, off in _FUSED_PATHS:
            if isinstance(module, kind) and getattr(module, switch, off) and _holds_quantizers(module):
                setattr(module, _SAVED + switch, getattr(module, switch))
                setattr(module, switch, off)


def _restore_fused_paths(model: nn.Module) -> None:
    for module in model.modules():
        for kind, switch, _ in _FUSED_PATHS:
            if isinstance(module, kind) and hasattr(module, _SAVED + switch) and not _holds_quantizers(module):
                setattr(module, switch, getattr(module, _SAVED + switch))
                delattr(module, _SAVED + switch)


def _holds_quantizers(module: nn.Module) -> bool:
    return any(isinstance(inner, TensorQuantizer) for inner in module.modules())
