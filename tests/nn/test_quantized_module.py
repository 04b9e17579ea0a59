"""The mixins of the quantized layers, used for modules of one's own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdq.nn as qnn
from qdq import QuantDescriptor
from qdq.nn import QuantInputMixin, QuantMixin, pop_quant_desc_in_kwargs


class QuantBilinearMap(nn.Linear, QuantMixin):
    """As the published recipe writes a custom module."""

    default_quant_desc_weight = QuantDescriptor(axis=0)

    def __init__(self, in_features: int, out_features: int, **kwargs: Any) -> None:
        super().__init__(in_features, out_features)
        quant_desc_input, quant_desc_weight = pop_quant_desc_in_kwargs(self.__class__, **kwargs)
        self.init_quantizer(quant_desc_input, quant_desc_weight)


class QuantStack(nn.Linear, QuantMixin):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(2, 2)
        self.init_quantizer(*pop_quant_desc_in_kwargs(type(self), **kwargs), num_layers=3)


class QuantSigmoid(nn.Sigmoid, QuantInputMixin):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.init_quantizer(pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self._input_quantizer(input))


def test_custom_modules() -> None:
    module = QuantBilinearMap(2, 3, quant_desc_input=QuantDescriptor(5))
    assert (module.input_quantizer.num_bits, module.weight_quantizer.axis) == (5, 0)
    x = torch.linspace(-2, 2, 7)
    sigmoid = QuantSigmoid(quant_desc_input=QuantDescriptor(4, amax=2.0))
    codes = torch.clamp(torch.round(x * 7 / 2), -8, 7)
    torch.testing.assert_close(sigmoid(x), (codes * 2 / 7).sigmoid())


def test_several_quantizers_in_lists() -> None:
    module = QuantStack(quant_desc_weight=QuantDescriptor(4))
    assert [q.num_bits for q in module._input_quantizers] == [8, 8, 8]  # type: ignore[union-attr]
    assert [q.num_bits for q in module._weight_quantizers] == [4, 4, 4]  # type: ignore[union-attr]
    assert len({id(q) for q in module.modules()}) == 9
    assert not hasattr(module, "_input_quantizer")


def test_defect_input_quantizer_of_a_module_with_several_raises() -> None:
    module = QuantStack()
    assert module.input_quantizer is module._input_quantizers
    assert module.weight_quantizer is module._weight_quantizers


def test_init_quantizer_outside_a_constructor_is_refused() -> None:
    descriptor = QuantDescriptor()
    with pytest.raises(TypeError, match="init_quantizer must be called from the __init__"):
        QuantBilinearMap(2, 3).init_quantizer(descriptor, descriptor)
    with pytest.raises(TypeError, match="init_quantizer must be called from the __init__"):
        QuantSigmoid().init_quantizer(descriptor)


def test_descriptors_in_keywords() -> None:
    mine = QuantDescriptor(3)
    assert pop_quant_desc_in_kwargs(QuantBilinearMap) == (QuantDescriptor(), QuantDescriptor(axis=0))
    assert pop_quant_desc_in_kwargs(QuantBilinearMap, quant_desc_weight=mine) == (QuantDescriptor(), mine)
    assert pop_quant_desc_in_kwargs(QuantBilinearMap, False, quant_desc_input=mine)[0] is mine
    assert pop_quant_desc_in_kwargs(QuantSigmoid, True, quant_desc_input=mine) is mine
    assert pop_quant_desc_in_kwargs(QuantSigmoid, input_only=True) == QuantDescriptor()
    with pytest.raises(TypeError, match=r"Unused keys: other \(arguments of QuantSigmoid\)"):
        pop_quant_desc_in_kwargs(QuantSigmoid, input_only=True, other=1)


def test_a_default_of_a_base_reaches_subclasses_without_their_own() -> None:
    class Mine(QuantBilinearMap):
        pass

    class Own(QuantBilinearMap):
        default_quant_desc_input = QuantDescriptor(2)

    QuantBilinearMap.set_default_quant_desc_input(QuantDescriptor(6))
    assert Mine(1, 1).input_quantizer.num_bits == 6
    assert Own(1, 1).input_quantizer.num_bits == 2
    assert qnn.QuantLinear(1, 1).input_quantizer.num_bits == 8
    del QuantBilinearMap.default_quant_desc_input


def test_learned_range_in_a_layer() -> None:
    layer = qnn.QuantLinear(3, 2, quant_desc_input=QuantDescriptor(4, amax=1.0, learn_amax=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.tensor([[0.5, 2.0, -3.0]])).sum().backward()
    clip = layer.input_quantizer.clip
    assert clip.clip_value_max.grad is not None and clip.clip_value_max.grad.item() != 0
    assert clip.clip_value_min.grad is not None and clip.clip_value_min.grad.item() != 0
