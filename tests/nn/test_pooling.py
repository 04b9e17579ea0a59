"""The quantized pools beside torch's; what all layers share is in test_feed_forward_layers.py."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdq.nn as qnn
from qdq import QuantDescriptor

SPATIAL = {1: (9,), 2: (9, 7), 3: (7, 5, 6)}
KINDS = ("MaxPool", "AvgPool", "AdaptiveAvgPool")
every_dimension = pytest.mark.parametrize("d", SPATIAL)
every_kind = pytest.mark.parametrize("kind", KINDS)


def sample(d: int, batch: int | None = 2) -> Tensor:
    torch.manual_seed(d)
    return torch.randn((3, *SPATIAL[d]) if batch is None else (batch, 3, *SPATIAL[d]), dtype=torch.float64)


def fake_quantized(x: Tensor) -> Tensor:
    step = x.abs().max() / 127
    return torch.clamp(torch.round(x / step), -128, 127) * step


def check(name: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The layer on `x` is torch's layer of these arguments on the fake-quantized input."""
    output = getattr(qnn, f"Quant{name}")(*args, **kwargs)(x)
    expected = getattr(nn, name)(*args, **kwargs)(fake_quantized(x))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    return output


@every_dimension
@every_kind
def test_arguments_in_the_order_of_torch(kind: str, d: int) -> None:
    ours = inspect.signature(getattr(qnn, f"Quant{kind}{d}d"))
    theirs = inspect.signature(getattr(nn, f"{kind}{d}d"))
    assert [*ours.parameters][:-1] == [*theirs.parameters]
    for name, parameter in theirs.parameters.items():
        assert ours.parameters[name].default == parameter.default


@every_dimension
def test_positional_arguments(d: int) -> None:
    x = sample(d)
    check(f"MaxPool{d}d", x, 3, 2, 1, 1, False, True)
    check(f"AvgPool{d}d", x, 3, 2, 1, True, False, *([5] if d > 1 else []))
    check(f"AdaptiveAvgPool{d}d", x, 3)


@every_dimension
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pool(d: int, ceil_mode: bool) -> None:
    x = sample(d)
    check(f"MaxPool{d}d", x, 2, ceil_mode=ceil_mode)
    check(f"MaxPool{d}d", x, 3, stride=2, padding=1, dilation=2, ceil_mode=ceil_mode)
    check(f"MaxPool{d}d", sample(d, batch=None), 2)


@every_dimension
def test_max_pool_returns_indices(d: int) -> None:
    output, indices = check(f"MaxPool{d}d", sample(d), 2, return_indices=True)
    assert indices.dtype == torch.int64 and indices.shape == output.shape
    assert output.dtype == torch.float64


@every_dimension
@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_average_pool(d: int, count_include_pad: bool, ceil_mode: bool) -> None:
    x = sample(d)
    arguments = {"stride": 2, "padding": 1, "ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
    output = check(f"AvgPool{d}d", x, 3, **arguments)
    other = check(f"AvgPool{d}d", x, 3, **{**arguments, "count_include_pad": not count_include_pad})
    assert not torch.equal(output, other)
    check(f"AvgPool{d}d", sample(d, batch=None), 2)


@pytest.mark.parametrize("d", [2, 3])
def test_divisor_override(d: int) -> None:
    output = check(f"AvgPool{d}d", sample(d), 2, divisor_override=3)
    assert not torch.equal(output, check(f"AvgPool{d}d", sample(d), 2))


@pytest.mark.parametrize(
    ("d", "size"), [(1, 1), (1, (4,)), (2, 1), (2, (3, None)), (2, (None, 2)), (3, (2, 1, 3)), (3, (None, 2, 1))]
)
def test_adaptive_average_pool(d: int, size: Any) -> None:
    check(f"AdaptiveAvgPool{d}d", sample(d), size)
    check(f"AdaptiveAvgPool{d}d", sample(d, batch=None), size)


def test_kernels_that_differ_between_axes() -> None:
    check("MaxPool2d", sample(2), (3, 2), (2, 1), (1, 0))
    check("AvgPool3d", sample(3), (1, 2, 3), (2, 1, 1), (0, 1, 1))


@every_dimension
@every_kind
def test_the_input_is_quantized_and_the_output_is_not(kind: str, d: int) -> None:
    layer = getattr(qnn, f"Quant{kind}{d}d")(2, quant_desc_input=QuantDescriptor(2, amax=1.0))
    output = layer(sample(d))
    # Two bits: -2, -1, 0 and 1.
    grid = {-2.0, -1.0, 0.0, 1.0}
    assert (set(output.flatten().tolist()) <= grid) == (kind == "MaxPool")


@every_dimension
@every_kind
def test_quantized_average_keeps_the_dtype(kind: str, d: int) -> None:
    layer = getattr(qnn, f"Quant{kind}{d}d")(2)
    assert layer(sample(d)).dtype == torch.float64
    assert layer(sample(d).float()).dtype == torch.float32


@every_dimension
def test_a_missing_kernel_size_is_refused(d: int) -> None:
    for kind, argument in zip(KINDS, ("kernel_size", "kernel_size", "output_size"), strict=True):
        with pytest.raises(TypeError, match=f"missing 1 required positional argument: '{argument}'"):
            getattr(qnn, f"Quant{kind}{d}d")()
