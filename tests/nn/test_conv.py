"""The quantized convolutions beside torch's; what all layers share is in test_feed_forward_layers.py."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdq.nn as qnn
from qdq import QuantDescriptor
from qdq.nn.conv import QuantConvNd

SPATIAL = {1: (7,), 2: (7, 6), 3: (5, 4, 6)}
MODES = ("zeros", "reflect", "replicate", "circular")
every_dimension = pytest.mark.parametrize("d", SPATIAL)


def classes(d: int) -> tuple[Any, Any]:
    return getattr(qnn, f"QuantConv{d}d"), getattr(nn, f"Conv{d}d")


def fake_quantized(x: Tensor, amax: Tensor) -> Tensor:
    return torch.clamp(torch.round(x / (amax / 127)), -128, 127) * (amax / 127)


def check(d: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer on `x` is torch's layer of these arguments on the fake-quantized input and weight."""
    quantized, of_torch = classes(d)
    layer = quantized(*args, **kwargs, dtype=torch.float64)
    reference = of_torch(*args, **kwargs, dtype=torch.float64)
    reference.load_state_dict(layer.state_dict())
    with torch.no_grad():
        amax = layer.weight.abs().amax(list(range(1, d + 2)), keepdim=True)
        reference.weight.copy_(fake_quantized(layer.weight, amax))
    expected = reference(fake_quantized(x, x.abs().max()))
    output = layer(x)
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    return output


def sample(d: int, channels: int = 4, batch: int | None = 2) -> Tensor:
    torch.manual_seed(d)
    shape = (channels, *SPATIAL[d]) if batch is None else (batch, channels, *SPATIAL[d])
    return torch.randn(shape, dtype=torch.float64)


@every_dimension
def test_arguments_in_the_order_of_torch(d: int) -> None:
    quantized, of_torch = classes(d)
    ours, theirs = inspect.signature(quantized), inspect.signature(of_torch)
    assert [*ours.parameters][:-1] == [*theirs.parameters]
    for name, parameter in theirs.parameters.items():
        assert ours.parameters[name].default == parameter.default
    layer = quantized(4, 6, 3, 2, 1, 2, 2, False, "circular", quant_desc_weight=QuantDescriptor(4))
    assert repr(of_torch(4, 6, 3, 2, 1, 2, 2, False, "circular")).split("(", 1)[1][:-1] in repr(layer)
    assert layer.weight_quantizer.num_bits == 4


@every_dimension
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [0, 1, 2, "same", "valid"])
def test_every_padding(d: int, mode: str, padding: int | str) -> None:
    output = check(d, sample(d), 4, 3, 3, padding=padding, padding_mode=mode)
    if padding in (1, "same"):
        assert output.shape == (2, 3, *SPATIAL[d])


@every_dimension
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # of PyTorch
def test_defect_padding_same_raises(d: int, mode: str) -> None:
    """An even kernel pads one more on the right."""
    output = check(d, sample(d), 4, 3, 4, padding="same", padding_mode=mode)
    assert output.shape[2:] == SPATIAL[d]
    check(d, sample(d), 4, 3, 2, padding="same", dilation=2, padding_mode=mode)


@every_dimension
@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_defect_padding_mode_reflect_and_replicate_pad_with_zeros(d: int, mode: str) -> None:
    quantized, _ = classes(d)
    x = torch.ones(1, 1, *SPATIAL[d])
    layer = quantized(1, 1, 3, padding=1, bias=False, padding_mode=mode)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    # A constant stays constant: with zeros the border would be smaller.
    torch.testing.assert_close(layer(x), torch.full_like(x, 3.0**d))


@every_dimension
@pytest.mark.parametrize("padding", [1, 2, 3])
def test_defect_padding_mode_circular_pads_half(d: int, padding: int) -> None:
    x = sample(d)
    output = check(d, x, 4, 3, 3, padding=padding, padding_mode="circular")
    assert output.shape[2:] == tuple(size + 2 * padding - 2 for size in SPATIAL[d])


