"""The quantized instance norms beside torch's; what all layers share is in test_feed_forward_layers.py."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdq.nn as qnn
from qdq import QuantDescriptor

SPATIAL = {1: (9,), 2: (5, 4), 3: (3, 4, 5)}
every_dimension = pytest.mark.parametrize("d", SPATIAL)


def classes(d: int) -> tuple[Any, Any]:
    return getattr(qnn, f"QuantInstanceNorm{d}d"), getattr(nn, f"InstanceNorm{d}d")


def sample(d: int, batch: int | None = 2) -> Tensor:
    torch.manual_seed(d)
    return torch.randn((3, *SPATIAL[d]) if batch is None else (batch, 3, *SPATIAL[d]), dtype=torch.float64)


def fake_quantized(x: Tensor) -> Tensor:
    step = x.abs().max() / 127
    return torch.clamp(torch.round(x / step), -128, 127) * step


@every_dimension
def test_arguments_in_the_order_of_torch(d: int) -> None:
    quantized, of_torch = classes(d)
    ours, theirs = inspect.signature(quantized), inspect.signature(of_torch)
    positional = [n for n, p in theirs.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [*ours.parameters][:-1] == positional
    for name in positional:
        assert ours.parameters[name].default == theirs.parameters[name].default
    layer = quantized(3, 1e-3, 0.2, True, True, "cpu", torch.float64)
    assert (layer.eps, layer.momentum, layer.affine, layer.track_running_stats) == (1e-3, 0.2, True, True)
    assert layer.weight.dtype == torch.float64


@every_dimension
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("tracked", [False, True])
def test_result_and_running_statistics(d: int, affine: bool, tracked: bool) -> None:
    quantized, of_torch = classes(d)
    layer, reference = (c(3, affine=affine, track_running_stats=tracked).double() for c in (quantized, of_torch))
    for x in (sample(d), sample(d, batch=None)):
        torch.testing.assert_close(layer(x), reference(fake_quantized(x)), rtol=1e-12, atol=1e-12)
    layer.eval()
    reference.eval()
    x = sample(d) + 1
    torch.testing.assert_close(layer(x), reference(fake_quantized(x)), rtol=1e-12, atol=1e-12)
    assert layer.state_dict().keys() == reference.state_dict().keys()
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value, rtol=1e-12, atol=1e-12)


@every_dimension
@pytest.mark.skipif("bias" not in inspect.signature(nn.InstanceNorm1d).parameters, reason="needs a newer PyTorch")
def test_bias_keyword_of_newer_versions(d: int) -> None:
    quantized, _ = classes(d)
    layer = quantized(3, affine=True, bias=False, quant_desc_input=QuantDescriptor(4))
    assert layer.bias is None and layer.weight is not None and layer.input_quantizer.num_bits == 4


@every_dimension
def test_an_input_of_another_rank_or_width_is_refused_as_by_torch(d: int) -> None:
    quantized, _ = classes(d)
    with pytest.raises(ValueError, match="expected"):
        quantized(3)(torch.zeros(1))
    with pytest.raises(ValueError, match="expected input's size at dim=1 to match num_features"):
        quantized(4, affine=True)(sample(d).float())
