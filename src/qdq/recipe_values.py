"""The values of a recipe's fields: what they may be, how they are told in plain data, and how they are read from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from .descriptor import QuantDescriptor
from .errors import RecipeError

CALIBRATION_METHODS = ("auto", "max", "percentile", "mse", "entropy")
WEIGHT_METHODS = ("auto", "max", "mse")
# As the kernels of runtimes take them (MatMulNBits).
BLOCK_SIZES = (16, 32, 64, 128, 256)
_SCOPE_KEYS = ("weights", "activations", "calibration")


@dataclasses.dataclass(frozen=True)
class Override:
    """What differs from the recipe for the modules that a pattern names.

    Attributes:
        quantize: False keeps the operations of these modules in float.
        weights, activations: descriptors (or "float" for activations) in place of the recipe's; None keeps those.
        calibration: method in place of the recipe's; None keeps the recipe's.
    """

    quantize: bool = True
    weights: QuantDescriptor | None = None
    activations: QuantDescriptor | str | None = None
    calibration: str | None = None


def default_weights() -> QuantDescriptor:
    """Of weights: 8 bits, signed, narrow range, one amax per output channel."""
    return QuantDescriptor(num_bits=8, axis=0, narrow_range=True)


def default_activations() -> QuantDescriptor:
    """Of activations: 8 bits, one range per tensor, from a histogram."""
    return QuantDescriptor(num_bits=8, calib_method="histogram")


def default_algorithms() -> dict[str, dict[str, Any]]:
    """SmoothQuant, bias correction, and between GPTQ of small layers: depthwise up to 5 x 5, 3 x 3 of 3 channels."""
    return {"smoothquant": {}, "gptq": {"most_products": 32, "positions": 512}, "bias_correction": {}}


def read_mapping(value: Any, what: str) -> Mapping[str, Any]:
    """The value, if it is a mapping; else a `RecipeError`, as for everything here that is not what it must be."""
    if not isinstance(value, Mapping):
        raise RecipeError(f"{what} must be a mapping, not {type(value).__name__}")
    return value


def read_patterns(value: Any) -> tuple[str, ...]:
    """The patterns of `exclude`."""
    if isinstance(value, str):
        raise RecipeError(f"exclude must be a list of patterns, not the string {value!r}")
    patterns: tuple[Any, ...] = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(p, str) for p in patterns):
        raise RecipeError("exclude must be a list of strings (glob patterns)")
    if "" in patterns:
        raise RecipeError("exclude holds an empty pattern; '*' matches every module")
    return patterns


def read_algorithms(value: Any) -> dict[str, dict[str, Any]]:
    """Names and options alone: whether they exist is checked where they are applied."""
    if isinstance(value, Mapping):
        found = {str(name): dict(read_mapping(v, f"algorithms[{name!r}]")) for name, v in value.items()}
    elif isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        found = {name: {} for name in value}
        if len(found) != len(value):
            raise RecipeError("algorithms names one algorithm twice")
    else:
        raise RecipeError(f"algorithms must be a list of names, or a mapping of names to options, not {value!r}")
    return found


def read_override(value: Any, where: str) -> Override:
    """One of `overrides`: an `Override`, `float`, or a mapping."""
    if is_float(value):
        return Override(quantize=False)
    if isinstance(value, Override):
        override = value
    elif isinstance(value, Mapping):
        check_keys(value, _SCOPE_KEYS, where)
        override = Override(
            weights=read_descriptor(value["weights"], f"{where}.weights", default_weights())
            if "weights" in value
            else None,
            activations=_given_activations(value["activations"], f"{where}.activations")
            if "activations" in value
            else None,
            calibration=value.get("calibration"),
        )
    else:
        raise RecipeError(f"{where} must be `float`, an Override or a mapping, not {value!r}")
    if not isinstance(override.quantize, bool):
        raise RecipeError(f"{where}.quantize must be True or False, not {override.quantize!r}")
    if override.weights is not None:
        check_weights(override.weights, f"{where}.weights")
    if override.activations is not None:
        activations = read_activations(override.activations, f"{where}.activations")
        override = dataclasses.replace(override, activations=activations)
    if override.calibration is not None:
        check_choice(override.calibration, f"{where}.calibration", CALIBRATION_METHODS)
    return override


def override_data(override: Override) -> Any:
    """An override as plain data, as `read_override` takes it."""
    if not override.quantize:
        return "float"
    out: dict[str, Any] = {}
    for key in _SCOPE_KEYS:
        value = getattr(override, key)
        if value is not None:
            default = default_weights() if key == "weights" else default_activations()
            out[key] = descriptor_data(value, default) if isinstance(value, QuantDescriptor) else value
    return out


def descriptor_data(descriptor: QuantDescriptor, default: QuantDescriptor) -> dict[str, Any]:
    """A descriptor as plain data for a reader that fills what is missing from `default`."""
    fields = descriptor.dict()
    fields.update({key: getattr(descriptor, key) for key in default.dict() if key not in fields})
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def read_descriptor(value: Any, where: str, default: QuantDescriptor) -> QuantDescriptor:
    """A descriptor, or one in plain data whose missing fields are those of `default`."""
    if isinstance(value, QuantDescriptor):
        return value
    fields = dict(default.dict())
    fields.update(read_mapping(value, where))
    if isinstance(fields.get("axis"), list):
        fields["axis"] = tuple(fields["axis"])
    if isinstance(fields.get("num_bits"), list):
        fields["num_bits"] = tuple(fields["num_bits"])
    try:
        if isinstance(fields.get("amax"), int) and not isinstance(fields["amax"], bool):
            fields["amax"] = float(fields["amax"])
        return QuantDescriptor(**fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"{where}: {error}") from error


def check_keys(data: Mapping[str, Any], known: Any, where: str) -> None:
    """Refuses keys that are not known."""
    unknown = sorted(set(data) - set(known), key=str)
    if unknown:
        raise RecipeError(f"unknown key {unknown[0]!r} in {where}; known keys: {', '.join(known)}")


def check_choice(value: Any, where: str, known: tuple[str, ...]) -> None:
    """Refuses what is not one of the known values."""
    if not isinstance(value, str) or value not in known:
        raise RecipeError(f"{where} must be one of {', '.join(known)}, not {value!r}")


def check_weights(descriptor: Any, where: str) -> None:
    """Refuses what is no descriptor of weights."""
    if not isinstance(descriptor, QuantDescriptor):
        raise RecipeError(f"{where} must be a QuantDescriptor, not {type(descriptor).__name__}")
    _check_num_bits(descriptor, where)
    if descriptor.axis not in (None, 0, (0,)):
        raise RecipeError(f"{where}.axis must be 0 (per output channel) or None (per tensor), not {descriptor.axis}")
    if descriptor.unsigned:
        raise RecipeError(f"{where}.unsigned must be False: deployed weights are signed")
    _check_plain(descriptor, where)
    if descriptor.amax is not None:
        raise RecipeError(f"{where}.amax must be None: the amax of a weight is taken from the weight")
    block = descriptor.block_size
    if block is not None and descriptor.axis is None:
        raise RecipeError(f"{where}.block_size={block} needs axis=0: blocks are parts of output channels")
    if block is not None and block not in BLOCK_SIZES:
        raise RecipeError(
            f"{where}.block_size must be a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}, as the kernels of "
            f"runtimes take it, not {block}"
        )


def is_float(value: Any) -> bool:
    """Whether a value says that something stays in float: the type, or "float"."""
    return value is float or value == "float"


def _given_activations(value: Any, where: str) -> QuantDescriptor | str:
    return "float" if is_float(value) else read_descriptor(value, where, default_activations())


def read_activations(value: Any, where: str) -> QuantDescriptor | str:
    """The descriptor, checked, or "float"."""
    if is_float(value):
        return "float"
    _check_activations(value, where)
    return value


def _check_activations(descriptor: Any, where: str) -> None:
    if not isinstance(descriptor, QuantDescriptor):
        raise RecipeError(f'{where} must be a QuantDescriptor or "float", not {type(descriptor).__name__}')
    if descriptor.block_size is not None:
        raise RecipeError(f"{where}.block_size must be None: blocks are for weights")
    _check_num_bits(descriptor, where)
    if descriptor.axis is not None:
        raise RecipeError(f"{where}.axis must be None: the targets take one range per activation tensor")
    if descriptor.amax is not None and (descriptor.amax.size != 1 or not 0 < float(descriptor.amax.item()) < math.inf):
        raise RecipeError(f"{where}.amax must be one positive number that is finite")
    _check_plain(descriptor, where)


def _check_num_bits(descriptor: QuantDescriptor, where: str) -> None:
    bits = descriptor.num_bits
    if not isinstance(bits, tuple) and not 2 <= bits <= 16:
        raise RecipeError(f"{where}.num_bits must be an integer from 2 to 16, or (4, 3) for E4M3, not {bits}")


def _check_plain(descriptor: QuantDescriptor, where: str) -> None:
    if not descriptor.fake_quant or descriptor.learn_amax or descriptor.scale_amax is not None:
        raise RecipeError(f"{where}: fake_quant=False, learn_amax and scale_amax have no meaning in a recipe")
