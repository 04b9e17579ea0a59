"""Quantized operations on several tensors: addition, concatenation, matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..descriptor import QuantDescriptor
from ..quantizer import TensorQuantizer
from .quantized_module import QuantInputMixin, check_descriptor, make_quantizer, pop_quant_desc_in_kwargs


class _QuantTwoOperands(nn.Module, QuantInputMixin):
    """An operation on `input` and `other`, each with a quantizer of its own."""

    _other_quantizer: TensorQuantizer

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        desc_other = kwargs.pop("quant_desc_other", None)
        self.add_quantizers(pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs), desc_other)

    def add_quantizers(
        self, quant_desc_input: QuantDescriptor, quant_desc_other: QuantDescriptor | None = None
    ) -> None:
        """Add `_input_quantizer` and `_other_quantizer`; without `quant_desc_other` both as `quant_desc_input` says.

        Raises:
            ValueError: not a descriptor, or one with `fake_quant=False`.
        """
        self._input_quantizer = make_quantizer(self, quant_desc_input, "quant_desc_input")
        if quant_desc_other is None:
            self._other_quantizer = make_quantizer(self, quant_desc_input, "quant_desc_input")
        else:
            self._other_quantizer = make_quantizer(self, quant_desc_other, "quant_desc_other")

    @property
    def other_quantizer(self) -> TensorQuantizer:
        """The quantizer of the second operand."""
        return self._other_quantizer

    def _quantized(self, input: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        _require_tensor(input, f"the first operand of {type(self).__name__}")
        _require_tensor(other, f"the second operand of {type(self).__name__}")
        return self._input_quantizer(input), self._other_quantizer(other)


class QuantAdd(_QuantTwoOperands):
    """`torch.add` of two quantized tensors, as a residual connection needs it.

    Each operand has its own quantizer and so its own step size: the branches of a residual connection often differ
    in range, and integer additions rescale both operands anyway.

    Args:
        **kwargs: `quant_desc_input`, for both operands; `quant_desc_other`, for the second where it differs.

    Raises:
        TypeError: other keywords.
        ValueError: a descriptor with `fake_quant=False`.
    """

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """The sum of both operands, quantized first; their shapes broadcast.

        Raises:
            TypeError: an operand that is no tensor.
        """
        input, other = self._quantized(input, other)
        return input + other


class QuantMatmul(_QuantTwoOperands):
    """`torch.matmul` of two quantized activations, each with its own quantizer and step size.

    Args:
        **kwargs: `quant_desc_input`, for both operands; `quant_desc_other`, for the second where it differs.

    Raises:
        TypeError: other keywords.
        ValueError: a descriptor with `fake_quant=False`.
    """

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """The matrix product of both operands, quantized first; shapes as `torch.matmul`.

        Raises:
            TypeError: an operand that is no tensor.
        """
        input, other = self._quantized(input, other)
        return torch.matmul(input, other)


class QuantConcat(nn.Module, QuantInputMixin):
    """`torch.cat` of quantized tensors, which share one quantizer.

    A runtime that concatenates integers only copies them, if all inputs have the step size of the output. So one
    quantizer sees every input, and its amax is that of all of them. (Without an amax each input takes its own, as
    dynamic quantization does.)

    Args:
        dim: the dimension along which to join.
        **kwargs: `quant_desc_input`, per tensor.

    Raises:
        TypeError: other keywords.
        ValueError: a descriptor with `fake_quant=False` or with an axis.
    """

    def __init__(self, dim: int = 0, **kwargs: Any) -> None:
        super().__init__()
        self.dim = dim
        self.add_quantizers(pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs))

    def add_quantizers(self, quant_desc_input: QuantDescriptor) -> None:
        """Add `_input_quantizer`.

        Raises:
            ValueError: not a descriptor, or one with `fake_quant=False` or with an axis.
        """
        check_descriptor(quant_desc_input, "quant_desc_input")
        if quant_desc_input.axis is not None:
            raise ValueError(
                "quant_desc_input of QuantConcat must be per tensor, because its inputs share one quantizer, got "
                f"axis={quant_desc_input.axis}"
            )
        self._input_quantizer = make_quantizer(self, quant_desc_input, "quant_desc_input")

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """The quantized tensors, joined; shapes as `torch.cat`.

        Raises:
            TypeError: `tensors` is no list or tuple of tensors.
        """
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"QuantConcat takes a list or tuple of tensors, got {type(tensors).__name__}")
        for i, tensor in enumerate(tensors):
            _require_tensor(tensor, f"input {i} of QuantConcat")
        return torch.cat([self._input_quantizer(tensor) for tensor in tensors], dim=self.dim)

    def extra_repr(self) -> str:
        """The dimension."""
        return f"dim={self.dim}"


def _require_tensor(value: Any, what: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(value).__name__}")
