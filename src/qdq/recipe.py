"""`Recipe`: what a user may decide about a quantization, as one frozen value that files can hold."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import translate
from pathlib import Path
from typing import Any

from .descriptor import QuantDescriptor
from .errors import RecipeError

CALIBRATION_METHODS = ("auto", "max", "percentile", "mse", "entropy")
VERSION = 1
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


def _default_weights() -> QuantDescriptor:
    return QuantDescriptor(num_bits=8, axis=0, narrow_range=True)


def _default_activations() -> QuantDescriptor:
    return QuantDescriptor(num_bits=8, calib_method="histogram")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is quantized. Every field has the default that suits a deployment on the chosen target.

    Attributes:
        weights: descriptor of weights. `num_bits` 2 to 8 for a deployment (`qdq.quantize` refuses others), 2 to 16 or
            (4, 3) for modules (`qdq.nn.quantize_modules`); `axis=0` gives every output channel its own amax (whatever
            axis of the weight holds the output channels), `axis=None` one amax for the tensor. A deployment always uses
            a signed, narrow range, as runtimes require it of weights.
            `block_size`, a power of two from 16, gives every so many input channels of a linear's output channel their
            own step size: such linears take their activations in float. Other layers keep one per output channel.
        activations: "float" (or the type) leaves them in float, and quantizes weights alone. Else their descriptor:
            one range per tensor, of 8 bits for a deployment, and as for weights for
            modules. A given `amax` fixes the range to [-amax, amax] ([0, amax] if `unsigned`) and that tensor is not
            calibrated. In a deployment signedness and zero point are otherwise the target's choice, made from the data.
        calibration: how a range is found from the data: "max", "percentile", "mse" or "entropy". "auto" lets all of
            them propose a range for each tensor and takes the one with the least error in the outputs of the layers
            that read it; where none is clearly better it is "max" for what linears and matrix products read from float
            operations (the rare, large activations of transformers carry meaning) and "mse" for everything else.
        percentile: for "percentile", the share of values inside the range, in percent.
        weight_calibration: "max" or "mse" (the amax of least squared error, searched per channel).
        algorithms: what improves the model once ranges are known, in this order: name -> options, or a list of names
            (`qdq.algorithms` lists them). An empty list leaves it at the ranges.
        overrides: glob pattern -> `float` (keep in float), or an `Override`, or a mapping with the keys
            "weights", "activations", "calibration". Patterns match module paths and parameter names; "*.head" matches
            a module of that name and everything inside it. A later pattern wins. A pattern that matches nothing
            is an error when the recipe is applied.
        exclude: patterns of modules to keep in float; short for overrides with `float`.
        attention: whether the two products of attention (matrix products of two activations) are quantized. None
            leaves it to the target.
        reduce_range: weights for x86 processors whose u8 x s8 products saturate at 16 bits (no VNNI): pairs of codes
            that would are made smaller (onnxruntime), or all weights take 7 bits (openvino). None takes the target's
            setting; "auto" looks at this machine's processor.
        tune: "latency" times operations in the target's runtime on this machine and leaves in float what costs more in
            integers than it saves (target "onnxruntime" alone). The quantized model's record holds the recipe that
            resulted, with patterns in place of `tune`. None measures nothing.
    """

    weights: QuantDescriptor = dataclasses.field(default_factory=_default_weights)
    activations: QuantDescriptor | str = dataclasses.field(default_factory=_default_activations)
    calibration: str = "auto"
    percentile: float = 99.99
    weight_calibration: str = "max"
    algorithms: Mapping[str, Mapping[str, Any]] | Sequence[str] = dataclasses.field(
        default_factory=lambda: {"smoothquant": {}, "bias_correction": {}}
    )
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    attention: bool | None = None
    reduce_range: bool | str | None = None
    tune: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", _patterns(self.exclude))
        overrides = {
            str(k): _override(v, f"overrides[{k!r}]") for k, v in _mapping(self.overrides, "overrides").items()
        }
        if "" in overrides:
            raise RecipeError("overrides holds an empty pattern; '*' matches every module")
        object.__setattr__(self, "overrides", overrides)
        object.__setattr__(self, "algorithms", _algorithms(self.algorithms))
        _check_weights(self.weights, "weights")
        object.__setattr__(self, "activations", _activations(self.activations, "activations"))
        _check_choice(self.calibration, "calibration", CALIBRATION_METHODS)
        _check_choice(self.weight_calibration, "weight_calibration", ("max", "mse"))
        if isinstance(self.percentile, bool) or not isinstance(self.percentile, (int, float)):
            raise RecipeError(f"percentile must be a number, not {self.percentile!r}")
        if not 50.0 < self.percentile <= 100.0:
            raise RecipeError(f"percentile must lie in (50, 100], not {self.percentile}")
        if self.reduce_range not in (None, True, False, "auto"):
            raise RecipeError(f"reduce_range must be True, False or 'auto', not {self.reduce_range!r}")
        if self.tune not in (None, "latency"):
            raise RecipeError(f"tune must be 'latency' or None, not {self.tune!r}")
        if self.attention not in (None, True, False):
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
            RecipeError: weights of other than 2 to 8 bits, or activations of other than 8; it names the place.
        """
        for where, scope in self._scopes():
            weights = 8 if scope.weights is None else scope.weights.num_bits
            activations = scope.activations.num_bits if isinstance(scope.activations, QuantDescriptor) else 8
            if isinstance(weights, tuple) or not 2 <= weights <= 8:
                raise RecipeError(f"{where}weights.num_bits must be an integer from 2 to 8, not {weights}")
            if activations != 8:
                raise RecipeError(
                    f"{where}activations.num_bits must be 8, the code that the targets compute with, not {activations}"
                )

    def check_modules(self) -> None:
        """Refuses what quantized modules (`qdq.nn`) do not have.

        Raises:
            RecipeError: weights with a `block_size`, or activations "float"; it names the place.
        """
        for where, scope in self._scopes():
            if scope.weights is not None and scope.weights.block_size is not None:
                raise RecipeError(
                    f"{where}weights.block_size={scope.weights.block_size} is for qdq.quantize: modules have one amax "
                    "per tensor or per channel"
                )
            if scope.activations == "float":
                raise RecipeError(
                    f'{where}activations="float" is for qdq.quantize: in modules, disable() the input quantizers'
                )

    def _scopes(self) -> list[tuple[str, Recipe | Override]]:
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
                value = _descriptor_dict(value, getattr(default, field.name))
            elif field.name == "overrides":
                value = {k: _override_dict(v) for k, v in value.items()}
            elif field.name == "algorithms":
                value = {name: dict(options) for name, options in value.items()}
            elif isinstance(value, tuple):
                value = list(value)
            out[field.name] = value
        return out

    def to_yaml(self) -> str:
        """The recipe as YAML; `from_yaml` gives an equal recipe back."""
        import yaml  # when used: it costs a sixth of qdq's import

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe in plain data, as `to_dict()` writes it.

        Raises:
            RecipeError: an unknown key (the known ones are listed), or a value of the wrong kind.
        """
        data = dict(_mapping(data, "a recipe"))
        version = data.pop("version", VERSION)
        if version != VERSION:
            raise RecipeError(f"recipe version {version!r} is not known here; this qdq reads version {VERSION}")
        _check_keys(data, [f.name for f in dataclasses.fields(cls)], "recipe")
        for key in ("weights", "activations"):
            if key in data and not (key == "activations" and _is_float(data[key])):
                data[key] = _descriptor(data[key], key, getattr(cls(), key))
        return cls(**data)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """The recipe in a YAML text (not a path: see `load`).

        Raises:
            RecipeError: not YAML, or not a recipe.
        """
        import yaml

        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"the recipe is not valid YAML: {error}") from error
        return cls.from_dict({} if data is None else data)

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        """The recipe in a TOML text.

        Raises:
            RecipeError: not TOML, or not a recipe.
        """
        try:
            import tomllib  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError:  # Python 3.10
            import tomli as tomllib  # pyright: ignore[reportMissingImports]
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"the recipe is not valid TOML: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """The recipe in a file whose name ends in .yaml, .yml or .toml.

        Raises:
            RecipeError: the file is missing, of another kind, or not a recipe.
        """
        path = Path(path)
        readers = {".yaml": cls.from_yaml, ".yml": cls.from_yaml, ".toml": cls.from_toml}
        if path.suffix.lower() not in readers:
            raise RecipeError(f"recipe file {str(path)!r} must end in .yaml, .yml or .toml")
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"recipe file {str(path)!r} cannot be read: {error.strerror}") from error
        return readers[path.suffix.lower()](text)


def matches(pattern: str, name: str) -> bool:
    """Whether a glob pattern names this module or parameter, or a module that holds it."""
    regex = re.compile(translate(pattern))
    parts = name.split(".")
    return any(regex.match(".".join(parts[:i])) for i in range(1, len(parts) + 1))


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{what} must be a mapping, not {type(value).__name__}")
    return value


def _patterns(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        raise RecipeError(f"exclude must be a list of patterns, not the string {value!r}")
    if not isinstance(value, Iterable) or not all(isinstance(p, str) for p in value):
        raise RecipeError("exclude must be a list of strings (glob patterns)")
    patterns = tuple(value)
    if "" in patterns:
        raise RecipeError("exclude holds an empty pattern; '*' matches every module")
    return patterns


def _algorithms(value: Any) -> dict[str, dict[str, Any]]:
    """Names and options alone: whether they exist is checked where they are applied."""
    if isinstance(value, Mapping):
        found = {str(name): dict(_mapping(v, f"algorithms[{name!r}]")) for name, v in value.items()}
    elif isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        found = {name: {} for name in value}
        if len(found) != len(value):
            raise RecipeError("algorithms names one algorithm twice")
    else:
        raise RecipeError(f"algorithms must be a list of names, or a mapping of names to options, not {value!r}")
    return found


def _override(value: Any, where: str) -> Override:
    if _is_float(value):
        return Override(quantize=False)
    if isinstance(value, Override):
        override = value
    elif isinstance(value, Mapping):
        _check_keys(value, _SCOPE_KEYS, where)
        override = Override(
            weights=_descriptor(value["weights"], f"{where}.weights", _default_weights())
            if "weights" in value
            else None,
            activations=_given_activations(value["activations"], f"{where}.activations")
            if "activations" in value
            else None,
            calibration=value.get("calibration"),
        )
    else:
        raise RecipeError(f"{where} must be `float`, an Override or a mapping, not {value!r}")
    if override.weights is not None:
        _check_weights(override.weights, f"{where}.weights")
    if override.activations is not None:
        activations = _activations(override.activations, f"{where}.activations")
        override = dataclasses.replace(override, activations=activations)
    if override.calibration is not None:
        _check_choice(override.calibration, f"{where}.calibration", CALIBRATION_METHODS)
    return override


def _override_dict(override: Override) -> Any:
    if not override.quantize:
        return "float"
    out: dict[str, Any] = {}
    for key in _SCOPE_KEYS:
        value = getattr(override, key)
        if value is not None:
            default = _default_weights() if key == "weights" else _default_activations()
            out[key] = _descriptor_dict(value, default) if isinstance(value, QuantDescriptor) else value
    return out


def _descriptor_dict(descriptor: QuantDescriptor, default: QuantDescriptor) -> dict[str, Any]:
    """A descriptor as plain data for a reader that fills what is missing from `default`."""
    fields = descriptor.dict()
    fields.update({key: getattr(descriptor, key) for key in default.dict() if key not in fields})
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def _descriptor(value: Any, where: str, default: QuantDescriptor) -> QuantDescriptor:
    if isinstance(value, QuantDescriptor):
        return value
    fields = dict(default.dict())
    fields.update(_mapping(value, where))
    if isinstance(fields.get("axis"), list):
        fields["axis"] = tuple(fields["axis"])
    if isinstance(fields.get("num_bits"), list):
        fields["num_bits"] = tuple(fields["num_bits"])
    if isinstance(fields.get("amax"), int) and not isinstance(fields["amax"], bool):
        fields["amax"] = float(fields["amax"])
    try:
        return QuantDescriptor(**fields)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}") from error


def _check_keys(data: Mapping[str, Any], known: Any, where: str) -> None:
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise RecipeError(f"unknown key {unknown[0]!r} in {where}; known keys: {', '.join(known)}")


def _check_choice(value: Any, where: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RecipeError(f"{where} must be one of {', '.join(known)}, not {value!r}")


def _check_weights(descriptor: Any, where: str) -> None:
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
    if block is not None and (block < 16 or block & (block - 1)):
        raise RecipeError(f"{where}.block_size must be a power of two from 16, as runtimes have them, not {block}")


def _is_float(value: Any) -> bool:
    return value is float or value == "float"


def _given_activations(value: Any, where: str) -> QuantDescriptor | str:
    return "float" if _is_float(value) else _descriptor(value, where, _default_activations())


def _activations(value: Any, where: str) -> QuantDescriptor | str:
    """The descriptor, checked, or "float"."""
    if _is_float(value):
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
    if descriptor.amax is not None and (descriptor.amax.size != 1 or not float(descriptor.amax.item()) > 0):
        raise RecipeError(f"{where}.amax must be one positive number")
    _check_plain(descriptor, where)


def _check_num_bits(descriptor: QuantDescriptor, where: str) -> None:
    bits = descriptor.num_bits
    if not isinstance(bits, tuple) and not 2 <= bits <= 16:
        raise RecipeError(f"{where}.num_bits must be an integer from 2 to 16, or (4, 3) for E4M3, not {bits}")


def _check_plain(descriptor: QuantDescriptor, where: str) -> None:
    if not descriptor.fake_quant or descriptor.learn_amax or descriptor.scale_amax is not None:
        raise RecipeError(f"{where}: fake_quant=False, learn_amax and scale_amax have no meaning in a recipe")
