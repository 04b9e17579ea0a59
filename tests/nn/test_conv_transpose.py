"""The quantized transposed convolutions beside torch's; what all layers share is in test_feed_forward_layers.py."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdq.nn as qnn
from qdq import QuantDescriptor, descriptor
from qdq.nn.conv_transpose import QuantConvTransposeNd

SPATIAL = {1: (5,), 2: (5, 4), 3: (3, 4, 5)}
every_dimension = pytest.mark.parametrize("d", SPATIAL)


def classes(d: int) -> tuple[Any, Any]:
    return getattr(qnn, f"QuantConvTranspose{d}d"), getattr(nn, f"ConvTranspose{d}d")


def fake_quantized(x: Tensor, amax: Tensor) -> Tensor:
    return torch.clamp(torch.round(x / (amax / 127)), -128, 127) * (amax / 127)


def check(d: int, x: Tensor, *args: Any, output_size: Any = None, **kwargs: Any) -> Tensor:
    """The layer on `x` is torch's layer of these arguments on the fake-quantized input and weight."""
    quantized, of_torch = classes(d)
    layer = quantized(*args, **kwargs, dtype=torch.float64)
    reference = of_torch(*args, **kwargs, dtype=torch.float64)
    reference.load_state_dict(layer.state_dict())
    with torch.no_grad():
        amax = layer.weight.abs().amax([0, *range(2, d + 2)], keepdim=True)
        reference.weight.copy_(fake_quantized(layer.weight, amax))
    expected = reference(fake_quantized(x, x.abs().max()), output_size)
    output = layer(x) if output_size is None else layer(x, output_size)
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    return output


def sample(d: int, batch: int | None = 2) -> Tensor:
    torch.manual_seed(d)
    return torch.randn((4, *SPATIAL[d]) if batch is None else (batch, 4, *SPATIAL[d]), dtype=torch.float64)


@every_dimension
def test_arguments_in_the_order_of_torch(d: int) -> None:
    quantized, of_torch = classes(d)
    ours, theirs = inspect.signature(quantized), inspect.signature(of_torch)
    assert [*ours.parameters][:-1] == [*theirs.parameters]
    for name, parameter in theirs.parameters.items():
        assert ours.parameters[name].default == parameter.default
    positional = (4, 6, 3, 3, 1, 2, 2, False, 2, "zeros")
    layer = quantized(*positional, quant_desc_weight=QuantDescriptor(4))
    assert (layer.output_padding, layer.groups, layer.dilation) == ((2,) * d, 2, (2,) * d)
    assert of_torch(*positional).extra_repr() in repr(layer)
    assert layer.weight_quantizer.num_bits == 4


@every_dimension
def test_geometries(d: int) -> None:
    check(d, sample(d), 4, 3, 3)
    check(d, sample(d), 4, 6, 2, stride=3, padding=1, output_padding=2, groups=2, bias=False)
    check(d, sample(d), 4, 4, 3, stride=2, dilation=3, groups=4)


@every_dimension
def test_input_without_a_batch(d: int) -> None:
    assert check(d, sample(d, batch=None), 4, 3, 2).dim() == d + 1
    wanted = [2 * size for size in SPATIAL[d]]
    assert check(d, sample(d, batch=None), 4, 3, 1, stride=2, output_size=[3, *wanted]).shape == (3, *wanted)


@every_dimension
def test_default_is_one_amax_per_output_channel(d: int) -> None:
    """Axis 1 of the weight; the predefined descriptors keep the published axis 0."""
    quantized, _ = classes(d)
    assert quantized.default_quant_desc_weight.axis == 1
    assert getattr(descriptor, f"QUANT_DESC_8BIT_CONVTRANSPOSE{d}D_WEIGHT_PER_CHANNEL").axis == 0
    layer = quantized(2, 3, 2)
    with torch.no_grad():
        layer.weight[:, 1] *= 1e-3
    layer.weight_quantizer.enable_calib()
    layer(torch.zeros(1, 2, *SPATIAL[d]))
    layer.weight_quantizer.load_calib_amax()
    amax = layer.weight_quantizer.amax
    assert amax.shape == (1, 3, *([1] * d))
    assert torch.equal(amax, layer.weight.detach().abs().amax([0, *range(2, d + 2)], keepdim=True))


