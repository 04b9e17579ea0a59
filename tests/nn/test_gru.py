"""QuantGRU against the equations, written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdq.nn import QuantGRU, TensorQuantizer

DOUBLE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fake(x: Tensor, amax: Tensor | float) -> Tensor:
    """Symmetric fake quantization to 8 bits, written from its definition."""
    scale = 127 / torch.as_tensor(amax, dtype=torch.float64)
    return torch.clamp(torch.round(x * scale), -128, 127) / scale


def expected_sequence(module: nn.GRU, suffix: str, x: Tensor, h: Tensor, amax: float | None) -> tuple[Tensor, Tensor]:
    w_ih, w_hh, b_ih, b_hh = (
        module.get_parameter(f"{name}_{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    joint = torch.cat([w_ih, w_hh], 1)
    joint = fake(joint, joint.abs().amax(1, keepdim=True))
    (w_ir, w_iz, w_in), (w_hr, w_hz, w_hn) = joint[:, : x.shape[-1]].chunk(3), joint[:, x.shape[-1] :].chunk(3)
    (b_ir, b_iz, b_in), (b_hr, b_hz, b_hn) = b_ih.chunk(3), b_hh.chunk(3)
    steps = list(x)
    hidden = []
    for step in steps[::-1] if suffix.endswith("reverse") else steps:
        seen = torch.cat([step, h], 1)
        seen = fake(seen, seen.abs().max() if amax is None else amax)
        q_x, q_h = seen[:, : x.shape[-1]], seen[:, x.shape[-1] :]
        r = torch.sigmoid(q_x @ w_ir.T + b_ir + q_h @ w_hr.T + b_hr)
        z = torch.sigmoid(q_x @ w_iz.T + b_iz + q_h @ w_hz.T + b_hz)
        n = torch.tanh(q_x @ w_in.T + b_in + r * (q_h @ w_hn.T + b_hn))
        h = (1 - z) * n + z * h
        hidden.append(h)
    return torch.stack(hidden[::-1] if suffix.endswith("reverse") else hidden), h


@pytest.mark.parametrize("amax", [None, 0.75], ids=["dynamic", "static"])
def test_layer_equals_the_equations(amax: float | None) -> None:
    torch.manual_seed(0)
    module = QuantGRU(4, 6, 2, bidirectional=True, dtype=torch.float64)
    if amax is not None:
        for quantizer in module._input_quantizers:
            assert isinstance(quantizer, TensorQuantizer)
            quantizer.amax = amax
    x, h0 = random(3, 5, 4), random(4, 5, 6, seed=2)
    expected, finals = x, []
    for layer in range(2):
        names = [f"l{layer}", f"l{layer}_reverse"]
        starts = h0[2 * layer : 2 * layer + 2]
        runs = [expected_sequence(module, n, expected, h, amax) for n, h in zip(names, starts, strict=True)]
        expected = torch.cat([hidden for hidden, _ in runs], -1)
        finals += [h for _, h in runs]
    output, h = module(x, h0)
    torch.testing.assert_close(output, expected, **DOUBLE)
    torch.testing.assert_close(h, torch.stack(finals), **DOUBLE)
    assert not torch.allclose(output, nn.GRU.forward(module, x, h0)[0], rtol=0.0, atol=1e-4)


def test_projections_are_refused_as_torch_does() -> None:
    with pytest.raises(TypeError, match="Unused keys: proj_size"):
        QuantGRU(4, 6, proj_size=0)


def test_states_of_an_lstm_are_refused() -> None:
    h = torch.zeros(1, 2, 3)
    with pytest.raises(TypeError, match="QuantGRU: hx must be a tensor, got tuple"):
        QuantGRU(4, 3)(torch.zeros(5, 2, 4), (h, h))
