"""What the quantized layers share: descriptors by keyword or class default, and the quantizers they become."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..calib.quantized_weights import QuantizedWeight
from ..descriptor import (
    QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_PER_TENSOR,
    QuantDescriptor,
)
from ..quantizer import TensorQuantizer


def _check_caller() -> None:
    if sys._getframe(2).f_code.co_name != "__init__":
        raise TypeError("init_quantizer must be called from the __init__ of the module that gets the quantizers")


def check_descriptor(value: Any, what: str) -> None:
    if not isinstance(value, QuantDescriptor):
        raise ValueError(f"{what} must be a QuantDescriptor, got {type(value).__name__}")


def make_quantizer(module: Any, descriptor: QuantDescriptor, what: str) -> TensorQuantizer:
    """A quantizer on the device of the module's own parameters."""
    check_descriptor(descriptor, what)
    if not descriptor.fake_quant:
        raise ValueError(
            f"Only fake quantization is supported in a layer: {what} of {type(module).__name__} has fake_quant=False"
        )
    quantizer = TensorQuantizer(descriptor)
    parameter = next(module.parameters(recurse=False), None)
    # On the meta device an amax would lose its value.
    if parameter is not None and parameter.device.type != "meta":
        quantizer.to(parameter.device)
    return quantizer


def _one_or_list(module: Any, name: str) -> TensorQuantizer:
    # The list is outside the annotation: nearly every module has one quantizer, and its users read its members.
    found = getattr(module, name, None)
    return getattr(module, f"{name}s") if found is None else found


class _InputQuantized:
    """The input's half of the mixins."""

    default_quant_desc_input: QuantDescriptor = QUANT_DESC_8BIT_PER_TENSOR
    _input_quantizer: TensorQuantizer
    _input_quantizers: nn.ModuleList

    @classmethod
    def set_default_quant_desc_input(cls, value: QuantDescriptor) -> None:
        """Make a copy of `value` the default of this class and of subclasses without their own; the rest keep theirs.

        Raises:
            ValueError: not a QuantDescriptor.
        """
        check_descriptor(value, f"the default input descriptor of {cls.__name__}")
        cls.default_quant_desc_input = copy.deepcopy(value)

    @property
    def input_quantizer(self) -> TensorQuantizer:
        """The quantizer of the input; in a module with `num_layers` quantizers, the list of them."""
        return _one_or_list(self, "_input_quantizer")


class _WeightQuantized:
    """The weight's half of the mixins."""

    default_quant_desc_weight: QuantDescriptor = QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL
    _weight_quantizer: TensorQuantizer
    _weight_quantizers: nn.ModuleList

    @classmethod
    def set_default_quant_desc_weight(cls, value: QuantDescriptor) -> None:
        """Make a copy of `value` the default of this class and of subclasses without their own; the rest keep theirs.

        Raises:
            ValueError: not a QuantDescriptor.
        """
        check_descriptor(value, f"the default weight descriptor of {cls.__name__}")
        cls.default_quant_desc_weight = copy.deepcopy(value)

    @property
    def weight_quantizer(self) -> TensorQuantizer:
        """The quantizer of the weight; in a module with `num_layers` quantizers, the list of them."""
        return _one_or_list(self, "_weight_quantizer")

    def quantized_weights(self) -> Iterator[QuantizedWeight]:
        """Name, weights and quantizer of every quantized weight; several weights are quantized joined along axis 1."""
        weight, quantizer = getattr(self, "weight", None), self.weight_quantizer
        if isinstance(weight, Tensor) and isinstance(quantizer, TensorQuantizer):
            yield "weight", [weight], quantizer