@pytest.mark.parametrize("mode", MODES)
def test_padding_that_differs_between_axes(mode: str) -> None:
    check(2, sample(2), 4, 3, (3, 2), padding=(2, 1), padding_mode=mode)
    check(3, sample(3), 4, 3, (3, 2, 1), padding=(2, 1, 0), padding_mode=mode)


@every_dimension
@pytest.mark.parametrize("mode", MODES)
def test_the_input_is_quantized_before_it_is_padded(d: int, mode: str) -> None:
    quantized, _ = classes(d)
    layer, x, seen = quantized(4, 3, 3, padding=2, padding_mode=mode), sample(d).float(), []
    layer.input_quantizer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    layer(x)
    assert [s.shape for s in seen] == [x.shape]


@every_dimension
def test_strides_dilation_groups_and_no_bias(d: int) -> None:
    check(d, sample(d), 4, 6, 2, stride=2, dilation=2, groups=2, bias=False)
    check(d, sample(d), 4, 4, 3, stride=2, padding=1, groups=4, padding_mode="reflect")


@every_dimension
@pytest.mark.parametrize("mode", MODES)
def test_input_without_a_batch(d: int, mode: str) -> None:
    output = check(d, sample(d, batch=None), 4, 3, 3, padding=1, padding_mode=mode)
    assert output.shape == (3, *SPATIAL[d])


@every_dimension
def test_an_input_of_another_rank_is_refused_as_by_torch(d: int) -> None:
    quantized, _ = classes(d)
    with pytest.raises(RuntimeError, match="Expected"):
        quantized(4, 3, 3)(torch.zeros(4))


@pytest.mark.parametrize("d", [2, 3])
def test_channels_last(d: int) -> None:
    memory_format = {2: torch.channels_last, 3: torch.channels_last_3d}[d]
    quantized, _ = classes(d)
    layer, x = quantized(4, 3, 3), sample(d).float()
    expected = layer(x)
    torch.testing.assert_close(layer.to(memory_format=memory_format)(x.to(memory_format=memory_format)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding_mode": "mirror"}, "padding_mode must be one of"),
        ({"padding": "full"}, "Invalid padding string"),
        ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
        ({"groups": 3}, "in_channels must be divisible by groups"),
    ],
)
def test_what_torch_refuses_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qnn.QuantConv2d(4, 6, 3, **arguments)


class SmoothingConv(QuantConvNd):
    """A convolution of one's own on the published base class."""

    def __init__(self, channels: int, **kwargs: Any) -> None:
        descriptors = qnn.pop_quant_desc_in_kwargs(self.__class__, **kwargs)
        shape = ((3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0))
        super().__init__(channels, channels, *shape, channels, False, "replicate", *descriptors)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.conv2d(input, weight.softmax(-1), bias, self.stride, self.padding, groups=self.groups)  # type: ignore[arg-type]


def test_base_class_of_ones_own_convolutions() -> None:
    torch.manual_seed(0)
    reference = nn.Conv2d(4, 4, 3, groups=4, bias=False)
    torch.manual_seed(0)
    layer = SmoothingConv(4, quant_desc_input=QuantDescriptor(6))
    assert torch.equal(layer.weight, reference.weight)
    assert (layer.input_quantizer.num_bits, layer.weight_quantizer.axis) == (6, 0)
    x = sample(2).float()
    weight = layer.weight_quantizer(layer.weight).softmax(-1)
    expected = nn.functional.conv2d(layer.input_quantizer(x), weight, None, padding=1, groups=4)
    assert torch.equal(layer(x), expected)
    assert issubclass(qnn.QuantConv1d, QuantConvNd) and issubclass(qnn.QuantConv3d, QuantConvNd)
    with pytest.raises(TypeError, match="Unused keys: extra"):
        SmoothingConv(4, extra=1)
    with pytest.raises(ValueError, match="Only fake quantization is supported"):
        SmoothingConv(4, quant_desc_weight=QuantDescriptor(fake_quant=False))
