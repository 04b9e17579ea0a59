"""QuantLSTM and QuantLSTMCell against the equations, written out in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdq.descriptor import QuantDescriptor
from qdq.nn import QuantLSTM, QuantLSTMCell, TensorQuantizer

DOUBLE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def fake(x: Tensor, amax: Tensor | float, bound: int = 127) -> Tensor:
    """Symmetric fake quantization, written from its definition."""
    scale = bound / torch.as_tensor(amax, dtype=torch.float64)
    return torch.clamp(torch.round(x * scale), -bound - 1, bound) / scale


def expected_step(
    x: Tensor, h: Tensor, c: Tensor, weights: tuple[Tensor, Tensor], bias: Tensor, amax: float | None = None
) -> tuple[Tensor, Tensor]:
    joined, weight = torch.cat([x, h], 1), torch.cat(weights, 1)
    joined = fake(joined, joined.abs().max() if amax is None else amax)
    weight = fake(weight, weight.abs().amax(1, keepdim=True))
    i, f, g, o = (joined @ weight.T + bias).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def expected_sequence(module: nn.LSTM, suffix: str, x: Tensor, amax: float | None) -> tuple[Tensor, Tensor, Tensor]:
    get = module.get_parameter
    weights = (get(f"weight_ih_{suffix}"), get(f"weight_hh_{suffix}"))
    bias = get(f"bias_ih_{suffix}") + get(f"bias_hh_{suffix}")
    h = c = torch.zeros(x.shape[1], module.hidden_size, dtype=torch.float64)
    steps = list(x)
    hidden = []
    for step in steps[::-1] if suffix.endswith("reverse") else steps:
        h, c = expected_step(step, h, c, weights, bias, amax)
        hidden.append(h)
    return torch.stack(hidden[::-1] if suffix.endswith("reverse") else hidden), h, c


@pytest.mark.parametrize("amax", [None, 0.875], ids=["dynamic", "static"])
def test_layer_equals_the_equations(amax: float | None) -> None:
    torch.manual_seed(0)
    module = QuantLSTM(4, 6, 2, bidirectional=True, dtype=torch.float64)
    if amax is not None:
        for quantizer in module._input_quantizers:
            assert isinstance(quantizer, TensorQuantizer)
            quantizer.amax = amax
    x = random(3, 5, 4)
    expected, finals = x, []
    for layer in range(2):
        runs = [expected_sequence(module, f"l{layer}{suffix}", expected, amax) for suffix in ("", "_reverse")]
        expected = torch.cat([hidden for hidden, _, _ in runs], -1)
        finals += [(h, c) for _, h, c in runs]
    output, (h, c) = module(x)
    torch.testing.assert_close(output, expected, **DOUBLE)
    torch.testing.assert_close(h, torch.stack([h for h, _ in finals]), **DOUBLE)
    torch.testing.assert_close(c, torch.stack([c for _, c in finals]), **DOUBLE)
    plain = nn.LSTM(4, 6, 2, bidirectional=True, dtype=torch.float64)
    plain.load_state_dict(dict(module.named_parameters()))
    assert not torch.allclose(output, plain(x)[0], rtol=0.0, atol=1e-4)


def test_projections_are_refused() -> None:
    assert QuantLSTM(4, 6, proj_size=0).proj_size == 0
    with pytest.raises(ValueError, match="proj_size must be 0, got 2"):
        QuantLSTM(4, 6, proj_size=2)
    module: Any = nn.LSTM(4, 6, proj_size=2)
    module.__class__ = QuantLSTM
    with pytest.raises(ValueError, match="proj_size must be 0, got 2"):
        module.add_quantizers(QuantLSTM.default_quant_desc_input, QuantLSTM.default_quant_desc_weight)


@pytest.mark.parametrize("hx", [torch.zeros(1, 5, 6), (torch.zeros(1, 5, 6),), "hc"[:1]])
def test_states_must_be_a_pair(hx: Any) -> None:
    with pytest.raises(TypeError, match=r"QuantLSTM: hx must be a pair \(h, c\)"):
        QuantLSTM(4, 6)(torch.zeros(3, 5, 4), hx)
    with pytest.raises(TypeError, match=r"QuantLSTMCell: hx must be a pair \(h, c\)"):
        QuantLSTMCell(4, 6)(torch.zeros(5, 4), hx)


def test_shape_of_c_is_checked() -> None:
    with pytest.raises(RuntimeError, match=r"hx\[1\] must have the shape \(1, 5, 6\), got \(1, 5, 7\)"):
        QuantLSTM(4, 6)(torch.zeros(3, 5, 4), (torch.zeros(1, 5, 6), torch.zeros(1, 5, 7)))


# -- the cell -------------------------------------------------------------------------------------------


def cells(**kwargs: Any) -> tuple[QuantLSTMCell, nn.LSTMCell]:
    torch.manual_seed(0)
    plain = nn.LSTMCell(4, 6, **kwargs)
    torch.manual_seed(0)
    return QuantLSTMCell(4, 6, **kwargs), plain


def disable(cell: QuantLSTMCell) -> QuantLSTMCell:
    cell.input_quantizer.disable()
    cell.weight_quantizer.disable()
    return cell


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("with_states", [True, False])
def test_disabled_cell_equals_torch_with_gradients(bias: bool, batched: bool, with_states: bool) -> None:
    ours, plain = cells(bias=bias, dtype=torch.float64)
    assert isinstance(ours, nn.LSTMCell)
    assert list(ours.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    shape = (5,) if batched else ()
    hx = (random(*shape, 6, seed=2), random(*shape, 6, seed=3)) if with_states else None
    results, gradients = [], []
    for cell in (disable(ours), plain):
        x = random(*shape, 4).requires_grad_()
        h, c = cell(x, hx)
        results.append((h, c))
        gradients.append(torch.autograd.grad((h * c).sum(), [x, *cell.parameters()]))
    for a, b in zip([*results[0], *gradients[0]], [*results[1], *gradients[1]], strict=True):
        torch.testing.assert_close(a, b, **DOUBLE)


@pytest.mark.parametrize("batched", [True, False])
def test_cell_equals_the_equations(batched: bool) -> None:
    cell, plain = cells(dtype=torch.float64)
    x, h, c = random(5, 4), random(5, 6, seed=2), random(5, 6, seed=3)
    if not batched:
        x, h, c = x[:1], h[:1], c[:1]
    weights = (plain.weight_ih, plain.weight_hh)
    expected = expected_step(x, h, c, weights, plain.bias_ih + plain.bias_hh)
    actual = cell(x, (h, c)) if batched else tuple(t.unsqueeze(0) for t in cell(x[0], (h[0], c[0])))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **DOUBLE)


def test_cell_quantizers_and_state() -> None:
    cell, _ = cells()
    assert cell.input_quantizer is cell._input_quantizer and cell.weight_quantizer is cell._weight_quantizer
    assert (cell.input_quantizer.axis, cell.weight_quantizer.axis) == (None, 0)
    x = random(5, 4, dtype=torch.float32)
    for name, module in cell.named_modules():
        if name.endswith("_quantizer"):
            assert isinstance(module, TensorQuantizer)
            module.disable_quant()
            module.enable_calib()
    h, c = cell(x)
    cell(3 * x, (h, c))
    for name, module in cell.named_modules():
        if name.endswith("_quantizer"):
            assert isinstance(module, TensorQuantizer)
            module.load_calib_amax()
            module.enable_quant()
            module.disable_calib()
    assert cell.input_quantizer.amax == 3 * x.abs().max()
    weight = torch.cat([cell.weight_ih, cell.weight_hh], 1)
    assert cell.weight_quantizer.amax is not None
    assert torch.equal(cell.weight_quantizer.amax, weight.detach().abs().amax(1, keepdim=True))
    fresh = QuantLSTMCell(4, 6)
    fresh.load_state_dict(cell.state_dict())
    for twin in (fresh, copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert all(torch.equal(a, b) for a, b in zip(twin(x), cell(x), strict=True))


def test_cell_keywords() -> None:
    cell = QuantLSTMCell(4, 6, quant_desc_input=QuantDescriptor(num_bits=4), device="meta", dtype=torch.float16)
    assert cell.input_quantizer.num_bits == 4 and cell.weight_ih.dtype == torch.float16
    with pytest.raises(TypeError, match="Unused keys: descriptor .*QuantLSTMCell"):
        QuantLSTMCell(4, 6, descriptor=None)
    with pytest.raises(ValueError, match="Only fake quantization is supported"):
        QuantLSTMCell(4, 6, quant_desc_weight=QuantDescriptor(fake_quant=False))


def test_cell_reset_spares_learned_ranges() -> None:
    cell = QuantLSTMCell(4, 6, quant_desc_input=QuantDescriptor(learn_amax=True, amax=0.25))
    torch.manual_seed(5)
    cell.reset_parameters()
    torch.manual_seed(5)
    plain = nn.LSTMCell(4, 6)
    torch.manual_seed(5)
    plain.reset_parameters()
    assert cell.input_quantizer.clip.clip_value_max.item() == 0.25
    assert torch.equal(cell.bias_hh, plain.bias_hh)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_cell_compile_autocast_and_functional_call() -> None:
    cell, plain = cells()
    x = random(5, 4, dtype=torch.float32)
    compiled = torch.compile(cell, fullgraph=True, backend="eager")
    for a, b in zip(compiled(x), cell(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(cell(x), plain(x), strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=0.03)
    tensors = {name: 2 * parameter.detach() for name, parameter in plain.named_parameters()}
    twice = torch.func.functional_call(disable(cell), tensors, (x,))
    for a, b in zip(twice, torch.func.functional_call(plain, tensors, (x,)), strict=True):
        torch.testing.assert_close(a, b)


def test_conversion_of_an_existing_cell() -> None:
    _, plain = cells()
    converted: Any = copy.deepcopy(plain)
    converted.__class__ = QuantLSTMCell
    converted.add_quantizers(QuantLSTMCell.default_quant_desc_input, QuantLSTMCell.default_quant_desc_weight)
    x = random(5, 4, dtype=torch.float32)
    assert not torch.equal(converted(x)[0], plain(x)[0])
    torch.testing.assert_close(disable(converted)(x)[0], plain(x)[0])


@pytest.mark.parametrize("shape", [(5, 3), (3,), (2, 5, 4), ()])
def test_cell_refuses_other_inputs(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"needs an input of shape \(batch, 4\) or \(4,\)"):
        QuantLSTMCell(4, 6)(torch.zeros(shape))


def test_cell_refuses_other_states() -> None:
    good = torch.zeros(5, 6)
    with pytest.raises(RuntimeError, match=r"hx\[1\] must have the shape \(5, 6\), got \(4, 6\)"):
        QuantLSTMCell(4, 6)(torch.zeros(5, 4), (good, good[:4]))
    with pytest.raises(RuntimeError, match=r"hx\[0\] must have the shape \(6,\), got \(5, 6\)"):
        QuantLSTMCell(4, 6)(torch.zeros(4), (good, good))