class QuantInputMixin(_InputQuantized):
    """For modules that quantize their input: a class default for its descriptor, and `_input_quantizer`.

    A module class inherits from this and a `torch.nn` class, and calls `init_quantizer` at the end of its `__init__`
    with what `pop_quant_desc_in_kwargs` returns.
    """

    def init_quantizer(self, quant_desc_input: QuantDescriptor) -> None:
        """Add the quantizer `_input_quantizer`.

        Raises:
            TypeError: called from elsewhere than an `__init__`.
            ValueError: not a descriptor, or one with `fake_quant=False`.
        """
        _check_caller()
        self.add_quantizers(quant_desc_input)

    def add_quantizers(self, quant_desc_input: QuantDescriptor) -> None:
        """As `init_quantizer`, for a module that exists already (`qdq.nn.quantize_modules`)."""
        self._input_quantizer = make_quantizer(self, quant_desc_input, "quant_desc_input")


class QuantWeightMixin(_WeightQuantized):
    """For modules that quantize their weight only: a class default for its descriptor, and `_weight_quantizer`."""

    def add_quantizers(self, quant_desc_weight: QuantDescriptor) -> None:
        """Add the quantizer `_weight_quantizer`.

        Raises:
            ValueError: not a descriptor, or one with `fake_quant=False`.
        """
        self._weight_quantizer = make_quantizer(self, quant_desc_weight, "quant_desc_weight")


class QuantMixin(_InputQuantized, _WeightQuantized):
    """For modules that quantize their input and their weight: class defaults, and the two quantizers.

    A module class inherits from this and a `torch.nn` class, and calls `init_quantizer` at the end of its `__init__`
    with what `pop_quant_desc_in_kwargs` returns.
    """

    def init_quantizer(
        self, quant_desc_input: QuantDescriptor, quant_desc_weight: QuantDescriptor, num_layers: int | None = None
    ) -> None:
        """Add `_input_quantizer` and `_weight_quantizer`, or lists of `num_layers` each with an `s` to their names.

        Raises:
            TypeError: called from elsewhere than an `__init__`.
            ValueError: not descriptors, or one with `fake_quant=False`.
        """
        _check_caller()
        self._add(quant_desc_input, quant_desc_weight, num_layers)

    def add_quantizers(self, quant_desc_input: QuantDescriptor, quant_desc_weight: QuantDescriptor) -> None:
        """As `init_quantizer`, for a module that exists already (`qdq.nn.quantize_modules`)."""
        self._add(quant_desc_input, quant_desc_weight, None)

    def _add(self, desc_input: QuantDescriptor, desc_weight: QuantDescriptor, num_layers: int | None) -> None:
        def of_input() -> TensorQuantizer:
            return make_quantizer(self, desc_input, "quant_desc_input")

        def of_weight() -> TensorQuantizer:
            return make_quantizer(self, desc_weight, "quant_desc_weight")

        if num_layers is None:
            self._input_quantizer, self._weight_quantizer = of_input(), of_weight()
        else:
            self._input_quantizers = nn.ModuleList(of_input() for _ in range(num_layers))
            self._weight_quantizers = nn.ModuleList(of_weight() for _ in range(num_layers))


def pop_quant_desc_in_kwargs(quant_cls: Any, input_only: bool = False, **kwargs: Any) -> Any:
    """The descriptors in the keywords of a quantized module's constructor, or else its class's defaults.

    Args:
        quant_cls: the class of the module.
        input_only: it has no weight.
        **kwargs: may hold `quant_desc_input` and, unless `input_only`, `quant_desc_weight`.

    Returns:
        The input descriptor if `input_only`, else (input descriptor, weight descriptor).

    Raises:
        TypeError: other keywords, or a class without defaults.
    """
    if not hasattr(quant_cls, "default_quant_desc_input"):
        raise TypeError(
            f"{quant_cls.__name__} is no quantized class. Where torch.nn is patched by initialize(), a class defined "
            "before that must call super().__init__(...), not nn.Linear.__init__(self, ...)"
        )
    desc_input = kwargs.pop("quant_desc_input", quant_cls.default_quant_desc_input)
    desc_weight = None
    if not input_only:
        desc_weight = kwargs.pop("quant_desc_weight", quant_cls.default_quant_desc_weight)
    if kwargs:
        raise TypeError(f"Unused keys: {', '.join(sorted(kwargs))} (arguments of {quant_cls.__name__})")
    return desc_input if input_only else (desc_input, desc_weight)
