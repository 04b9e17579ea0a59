"""QuantEmbedding against torch's own and against numpy in float64."""

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
from qdq.descriptor import QUANT_DESC_8BIT_PER_TENSOR
from qdq.nn import QuantEmbedding

F64: Any = {"dtype": torch.float64}
IDS = torch.tensor([[0, 3, 3], [6, 2, 0]])


def fake(rows: Tensor, amax: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(amax > 0, 127 / amax, 1.0)
    return np.clip(np.rint(rows.detach().double().numpy() * scale), -128, 127) / scale


def per_row(weight: Tensor) -> np.ndarray:
    return weight.detach().abs().amax(1, keepdim=True).double().numpy()


def twins(**arguments: Any) -> tuple[nn.Embedding, QuantEmbedding]:
    torch.manual_seed(5)
    of_torch = nn.Embedding(7, 4, **arguments)
    after = torch.rand(1)
    torch.manual_seed(5)
    ours = QuantEmbedding(7, 4, **arguments)
    assert torch.equal(torch.rand(1), after)
    return of_torch, ours


def test_constructed_as_torch() -> None:
    of_torch, ours = twins(padding_idx=-2, max_norm=2.0, norm_type=1.0, scale_grad_by_freq=True, sparse=True)
    assert list(of_torch.state_dict()) == list(ours.state_dict()) == ["weight"]
    assert torch.equal(of_torch.weight, ours.weight)
    assert of_torch.extra_repr() == ours.extra_repr()
    assert ours.weight_quantizer is ours._weight_quantizer
    assert [name for name, _ in ours.named_modules() if name] == ["_weight_quantizer"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    padding_idx=st.sampled_from([None, 0, 3, -1]),
    max_norm=st.sampled_from([None, 1.0]),
    norm_type=st.sampled_from([1.0, 2.0]),
    scale_grad_by_freq=st.booleans(),
    shape=st.lists(st.integers(0, 3), max_size=3),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_disabled_equals_torch_with_gradients(shape: list[int], index_dtype: torch.dtype, **arguments: Any) -> None:
    of_torch, ours = twins(**arguments, **F64)
    ours.weight_quantizer.disable()
    ids = torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(1)).to(index_dtype)
    expected, output = of_torch(ids), ours(ids)
    assert torch.equal(output, expected)
    assert torch.equal(ours.weight, of_torch.weight)  # max_norm rescales in place
    expected.square().sum().backward()
    output.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, of_torch.weight.grad, rtol=0, atol=0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 6), max_size=5), max_norm=st.sampled_from([None, 0.5]))
def test_one_amax_per_row_by_default(ids: list[int], max_norm: float | None) -> None:
    of_torch, ours = twins(max_norm=max_norm, padding_idx=1, **F64)
    of_torch.weight.data *= torch.logspace(-3, 3, 7, **F64)[:, None]
    ours.load_state_dict(of_torch.state_dict())
    indices = torch.tensor(ids, dtype=torch.int64)
    output = ours(indices)
    of_torch(indices)
    expected = fake(of_torch.weight, per_row(of_torch.weight))[ids]
    np.testing.assert_allclose(output.detach().numpy(), expected.reshape(-1, 4), rtol=1e-12)


def test_one_amax_per_table_on_request() -> None:
    ours = QuantEmbedding(7, 4, **F64, quant_desc_weight=QUANT_DESC_8BIT_PER_TENSOR)
    expected = fake(ours.weight, np.array(float(ours.weight.detach().abs().max())))
    np.testing.assert_allclose(ours(IDS).detach().numpy(), expected[IDS.numpy()], rtol=1e-12)


def test_calibration_keeps_one_amax_per_row_in_the_state_dict() -> None:
    ours = QuantEmbedding(7, 4, padding_idx=0).eval()
    ours.weight_quantizer.disable_quant()
    ours.weight_quantizer.enable_calib()
    ours(IDS)
    ours.weight_quantizer.load_calib_amax()
    assert ours.weight_quantizer.amax is not None
    np.testing.assert_array_equal(ours.weight_quantizer.amax.numpy(), per_row(ours.weight))
    ours.weight_quantizer.disable_calib()
    ours.weight_quantizer.enable_quant()
    state = ours.state_dict()
    assert list(state) == ["weight", "_weight_quantizer._amax"]
    fresh = QuantEmbedding(7, 4, padding_idx=0)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(IDS), ours(IDS))
    assert torch.equal(fresh(torch.tensor(0)), torch.zeros(4))


