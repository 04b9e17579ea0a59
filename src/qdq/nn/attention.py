"""Quantized multi-head attention: the four projections and both products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calib.quantized_weights import QuantizedWeight
from ..descriptor import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW, QuantDescriptor
from ..quantizer import TensorQuantizer
from .quantized_module import QuantMixin, check_descriptor, make_quantizer, pop_quant_desc_in_kwargs

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class QuantMultiheadAttention(nn.MultiheadAttention, QuantMixin):
    """`torch.nn.MultiheadAttention` (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762) with quantized operands.

    Parameters, state-dict keys and random numbers are torch's. Twelve quantizers, one per operand:

    - `_{q,k,v,out}_proj_input_quantizer` and `_{q,k,v,out}_proj_weight_quantizer`: the inputs and weights of the
      projections. The rows of a packed `in_proj_weight` are quantized in three parts. Biases stay as they are.
    - `_q_quantizer`, `_k_quantizer`: the operands of the first product. As in torch, the query is scaled by
      1 / sqrt(head_dim) before the product, so here before its quantizer.
    - `_probs_quantizer`, `_v_quantizer`: the operands of the second product. Probabilities are never negative, so
      their codes are unsigned.

    In self-attention the query, key and value are one tensor; it still goes through three input quantizers, whose
    calibration gives them the same amax. The same model thus serves every kind of attention.

    Equal to torch's with all quantizers disabled, but for two things: a query whose keys are all masked out gets
    probabilities 0 also with `need_weights` (torch: NaN there, which a calibrator would take up), and nested tensors
    are refused. Plain operations throughout: PyTorch's fused kernels would walk around the quantizers.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            `torch.nn.MultiheadAttention`.
        **kwargs: `quant_desc_input` for every activation, `quant_desc_weight` for every weight (default: one amax per
            output feature), `quant_desc_probs` for the probabilities (default: `quant_desc_input`, unsigned).

    Raises:
        TypeError: other keywords.
        ValueError: a descriptor with `fake_quant=False`, or one of an activation with an axis.
    """

    default_quant_desc_weight = QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    _q_proj_input_quantizer: TensorQuantizer
    _q_proj_weight_quantizer: TensorQuantizer
    _k_proj_input_quantizer: TensorQuantizer
    _k_proj_weight_quantizer: TensorQuantizer
    _v_proj_input_quantizer: TensorQuantizer
    _v_proj_weight_quantizer: TensorQuantizer
    _out_proj_input_quantizer: TensorQuantizer
    _out_proj_weight_quantizer: TensorQuantizer
    _q_quantizer: TensorQuantizer
    _k_quantizer: TensorQuantizer
    _v_quantizer: TensorQuantizer
    _probs_quantizer: TensorQuantizer

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        desc_probs = kwargs.pop("quant_desc_probs", None)
        desc_input, desc_weight = pop_quant_desc_in_kwargs(type(self), **kwargs)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.add_quantizers(desc_input, desc_weight, desc_probs)

    def add_quantizers(
        self,
        quant_desc_input: QuantDescriptor,
        quant_desc_weight: QuantDescriptor,
        quant_desc_probs: QuantDescriptor | None = None,
    ) -> None:
        """Add the quantizers; also for a `torch.nn.MultiheadAttention` whose class was just changed to this one.

        Raises:
            ValueError: not descriptors, one with `fake_quant=False`, or one of an activation with an axis.
        """
        _check_per_tensor(quant_desc_input, "quant_desc_input")
        if quant_desc_probs is None:
            quant_desc_probs = _unsigned(quant_desc_input)
        _check_per_tensor(quant_desc_probs, "quant_desc_probs")
        for name in _PROJECTIONS:
            setattr(self, f"_{name}_input_quantizer", make_quantizer(self, quant_desc_input, "quant_desc_input"))
            setattr(self, f"_{name}_weight_quantizer", make_quantizer(self, quant_desc_weight, "quant_desc_weight"))
        for name in ("q", "k", "v"):
            setattr(self, f"_{name}_quantizer", make_quantizer(self, quant_desc_input, "quant_desc_input"))
        self._probs_quantizer = make_quantizer(self, quant_desc_probs, "quant_desc_probs")

    # nn.TransformerEncoderLayer in eval mode hands the parameters of its attention to one fused kernel and never calls
    # it, if this flag is true (and nn.TransformerEncoder then makes nested tensors). The flag is what every version of
    # PyTorch asks for, and false is an ordinary value of it, with no other effect there. A property of the class holds
    # for constructed, converted, copied and unpickled instances alike: it goes before the attribute of that name which
    # torch's constructor left in the instance. The alternatives: a forward hook is lost or doubled by people who
    # manage hooks, torch.backends.mha is a switch of the whole process, and batch_first, num_heads or in_proj_bias
    # must keep their true values. Until there are quantizers torch's constructor reads the true value.
    @property
    def _qkv_same_embed_dim(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "_q_quantizer" not in self._modules and self.__dict__["_qkv_same_embed_dim"]

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    def merge_masks(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, int | None]:
        """Refused: PyTorch calls this only on its way into a fused kernel.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "PyTorch's fused attention would walk around the quantizers of QuantMultiheadAttention: "
            "call torch.backends.mha.set_fastpath_enabled(False)"
        )

    def _reset_parameters(self) -> None:
        # torch's own asks the flag above.
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` to `key` and `value`; arguments, shapes and results as `torch.nn.MultiheadAttention`.

        The weights returned are those that the second product used: quantized, and in training after dropout.

        Raises:
            ValueError: shapes that do not fit, or a nested tensor.
            TypeError: a mask that is neither bool nor floating point.
            RuntimeError: `is_causal` without `attn_mask`.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal only says that attn_mask is causal: give attn_mask as well")
        self._check_shapes(query, key, value, key_padding_mask, attn_mask)
        is_batched = query.dim() == 3
        seq_first = is_batched and not self.batch_first
        # From here on (batch, sequence, feature), then (batch, head, sequence, feature of the head).
        if not is_batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif seq_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)

        q, k, v = self._project(query, key, value)
        extra = k.shape[1] - key.shape[1]
        q, k, v = self._heads(q * math.sqrt(1.0 / self.head_dim)), self._heads(k), self._heads(v)
        # As torch does: without weights and padding the hint stands for the mask, also over the added keys.
        if is_causal and key_padding_mask is None and not need_weights:
            mask = _causal(q.shape[2], k.shape[2], q)
        else:
            mask = _merged(attn_mask, key_padding_mask, extra, self.num_heads, q)

        scores = self._q_quantizer(q) @ self._k_quantizer(k).transpose(-2, -1)
        probs = self._probs_quantizer(_softmax(scores, mask))
        # Dropout comes after the quantizer: it would stretch the range beyond that of the deployed model.
        probs = F.dropout(probs, self.dropout, self.training)
        context = probs @ self._v_quantizer(v)

        context = context.permute(2, 0, 1, 3) if seq_first else context.transpose(1, 2)
        output = F.linear(
            self._out_proj_input_quantizer(context.flatten(2)),
            self._out_proj_weight_quantizer(self.out_proj.weight),
            self.out_proj.bias,
        )
        weights = None
        if need_weights:
            weights = probs.mean(dim=1) if average_attn_weights else probs
        if not is_batched:
            output, weights = output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output, weights

    def quantized_weights(self) -> Iterator[QuantizedWeight]:
        """The weights of the four projections, each with its quantizer."""
        for name, weight in zip("qkv", self._in_projections(), strict=True):
            yield f"{name}_proj_weight", [weight], getattr(self, f"_{name}_proj_weight_quantizer")
        yield "out_proj.weight", [self.out_proj.weight], self._out_proj_weight_quantizer

    def _in_projections(self) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None:
            return self.in_proj_weight.chunk(3)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections, keys and values with what `add_bias_kv` and `add_zero_attn` append."""
        wq, wk, wv = self._in_projections()
        bq, bk, bv = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q = F.linear(self._q_proj_input_quantizer(query), self._q_proj_weight_quantizer(wq), bq)
        k = F.linear(self._k_proj_input_quantizer(key), self._k_proj_weight_quantizer(wk), bk)
        v = F.linear(self._v_proj_input_quantizer(value), self._v_proj_weight_quantizer(wv), bv)
        one_row = (k.shape[0], 1, self.embed_dim)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(one_row)], dim=1)
            v = torch.cat([v, self.bias_v.expand(one_row)], dim=1)
        if self.add_zero_attn:
            k = torch.cat([k, k.new_zeros(one_row)], dim=1)
            v = torch.cat([v, v.new_zeros(one_row)], dim=1)
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _check_shapes(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        named = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, x, features in named:
            if x.is_nested:
                raise ValueError(
                    f"{name} is a nested tensor, which cannot be quantized: set use_nested_tensor = False on the "
                    "nn.TransformerEncoder, or pad"
                )
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ValueError(
                    f"query, key and value must all be 3-d (batched) or all 2-d, got {name} with {x.dim()} dimensions"
                )
            if x.shape[-1] != features:
                raise ValueError(f"{name} must have {features} features, got shape {tuple(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"key and value must agree in batch and sequence, got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        is_batched = query.dim() == 3
        batch, sequence = (0, 1) if self.batch_first else (1, 0)
        size = query.shape[batch] if is_batched else 1
        length, source = (x.shape[sequence if is_batched else 0] for x in (query, key))
        if is_batched and key.shape[batch] != size:
            raise ValueError(
                f"query and key must agree in batch, got {tuple(query.shape)} and {tuple(key.shape)} with "
                f"batch_first={self.batch_first}"
            )
        if key_padding_mask is not None:
            _check_mask(key_padding_mask, "key_padding_mask", [(size, source) if is_batched else (source,)])
        if attn_mask is not None:
            _check_mask(attn_mask, "attn_mask", [(length, source), (size * self.num_heads, length, source)])


def _check_per_tensor(descriptor: Any, what: str) -> None:
    check_descriptor(descriptor, what)
    if descriptor.axis is not None:
        raise ValueError(
            f"{what} of QuantMultiheadAttention must be per tensor, got axis={descriptor.axis}: it serves operands of "
            "3 and of 4 dimensions"
        )


def _unsigned(descriptor: QuantDescriptor) -> QuantDescriptor:
    if isinstance(descriptor.num_bits, tuple):
        return descriptor  # floating-point codes have a sign
    return QuantDescriptor(**{**descriptor.dict(), "unsigned": True})


def _check_mask(mask: Tensor, name: str, shapes: list[tuple[int, ...]]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating point, got {mask.dtype}")
    if not any(mask.dim() == len(shape) and mask.shape == shape for shape in shapes):
        raise ValueError(f"{name} must have the shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
    return mask.to(dtype)


def _merged(
    attn_mask: Tensor | None, padding: Tensor | None, extra: int, num_heads: int, like: Tensor
) -> Tensor | None:
    """Both masks in one that is added to scores (batch, head, query, key); `extra` appended keys are open to all."""
    merged = None
    if attn_mask is not None:
        merged = F.pad(_additive(attn_mask, like.dtype), (0, extra))
        if merged.dim() == 3:
            merged = merged.unflatten(0, (-1, num_heads))
    if padding is not None:
        added = F.pad(_additive(padding, like.dtype), (0, extra))[:, None, None, :]
        merged = added if merged is None else merged + added
    return merged


def _causal(length: int, source: int, like: Tensor) -> Tensor:
    later = torch.ones(length, source, dtype=torch.bool, device=like.device).triu(1)
    return _additive(later, like.dtype)


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of the scores plus the mask; 0 where the mask leaves a query no key."""
    if mask is None:
        return scores.softmax(dim=-1)
    closed = (mask.detach() == -torch.inf).all(dim=-1, keepdim=True)
    # Opened for the softmax and closed after it, so that neither it nor its gradient meets infinity minus infinity.
    return (scores + mask.masked_fill(closed, 0.0)).softmax(dim=-1).masked_fill(closed, 0.0)
