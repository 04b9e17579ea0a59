"""One small instance of every layer of `qdq.nn`, with an input, for tests that must hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import qdq.nn
from qdq.descriptor import QuantDescriptor

Case = tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]


def _floats(*shape: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(shape),)


# Names of `qdq.nn` that are no layers of their own.
NO_LAYERS = {"QuantMixin", "QuantInputMixin", "pop_quant_desc_in_kwargs"}

LAYERS: dict[str, Case] = {
    "Clip": (lambda: qdq.nn.Clip(-0.5, 0.5, True, True), _floats(2, 3)),
    "TensorQuantizer": (qdq.nn.TensorQuantizer, _floats(2, 3)),
    "QuantLinear": (lambda: qdq.nn.QuantLinear(3, 4), _floats(2, 3)),
    "QuantEmbedding": (lambda: qdq.nn.QuantEmbedding(5, 3), lambda: (torch.tensor([[0, 4], [2, 2]]),)),
    "QuantMultiheadAttention": (lambda: qdq.nn.QuantMultiheadAttention(4, 2), lambda: (torch.randn(3, 2, 4),) * 3),
    "QuantLSTM": (lambda: qdq.nn.QuantLSTM(3, 4), _floats(2, 2, 3)),
    "QuantGRU": (lambda: qdq.nn.QuantGRU(3, 4), _floats(2, 2, 3)),
    "QuantLSTMCell": (lambda: qdq.nn.QuantLSTMCell(3, 4), _floats(2, 3)),
    "QuantAdd": (qdq.nn.QuantAdd, lambda: (torch.randn(2, 3), torch.randn(2, 3))),
    "QuantMatmul": (qdq.nn.QuantMatmul, lambda: (torch.randn(2, 3), torch.randn(3, 2))),
    "QuantConcat": (lambda: qdq.nn.QuantConcat(1), lambda: ([torch.randn(2, 3), torch.randn(2, 1)],)),
    "learned range": (
        lambda: qdq.nn.QuantLinear(3, 4, quant_desc_input=QuantDescriptor(learn_amax=True)),
        _floats(2, 3),
    ),
    "E4M3": (
        lambda: qdq.nn.QuantLinear(
            3, 4, quant_desc_input=QuantDescriptor((4, 3)), quant_desc_weight=QuantDescriptor((4, 3), axis=0)
        ),
        _floats(2, 3),
    ),
}
for _n in (1, 2, 3):
    _size = (3,) * _n
    _maps = _floats(2, 2, *_size)
    for _kind in ("Conv", "ConvTranspose"):
        _name = f"Quant{_kind}{_n}d"
        LAYERS[_name] = (partial(getattr(qdq.nn, _name), 2, 3, 3, padding=1), _maps)
    for _kind, _argument in (("MaxPool", 2), ("AvgPool", 2), ("AdaptiveAvgPool", 1)):
        _name = f"Quant{_kind}{_n}d"
        LAYERS[_name] = (partial(getattr(qdq.nn, _name), _argument), _maps)
    _name = f"QuantInstanceNorm{_n}d"
    LAYERS[_name] = (partial(getattr(qdq.nn, _name), 2, affine=True), _maps)
LAYERS["QuantConv2d circular"] = (
    lambda: qdq.nn.QuantConv2d(2, 3, 3, padding="same", padding_mode="circular"),
    _floats(2, 2, 3, 3),
)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a layer's output."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output if part is not None for tensor in tensors_of(part)]
