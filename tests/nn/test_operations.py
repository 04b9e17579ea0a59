"""QuantAdd, QuantConcat and QuantMatmul against numpy in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qdq
from qdq import QuantDescriptor
from qdq.nn import QuantAdd, QuantConcat, QuantMatmul, TensorQuantizer

LAYERS = [QuantAdd, QuantConcat, QuantMatmul]


def operands(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def call(layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    return layer([a, b]) if isinstance(layer, QuantConcat) else layer(a, b)


def plain(layer: nn.Module, a: Any, b: Any) -> Any:
    if isinstance(layer, QuantConcat):
        return np.concatenate([a, b], axis=layer.dim)
    return a + b if isinstance(layer, QuantAdd) else a @ b


def fake(x: Tensor, amax: float, bound: int = 127, low: int | None = None) -> np.ndarray:
    scale = bound / amax
    return np.clip(np.rint(x.double().numpy() * scale), -bound - 1 if low is None else low, bound) / scale


def calibrate(layer: nn.Module, a: Tensor, b: Tensor) -> None:
    quantizers = [m for m in layer.modules() if isinstance(m, TensorQuantizer)]
    for quantizer in quantizers:
        quantizer.disable_quant()
        quantizer.enable_calib()
    call(layer, a, b)
    for quantizer in quantizers:
        quantizer.load_calib_amax()
        quantizer.disable_calib()
        quantizer.enable_quant()


@pytest.mark.parametrize("cls", LAYERS)
def test_disabled_quantizers_leave_the_operation(cls: Any) -> None:
    layer = cls()
    for module in layer.modules():
        if isinstance(module, TensorQuantizer):
            module.disable()
    a, b = operands((4, 4), (4, 4))
    expected = {QuantAdd: torch.add, QuantMatmul: torch.matmul, QuantConcat: lambda *x: torch.cat(x)}[cls](a, b)
    assert torch.equal(call(layer, a, b), expected)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shapes=st.sampled_from([((2, 3), (2, 3)), ((2, 3), (3,)), ((1,), (2, 1, 3)), ((), (2,))]),
    ratio=st.sampled_from([0.01, 1.0, 300.0]),
    seed=st.integers(0, 50),
)
def test_addition_with_a_step_size_of_each_operand(shapes: Any, ratio: float, seed: int) -> None:
    a, b = operands(*shapes, seed=seed)
    b = b * ratio
    expected = fake(a, float(a.abs().max())) + fake(b, float(b.abs().max()))
    np.testing.assert_allclose(QuantAdd()(a, b).numpy(), expected, rtol=1e-12, atol=1e-14)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shapes=st.sampled_from([((2, 3), (3, 4)), ((5, 2, 3), (3, 4)), ((2, 1, 2, 3), (5, 3, 2)), ((3,), (3,))]),
    seed=st.integers(0, 50),
)
def test_matrix_product_of_quantized_operands(shapes: Any, seed: int) -> None:
    a, b = operands(*shapes, seed=seed)
    expected = fake(a, float(a.abs().max())) @ fake(b, float(b.abs().max()))
    np.testing.assert_allclose(QuantMatmul()(a, b).numpy(), expected, rtol=1e-12, atol=1e-14)


def test_operands_may_have_descriptors_of_their_own() -> None:
    layer = QuantMatmul(quant_desc_input=QuantDescriptor(unsigned=True), quant_desc_other=QuantDescriptor(4))
    a, b = operands((3, 3), (3, 3))
    a = a.abs()
    expected = fake(a, float(a.max()), 255, 0) @ fake(b, float(b.abs().max()), 7)
    np.testing.assert_allclose(layer(a, b).numpy(), expected, rtol=1e-12, atol=1e-14)
    assert layer.input_quantizer is layer._input_quantizer
    assert layer.other_quantizer.num_bits == 4


def test_concatenated_inputs_share_one_calibrated_quantizer() -> None:
    a, b = operands((2, 3), (2, 5))
    b = b * 20
    layer = QuantConcat(dim=1)
    calibrate(layer, a, b)
    assert [name for name, _ in layer.named_modules() if name] == ["_input_quantizer"]
    amax = float(torch.cat([a, b], 1).abs().max().float())
    assert layer.input_quantizer.amax == amax
    np.testing.assert_allclose(layer([a, b]).numpy(), np.concatenate([fake(a, amax), fake(b, amax)], 1), rtol=1e-12)
    assert layer((a, b)).shape == (2, 8)
    assert "dim=1" in repr(layer)


def test_concatenation_without_amax_is_dynamic_per_input() -> None:
    a, b = operands((2, 3), (4, 3))
    expected = np.concatenate([fake(x, float(x.abs().max())) for x in (a, b)])
    np.testing.assert_allclose(QuantConcat()([a, b]).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("cls", LAYERS)
def test_gradients_are_straight_through_and_stop_beyond_amax(cls: Any) -> None:
    layer = cls(quant_desc_input=QuantDescriptor(amax=1.0))
    a = torch.tensor([[0.5, -1.0], [1.5, -2.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[0.25, 3.0], [-0.75, 0.0]], dtype=torch.float64, requires_grad=True)
    call(layer, a, b).sum().backward()
    inside_a, inside_b = a.detach().abs() <= 1, b.detach().abs() <= 1
    if cls is QuantMatmul:
        grad_a = torch.from_numpy(fake(b.detach(), 1.0)).sum(1).expand(2, 2) * inside_a
        grad_b = torch.from_numpy(fake(a.detach(), 1.0)).sum(0)[:, None].expand(2, 2) * inside_b
    else:
        grad_a, grad_b = inside_a.double(), inside_b.double()
    torch.testing.assert_close(a.grad, grad_a)
    torch.testing.assert_close(b.grad, grad_b)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(cls: Any, dtype: torch.dtype) -> None:
    layer = cls()
    a, b = operands((4, 4), (4, 4), dtype=dtype)
    output = call(layer, a, b)
    assert output.dtype == dtype
    expected = plain(layer, fake(a, float(a.abs().max())), fake(b, float(b.abs().max())))
    np.testing.assert_allclose(output.double().numpy(), expected, atol=16 * torch.finfo(dtype).eps)


def test_autocast() -> None:
    a, b = operands((4, 4), (4, 4), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert QuantMatmul()(a, b).dtype == torch.bfloat16
        assert QuantAdd()(a, b).dtype == QuantConcat()([a, b]).dtype == torch.float32


@pytest.mark.parametrize("cls", LAYERS)
def test_compiled_exported_copied_and_pickled(cls: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = cls()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return call(self.layer, a, b)

    a, b = operands((4, 4), (4, 4), dtype=torch.float32)
    model = Model().eval()
    calibrate(model.layer, a, b)
    expected = model(a, b)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(a, b), expected)
    torch.testing.assert_close(torch.export.export(model, (a, b), strict=False).module()(a, b), expected)
    for layer in (copy.deepcopy(model.layer), pickle.loads(pickle.dumps(model.layer))):
        assert torch.equal(call(layer, a, b), expected)
    fresh = cls()
    fresh.load_state_dict(model.layer.state_dict())
    assert torch.equal(call(fresh, a, b), expected)
    amax = {name: value / 2 for name, value in model.layer.state_dict().items()}
    halved = torch.func.functional_call(model.layer, amax, ([a, b],) if cls is QuantConcat else (a, b))
    assert not torch.equal(halved, expected)


@pytest.mark.parametrize("cls", LAYERS)
def test_class_defaults(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cls, "default_quant_desc_input", cls.default_quant_desc_input)
    cls.set_default_quant_desc_input(QuantDescriptor(5))
    assert [m.num_bits for m in cls().modules() if isinstance(m, TensorQuantizer)] == [5] * (1 + (cls != QuantConcat))
    others = [other for other in LAYERS if other is not cls]
    assert all(other().input_quantizer.num_bits == 8 for other in others)


@pytest.mark.parametrize("cls", LAYERS)
def test_refused_arguments(cls: Any) -> None:
    with pytest.raises(TypeError, match=f"Unused keys: quant_desc_weight .arguments of {cls.__name__}"):
        cls(quant_desc_weight=QuantDescriptor())
    with pytest.raises(ValueError, match="Only fake quantization is supported"):
        cls(quant_desc_input=QuantDescriptor(fake_quant=False))
    with pytest.raises(ValueError, match="quant_desc_input must be a QuantDescriptor, got int"):
        cls(quant_desc_input=8)
    with pytest.raises(ValueError, match="must be a QuantDescriptor"):
        cls.set_default_quant_desc_input(8)


def test_refused_descriptors_of_one_layer() -> None:
    with pytest.raises(ValueError, match="quant_desc_other"):
        QuantAdd(quant_desc_other=QuantDescriptor(fake_quant=False))
    with pytest.raises(ValueError, match="quant_desc_input of QuantConcat must be per tensor.*axis=1"):
        QuantConcat(quant_desc_input=QuantDescriptor(axis=1))


def test_refused_operands() -> None:
    x = torch.ones(2)
    with pytest.raises(TypeError, match="the second operand of QuantAdd must be a tensor, got float"):
        QuantAdd()(x, 1.0)
    with pytest.raises(TypeError, match="the first operand of QuantMatmul must be a tensor, got NoneType"):
        QuantMatmul()(None, x)
    with pytest.raises(TypeError, match="QuantConcat takes a list or tuple of tensors, got Tensor"):
        QuantConcat()(x)
    with pytest.raises(TypeError, match="input 1 of QuantConcat must be a tensor, got int"):
        QuantConcat()([x, 1])


def test_public_names() -> None:
    assert {"QuantAdd", "QuantConcat", "QuantMatmul"} <= set(qdq.nn.__all__)
