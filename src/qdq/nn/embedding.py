"""Quantized lookup table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..descriptor import QuantDescriptor
from .quantized_module import QuantWeightMixin


class QuantEmbedding(nn.Embedding, QuantWeightMixin):
    """`torch.nn.Embedding` with a quantized weight; the indices are integers, so there is no input quantizer.

    The default descriptor has one amax per row, as PyTorch's own quantized embeddings have: a row is one token, rows
    differ in size, and with a common amax the small ones would be left with few codes. It costs one number per row
    beside `embedding_dim` codes. Where the weight is also that of a linear layer (tied), one amax per row is the
    default of both. For a runtime that looks codes up before it dequantizes them, with one step size for the whole
    table, pass `quant_desc_weight=QUANT_DESC_8BIT_PER_TENSOR`.

    The whole table is quantized in every call. With `max_norm`, the rows looked up are first rescaled in place, as in
    torch, and then quantized.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight, _freeze,
            device, dtype: as `torch.nn.Embedding`.
        **kwargs: `quant_desc_weight`.

    Raises:
        TypeError: other keywords.
        ValueError: a descriptor with `fake_quant=False`.
    """

    default_quant_desc_weight = QuantDescriptor(num_bits=8, axis=0)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        descriptor = self._pop_descriptor(kwargs)
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        self.add_quantizers(descriptor)

    @classmethod
    def _pop_descriptor(cls, kwargs: dict[str, Any]) -> QuantDescriptor:
        descriptor = kwargs.pop("quant_desc_weight", cls.default_quant_desc_weight)
        if kwargs:
            raise TypeError(f"Unused keys: {', '.join(sorted(kwargs))} (arguments of {cls.__name__})")
        return descriptor

    @classmethod
    def from_pretrained(cls, embeddings: Tensor, *args: Any, **kwargs: Any) -> QuantEmbedding:
        """A table that holds `embeddings` (rows, features); arguments as torch's, and `quant_desc_weight`.

        Raises:
            TypeError: other keywords.
            ValueError: a descriptor with `fake_quant=False`.
        """
        descriptor = kwargs.pop("quant_desc_weight", cls.default_quant_desc_weight)
        embedding = super().from_pretrained(embeddings, *args, **kwargs)
        embedding.add_quantizers(descriptor)
        return embedding

    def forward(self, input: Tensor) -> Tensor:
        """The rows of the quantized weight at the integer indices `input`: (*) to (*, embedding_dim).

        Raises:
            RuntimeError: a sparse gradient would have to pass through the quantizer.
        """
        if (
            self.sparse
            and self.weight.requires_grad
            and torch.is_grad_enabled()
            and not self._weight_quantizer.disabled
        ):
            raise RuntimeError(
                "QuantEmbedding with sparse=True cannot be trained: the gradient of a quantized weight is dense. Set "
                "sparse=False, disable the weight's quantizer, or run under torch.no_grad()"
            )
        weight: Tensor = self.weight
        if self.max_norm is not None:
            with torch.no_grad():
                torch.embedding_renorm_(self.weight, input.contiguous(), self.max_norm, self.norm_type)
            # The quantizer keeps its input for the gradient, and the next call changes the parameter in place.
            weight = weight.clone()
        return F.embedding(
            input,
            self._weight_quantizer(weight),
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
