"""`Recipe`: what a user may decide about a quantization, as one frozen value that files can hold."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from fnmatch import translate
from pathlib import Path
from typing import Any

import numpy as np

from .descriptor import QuantDescriptor
from .errors import RecipeError
from .recipe_file import data_in_file, data_in_toml, data_in_yaml, yaml_of
from .recipe_values import (
    CALIBRATION_METHODS,
    WEIGHT_METHODS,
    Override,
    check_choice,
    check_keys,
    check_weights,
    default_activations,
    default_algorithms,
    default_weights,
    descriptor_data,
    is_float,
    override_data,
    read_activations,
    read_algorithms,
    read_descriptor,
    read_mapping,
    read_override,
    read_patterns,
)

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is quantized. Every field has the default that suits a deployment on the chosen target.

    Attributes:
        weights: descriptor of weights; by default 8 bits, one amax per output channel. `num_bits` 2 to 8 for a
            deployment (`qdq.quantize` refuses others), 2 to 16 or (4, 3) for modules (`qdq.nn.quantize_modules`);
            `axis=0` gives every output channel its own amax (whatever axis of the weight holds the output channels),
            `axis=None` one amax for the tensor. A deployment always uses a signed, narrow range, as runtimes require it
            of weights.
            `block_size`, a power of two from 16 to 256, gives every so many input channels of a linear's output channel
            their own step size: such linears take their activations in float. Other layers keep one per output channel.
        activations: "float" (or the type) leaves them in float, and quantizes weights alone (ONNX Runtime then rounds
            what linears read to int8 in blocks, which is simulated). Else their descriptor, by default 8 bits: one
            range per tensor, of 8 or 16 bits for a deployment, and as for weights for modules. Operations that read
            or give 16 bits compute in float between their quantizers. A given `amax` fixes the range to [-amax, amax]
            ([0, amax] if `unsigned`) and that tensor is not calibrated. In a deployment signedness and zero point are
            otherwise the target's choice, made from the data.
        calibration: how a range is found from the data: "max", "percentile", "mse" or "entropy". "auto", the default,
            lets all of them propose a range for each tensor and takes the one with the least squared error in the
            outputs of the layers that read it, if that is less than 0.6 of the usual one's. The usual one is "max" for
            what linears and matrix products read from float operations (the rare, large activations of transformers
            carry meaning) and "mse" for everything else. A range that several tensors share (a concatenation) is always
            the usual one, and so is that of a tensor with fewer than 8192 values in the samples that are compared (64,
            or 16 without algorithms). What an elementwise function alone reads (a SiLU) gets the range of least
            squared error of its results. With 16 bits "auto" is "max".
        percentile: for "percentile", the share of values inside the range, in percent: in (50, 100].
        weight_calibration: how the amax of a weight is found: "max", or "mse", that of least squared error, searched
            per channel. "auto", the default, is "max" for weights of 7 and 8 bits; for fewer it is "mse", and, channel
            by channel, "max" where that leaves less than 0.9 of the squared error in the layer's output (for weights
            that one layer alone reads, and where inputs are known).
        algorithms: what improves the model once ranges are known, in this order: name -> options, or a list of names
            (the keys of `qdq.algorithms.registry.ALGORITHMS`; docs/algorithms.md has their options). By default
            SmoothQuant, GPTQ for layers of at most 32 products a value, and bias correction; an empty list leaves it at
            the ranges. Names and options are checked when the recipe is applied.
        overrides: glob pattern -> `float` (keep in float), or an `Override`, or a mapping with the keys
            "weights", "activations", "calibration". Patterns match module paths and parameter names; "*.head" matches
            a module of that name and everything inside it. A later pattern wins. A pattern that matches nothing
            is an error when the recipe is applied. By default there are none.
        exclude: patterns of modules to keep in float, by default none; short for overrides with `float`.
        attention: whether the two products of attention (matrix products of two activations) are quantized. None, the
            default, leaves it to the target, and none of the targets quantizes them.
        reduce_range: weights for x86 processors whose u8 x s8 products saturate at 16 bits (no VNNI): pairs of codes
            that would are made smaller (onnxruntime), or all weights take 7 bits (openvino). None, the default, takes
            the target's setting: "auto", which looks at this machine's processor, but False for "tensorrt".
        tune: "latency" times operations in the target's runtime on this machine and leaves in float what costs more in
            integers than it saves (target "onnxruntime" alone). `qdq.explain(qmodel).recipe` is the recipe that
            resulted, with patterns in place of `tune`. None, the default, measures nothing.

    Raises:
        RecipeError: a field holds a value of the wrong kind or out of range; it names the field.
    """

    weights: QuantDescriptor = dataclasses.field(default_factory=default_weights)
    activations: QuantDescriptor | str = dataclasses.field(default_factory=default_activations)
    calibration: str = "auto"
    percentile: float = 99.99
    weight_calibration: str = "auto"
    algorithms: Mapping[str, Mapping[str, Any]] | Sequence[str] = dataclasses.field(default_factory=default_algorithms)
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    attention: bool | None = None
    reduce_range: bool | str | None = None
    tune: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", read_patterns(self.exclude))
        overrides = {
            str(k): read_override(v, f"overrides[{k!r}]") for k, v in read_mapping(self.overrides, "overrides").items()
        }
        if "" in overrides:
            raise RecipeError("overrides holds an empty pattern; '*' matches every module")
        object.__setattr__(self, "overrides", overrides)
        object.__setattr__(self, "algorithms", read_algorithms(self.algorithms))
        check_weights(self.weights, "weights")
        object.__setattr__(self, "activations", read_activations(self.activations, "activations"))
        check_choice(self.calibration, "calibration", CALIBRATION_METHODS)
        check_choice(self.weight_calibration, "weight_calibration", WEIGHT_METHODS)
        if isinstance(self.percentile, bool) or not isinstance(self.percentile, (int, float)):
            raise RecipeError(f"percentile must be a number, not {self.percentile!r}")
        if not 50.0 < self.percentile <= 100.0:
            raise RecipeError(f"percentile must lie in (50, 100], not {self.percentile}")
        if not _is_one_of(self.reduce_range, None, True, False, "auto"):
            raise RecipeError(f"reduce_range must be True, False or 'auto', not {self.reduce_range!r}")
        if not _is_one_of(self.tune, None, "latency"):
            raise RecipeError(f"tune must be 'latency' or None, not {self.tune!r}")
        if not _is_one_of(self.attention, None, True, False):
            raise RecipeError(f"attention must be True, False or None, not {self.attention!r}")

    def for_name(self, *names: str, node: str | tuple[str, ...] = "") -> Override:
        """The override that applies to an operation known by these names (module path, parameter names).

        `node`, its name in the graph, or several, must be given by a pattern in full: no glob pattern is meant for such
        names.
        """
        nodes = {node} if isinstance(node, str) else set(node)
        merged = Override()
        for pattern, override in self._rules():
            if pattern in nodes or any(matches(pattern, name) for name in names):
                given = {f.name: getattr(override, f.name) for f in dataclasses.fields(Override)}
                merged = dataclasses.replace(merged, **{k: v for k, v in given.items() if v is not None})
        return merged

    def weights_for(self, *names: str, node: str = "") -> QuantDescriptor:
        """The descriptor of the weight of an operation known by these names."""
        return self.for_name(*names, node=node).weights or self.weights

    def activations_for(self, *names: str, node: str | tuple[str, ...] = "") -> QuantDescriptor | None:
        """The descriptor of what an operation known by these names reads, None where that stays in float."""
        found = self.for_name(*names, node=node).activations or self.activations
        return found if isinstance(found, QuantDescriptor) else None

    def _rules(self) -> list[tuple[str, Override]]:
        rules = list(self.overrides.items())
        return rules + [(p, Override(quantize=False)) for p in self.exclude]

    def patterns(self) -> list[str]:
        """Every pattern of `overrides` and `exclude`, in order."""
        return [p for p, _ in self._rules()]

    def check_deployable(self) -> None:
        """Refuses codes that the targets of `qdq.quantize` do not compute with.

        Raises:
            RecipeError: weights of other than 2 to 8 bits, or activations of other than 8 or 16; it names the place.
        """
        for where, scope in self.scopes():
            weights = 8 if scope.weights is None else scope.weights.num_bits
            activations = scope.activations.num_bits if isinstance(scope.activations, QuantDescriptor) else 8
            if isinstance(weights, tuple) or not 2 <= weights <= 8:
                raise RecipeError(f"{where}weights.num_bits must be an integer from 2 to 8, not {weights}")
            if activations not in (8, 16):
                raise RecipeError(
                    f"{where}activations.num_bits must be 8 or 16, not {activations}: a file stores no other"
                )

    def check_modules(self) -> None:
        """Refuses what quantized modules (`qdq.nn`) do not have.

        Raises:
            RecipeError: activations "float"; it names the place.
        """
        for where, scope in self.scopes():
            if scope.activations == "float":
                raise RecipeError(
                    f'{where}activations="float" is for qdq.quantize: in modules, disable() the input quantizers'
                )

    def scopes(self) -> list[tuple[str, Recipe | Override]]:
        """Itself and its overrides, each with the beginning of its fields' names in messages."""
        overrides = [(f"overrides[{pattern!r}].", override) for pattern, override in self.overrides.items()]
        return [("", self), *overrides]

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data: only what differs from the default, and the format's version."""
        out: dict[str, Any] = {"version": VERSION}
        default = Recipe()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == getattr(default, field.name):
                continue
            if isinstance(value, QuantDescriptor):
                value = descriptor_data(value, getattr(default, field.name))
            elif field.name == "overrides":
                value = {k: override_data(v) for k, v in value.items()}
            elif field.name == "algorithms":
                value = {name: dict(options) for name, options in value.items()}
            elif isinstance(value, tuple):
                value = list(value)
            out[field.name] = value
        return out

    def to_yaml(self) -> str:
        """The recipe as YAML; `from_yaml` gives an equal recipe back."""
        return yaml_of(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe in plain data, as `to_dict()` writes it.

        Raises:
            RecipeError: an unknown key (the known ones are listed), or a value of the wrong kind.
        """
        data = dict(read_mapping(data, "a recipe"))
        version = data.pop("version", VERSION)
        if version != VERSION:
            raise RecipeError(f"recipe version {version!r} is not known here; this qdq reads version {VERSION}")
        check_keys(data, [f.name for f in dataclasses.fields(cls)], "recipe")
        for key in ("weights", "activations"):
            if key in data and not (key == "activations" and is_float(data[key])):
                data[key] = read_descriptor(data[key], key, getattr(cls(), key))
        return cls(**data)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """The recipe in a YAML text (not a path: see `load`).

        Raises:
            RecipeError: not YAML, or not a recipe.
        """
        return cls.from_dict(data_in_yaml(text))

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        """The recipe in a TOML text.

        Raises:
            RecipeError: not TOML, or not a recipe.
        """
        return cls.from_dict(data_in_toml(text))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """The recipe in a file whose name ends in .yaml, .yml or .toml.

        Raises:
            RecipeError: the file is missing, of another kind, or not a recipe.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise RecipeError(f"path must be that of a recipe file, not {path!r}")
        return cls.from_dict(data_in_file(Path(path)))


def _is_one_of(value: object, *known: bool | str | None) -> bool:
    """Asked of a bool, a text or None alone: an array has no one answer, and 1 is not True."""
    return (value is None or isinstance(value, (bool, np.bool_, str))) and value in known


def matches(pattern: str, name: str) -> bool:
    """Whether a glob pattern names this module or parameter, or a module that holds it."""
    regex = re.compile(translate(pattern))
    parts = name.split(".")
    return any(regex.match(".".join(parts[:i])) for i in range(1, len(parts) + 1))