def test_gradient_is_straight_through_and_stops_beyond_amax() -> None:
    ours = QuantEmbedding.from_pretrained(
        torch.tensor([[0.5, 2.0], [1.0, -3.0], [0.0, 0.0]], **F64),
        freeze=False,
        padding_idx=2,
        quant_desc_weight=QuantDescriptor(amax=1.0),
    )
    ours(torch.tensor([0, 0, 1, 2])).sum().backward()
    assert ours.weight.grad is not None
    assert ours.weight.grad.tolist() == [[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


def test_max_norm_and_several_calls_before_the_gradient() -> None:
    ours = QuantEmbedding(7, 4, max_norm=0.5, **F64)
    (ours(torch.tensor([0, 1])).sum() + ours(torch.tensor([1, 2])).sum()).backward()
    assert ours.weight.grad is not None
    assert ours.weight.grad.sum(1).tolist() == [4.0, 8.0, 4.0, 0.0, 0.0, 0.0, 0.0]


def test_sparse_gradients_are_refused_and_inference_works() -> None:
    of_torch, ours = twins(sparse=True)
    with pytest.raises(RuntimeError, match="sparse=True cannot be trained"):
        ours(IDS)
    with torch.no_grad():
        assert ours(IDS).shape == (2, 3, 4)
    ours.weight_quantizer.disable()
    of_torch(IDS).sum().backward()
    ours(IDS).sum().backward()
    assert ours.weight.grad is not None and of_torch.weight.grad is not None
    assert ours.weight.grad.is_sparse
    assert torch.equal(ours.weight.grad.to_dense(), of_torch.weight.grad.to_dense())


def test_from_pretrained_as_torch() -> None:
    table = torch.randn(7, 4, **F64)
    ours = QuantEmbedding.from_pretrained(table, True, 1, 2.0, 1.0, True, True)
    of_torch = nn.Embedding.from_pretrained(table, True, 1, 2.0, 1.0, True, True)
    assert type(ours) is QuantEmbedding
    assert ours.extra_repr() == of_torch.extra_repr()
    assert ours.weight.data_ptr() == table.data_ptr()
    assert not ours.weight.requires_grad
    assert ours.weight_quantizer.axis == 0
    assert QuantEmbedding.from_pretrained(table, quant_desc_weight=QuantDescriptor(4)).weight_quantizer.num_bits == 4


def test_an_existing_instance_is_converted() -> None:
    of_torch, _ = twins(padding_idx=1, **F64)
    of_torch.eval()
    weight, expected = of_torch.weight, fake(of_torch.weight, per_row(of_torch.weight))[IDS.numpy()]
    module: Any = of_torch
    module.__class__ = QuantEmbedding
    module.add_quantizers(QuantEmbedding.default_quant_desc_weight)
    assert module.weight is weight
    np.testing.assert_allclose(module(IDS).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    ours = QuantEmbedding(7, 4, dtype=dtype)
    output = ours(IDS)
    assert output.dtype == dtype
    expected = fake(ours.weight, per_row(ours.weight))[IDS.numpy()]
    np.testing.assert_allclose(output.detach().double().numpy(), expected, rtol=2 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(IDS).dtype == dtype


# PyTorch's own compiler instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_compiled_exported_copied_and_pickled(max_norm: float | None) -> None:
    ours = QuantEmbedding(7, 4, max_norm=max_norm).eval()
    expected = ours(IDS)
    assert torch.equal(torch.compile(ours, fullgraph=True, backend="eager")(IDS), expected)
    for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(module(IDS), expected)
    other = torch.full((7, 4), 0.25)
    assert torch.equal(torch.func.functional_call(ours, {"weight": other}, (IDS,)), torch.full((2, 3, 4), 0.25))
    if max_norm is None:
        assert torch.equal(torch.export.export(ours, (IDS,), strict=False).module()(IDS), expected)


def test_class_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantEmbedding, "default_quant_desc_weight", QuantEmbedding.default_quant_desc_weight)
    QuantEmbedding.set_default_quant_desc_weight(QuantDescriptor(6))
    assert QuantEmbedding(7, 4).weight_quantizer.num_bits == 6
    assert QuantEmbedding.from_pretrained(torch.ones(2, 2)).weight_quantizer.num_bits == 6
    with pytest.raises(ValueError, match="default weight descriptor of QuantEmbedding must be a QuantDescriptor"):
        QuantEmbedding.set_default_quant_desc_weight(8)  # type: ignore[arg-type]


def test_refused_arguments() -> None:
    with pytest.raises(TypeError, match="Unused keys: quant_desc_input .arguments of QuantEmbedding"):
        QuantEmbedding(7, 4, quant_desc_input=QuantDescriptor())
    with pytest.raises(TypeError, match="quant_desc_input"):
        QuantEmbedding.from_pretrained(torch.ones(2, 2), quant_desc_input=QuantDescriptor())
    for build in (lambda d: QuantEmbedding(7, 4, quant_desc_weight=d), twin_from_pretrained):
        with pytest.raises(ValueError, match="Only fake quantization is supported"):
            build(QuantDescriptor(fake_quant=False))
        with pytest.raises(ValueError, match="quant_desc_weight must be a QuantDescriptor, got NoneType"):
            build(None)
    with pytest.raises(RuntimeError, match="scalar types: Long, Int"):
        QuantEmbedding(7, 4)(torch.ones(2))
    with pytest.raises(IndexError):
        QuantEmbedding(7, 4)(torch.tensor([7]))


def twin_from_pretrained(descriptor: Any) -> QuantEmbedding:
    return QuantEmbedding.from_pretrained(torch.ones(2, 2), quant_desc_weight=descriptor)


def test_public_name() -> None:
    assert "QuantEmbedding" in qdq.nn.__all__