@every_dimension
def test_published_descriptor_by_keyword(d: int) -> None:
    quantized, _ = classes(d)
    published = getattr(descriptor, f"QUANT_DESC_8BIT_CONVTRANSPOSE{d}D_WEIGHT_PER_CHANNEL")
    layer = quantized(2, 3, 2, quant_desc_weight=published)
    assert layer.weight_quantizer.axis == 0
    assert layer.weight_quantizer._get_amax(layer.weight).shape == (2, *([1] * (d + 1)))


@every_dimension
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_output_size(d: int, extra: int) -> None:
    """Stride 3 leaves three sizes open."""
    smallest = [(size - 1) * 3 + 2 for size in SPATIAL[d]]
    wanted = [size + extra for size in smallest]
    assert check(d, sample(d), 4, 3, 2, stride=3, output_size=wanted).shape[2:] == tuple(wanted)
    assert check(d, sample(d), 4, 3, 2, stride=3, output_size=torch.Size([2, 3, *wanted])).shape[2:] == tuple(wanted)
    quantized, _ = classes(d)
    assert quantized(4, 3, 2, stride=3)(sample(d).float(), output_size=tuple(wanted)).shape[2:] == tuple(wanted)


@every_dimension
@pytest.mark.parametrize("extra", [0, 1])
def test_defect_transposed_output_size_with_dilation_uses_the_wrong_range(d: int, extra: int) -> None:
    dilation, stride, kernel = 3, 2, 3
    wanted = [(size - 1) * stride + dilation * (kernel - 1) + 1 + extra for size in SPATIAL[d]]
    output = check(d, sample(d), 4, 3, kernel, stride=stride, dilation=dilation, output_size=wanted)
    assert output.shape[2:] == tuple(wanted)


@every_dimension
def test_an_output_size_that_cannot_be_had(d: int) -> None:
    quantized, _ = classes(d)
    layer, x = quantized(4, 3, 2, stride=2), sample(d).float()
    with pytest.raises(ValueError, match="valid sizes range"):
        layer(x, [100] * d)
    with pytest.raises(ValueError, match="output_size must have"):
        layer(x, [4] * (d + 1))


@every_dimension
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_other_than_zeros_are_refused(d: int, mode: str) -> None:
    quantized, _ = classes(d)
    with pytest.raises(ValueError, match=f'Only "zeros" padding mode is supported for QuantConvTranspose{d}d'):
        quantized(4, 3, 2, padding_mode=mode)


class Upsampling(QuantConvTransposeNd):
    """A transposed convolution of one's own on the published base class."""

    def __init__(self, channels: int, **kwargs: Any) -> None:
        descriptors = qnn.pop_quant_desc_in_kwargs(self.__class__, **kwargs)
        shape = ((2, 2), (2, 2), (0, 0), (1, 1), True, (0, 0))
        super().__init__(channels, channels, *shape, 1, True, "zeros", *descriptors)


def test_base_class_of_ones_own_transposed_convolutions() -> None:
    torch.manual_seed(0)
    layer = Upsampling(4, quant_desc_input=QuantDescriptor(6))
    torch.manual_seed(0)
    twin = qnn.QuantConvTranspose2d(4, 4, 2, 2, quant_desc_input=QuantDescriptor(6))
    x = sample(2).float()
    assert torch.equal(layer(x), twin(x))
    assert layer.weight_quantizer.axis == 1
    assert issubclass(qnn.QuantConvTranspose1d, QuantConvTransposeNd)
    assert issubclass(qnn.QuantConvTranspose3d, QuantConvTransposeNd)
    with pytest.raises(ValueError, match="Only fake quantization is supported"):
        Upsampling(4, quant_desc_weight=QuantDescriptor(fake_quant=False))
