"""QuantLinear beside `torch.nn.Linear`; what all layers share is in test_feed_forward_layers.py."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qdq import QuantDescriptor
from qdq.nn import QuantLinear


def test_arguments_in_the_order_of_torch() -> None:
    ours, theirs = inspect.signature(QuantLinear), inspect.signature(nn.Linear)
    assert [*ours.parameters][:-1] == [*theirs.parameters]
    for name, parameter in theirs.parameters.items():
        assert ours.parameters[name].default == parameter.default
    layer = QuantLinear(3, 2, False, "cpu", torch.float64, quant_desc_input=QuantDescriptor(4))
    assert layer.bias is None and layer.weight.dtype == torch.float64 and layer.input_quantizer.num_bits == 4


def test_one_amax_per_output_feature() -> None:
    layer = QuantLinear(3, 2, bias=False)
    layer.input_quantizer.disable()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[100.0, 60.3, -20.2], [0.001, 0.0006, 0.0]]))
    # Each row has 127 steps of its own; with one amax for both, the second row would be zero.
    expected = torch.tensor([[100.0, 77 / 127 * 100, -26 / 127 * 100], [0.001, 76 / 127 * 0.001, 0.0]])
    torch.testing.assert_close(layer(torch.eye(3)).t(), expected)
    layer.weight_quantizer.enable_calib()
    layer(torch.eye(3))
    layer.weight_quantizer.load_calib_amax()
    assert layer.weight_quantizer.amax is not None and layer.weight_quantizer.amax.shape == (2, 1)


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_every_rank_of_input(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = QuantLinear(4, 3, bias=bias), torch.randn(shape)
    expected = F.linear(layer.input_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias)
    assert torch.equal(layer(x), expected)
    assert layer(x).shape == (*shape[:-1], 3)


def test_integers_of_the_simulated_product() -> None:
    """The result is an integer product times both step sizes: what a runtime computes."""
    torch.manual_seed(0)
    layer = QuantLinear(16, 4, bias=False, dtype=torch.float64)
    x = torch.randn(8, 16, dtype=torch.float64)
    of_x, of_w = x.abs().max() / 127, layer.weight.detach().abs().amax(1, keepdim=True) / 127
    codes_x, codes_w = torch.round(x / of_x).long(), torch.round(layer.weight / of_w).long()
    expected = (codes_x @ codes_w.t()).double() * of_x * of_w.t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
