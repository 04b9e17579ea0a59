"""QuantMultiheadAttention: its numbers against torch's own and against numpy in float64, its descriptors and errors."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qdq
from nn.attention_cases import NAMES, E, H, L, N, S, calibrate, disabled, masks, quantizers, tensors, twins
from qdq import QuantDescriptor
from qdq.nn import QuantLinear, QuantMultiheadAttention, TensorQuantizer

ARGUMENTS = st.fixed_dictionaries(
    {
        "bias": st.booleans(),
        "add_bias_kv": st.booleans(),
        "add_zero_attn": st.booleans(),
        "batch_first": st.booleans(),
        "kdim": st.sampled_from([None, 5]),
        "vdim": st.sampled_from([None, 6]),
    }
)


@pytest.mark.parametrize("arguments", [{}, {"kdim": 5}, {"bias": False, "add_bias_kv": True, "batch_first": True}])
def test_constructed_as_torch(arguments: Any) -> None:
    of_torch, ours = twins(**arguments)
    assert list(ours.state_dict()) == list(of_torch.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), of_torch.parameters(), strict=True))
    assert set(quantizers(ours)) == NAMES
    assert ours._q_proj_weight_quantizer.axis == ours._out_proj_weight_quantizer.axis == 0
    assert [name for name, q in quantizers(ours).items() if q.unsigned] == ["_probs_quantizer"]
    assert type(ours.out_proj) is type(of_torch.out_proj)


@pytest.mark.parametrize("arguments", [{}, {"kdim": 5, "add_bias_kv": True}, {"bias": False}])
def test_parameters_are_drawn_again_as_torch_does(arguments: Any) -> None:
    of_torch, ours = twins(**arguments)
    for module in (of_torch, ours):
        torch.manual_seed(8)
        module._reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), of_torch.parameters(), strict=True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    arguments=ARGUMENTS,
    batched=st.booleans(),
    kinds=st.sampled_from([(a, p) for a in (None, "bool", "float") for p in (None, "bool", "float")]),
    attn_rank=st.sampled_from([2, 3]),
    need_weights=st.booleans(),
    average=st.booleans(),
    causal=st.booleans(),
)
def test_disabled_equals_torch(
    arguments: Any, batched: bool, kinds: Any, attn_rank: int, need_weights: bool, average: bool, causal: bool
) -> None:
    of_torch, ours = twins(**arguments, dtype=torch.float64)
    disabled(ours)
    shapes = [(L, E), (S, of_torch.kdim), (S, of_torch.vdim)]
    if batched:
        shapes = [(N, *s) if of_torch.batch_first else (s[0], N, s[1]) for s in shapes]
    query, key, value = tensors(*shapes)
    attn_kind, padding_kind = kinds
    if None not in kinds:
        padding_kind = attn_kind  # torch warns where the kinds differ
    heads = N * H if batched else H
    keywords: Any = {
        "attn_mask": masks(attn_kind, (L, S) if attn_rank == 2 else (heads, L, S), causal),
        "key_padding_mask": masks(padding_kind, (N, S) if batched else (S,)),
        "need_weights": need_weights,
        "average_attn_weights": average,
        "is_causal": causal and attn_kind is not None,
    }
    expected, weights = of_torch(query, key, value, **keywords)
    output, our_weights = ours(query, key, value, **keywords)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)
    if need_weights:
        torch.testing.assert_close(our_weights, weights, rtol=1e-12, atol=1e-14)
    else:
        assert weights is our_weights is None
    if not of_torch.batch_first:
        assert output.is_contiguous()  # people call view on it


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_and_gradients_in_training_as_torch(need_weights: bool) -> None:
    of_torch, ours = twins(dropout=0.4, add_bias_kv=True, dtype=torch.float64)
    disabled(ours)
    results = []
    for module in (of_torch, ours):
        (x,) = tensors((L, N, E))
        x.requires_grad_()
        torch.manual_seed(4)
        output, weights = module(x, x, x, need_weights=need_weights, attn_mask=masks("bool", (L, L)))
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for p in module.parameters())] + ([weights] if need_weights else []))
    for expected, ours_ in zip(*results, strict=True):
        torch.testing.assert_close(ours_, expected, rtol=1e-10, atol=1e-12)


def test_no_dropout_in_eval_mode() -> None:
    of_torch, ours = twins(dropout=0.4, dtype=torch.float64)
    (x,) = tensors((L, N, E))
    output, weights = disabled(ours.eval())(x, x, x)
    torch.testing.assert_close((output, weights), of_torch.eval()(x, x, x), rtol=1e-12, atol=1e-13)


def test_masks_of_different_kinds() -> None:
    ours = disabled(QuantMultiheadAttention(E, H, batch_first=True, dtype=torch.float64))
    query, key = tensors((N, L, E), (N, S, E))
    as_bool, as_float = masks("bool", (N, S)), torch.zeros(N, S, dtype=torch.float64)
    assert as_bool is not None
    as_float = as_float.masked_fill(as_bool, -torch.inf)
    attn_mask = masks("float", (L, S))
    first = ours(query, key, key, attn_mask=attn_mask, key_padding_mask=as_bool)[0]
    assert torch.equal(first, ours(query, key, key, attn_mask=attn_mask, key_padding_mask=as_float)[0])


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_without_keys_gets_zeros(need_weights: bool) -> None:
    of_torch, ours = twins(batch_first=True, dtype=torch.float64)
    (x,) = tensors((N, L, E))
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1] = True
    output, weights = disabled(ours)(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    output.sum().backward()
    assert ours.in_proj_weight.grad is not None
    assert bool(torch.isfinite(ours.in_proj_weight.grad).all())
    expected, _ = of_torch(x, x, x, key_padding_mask=padding, need_weights=False)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(output[1], ours.out_proj.bias.expand(L, E))
    if need_weights:
        assert weights[1].abs().max() == 0
        torch.testing.assert_close(weights[0].sum(-1), torch.ones(L, dtype=torch.float64))


def fake(x: np.ndarray, quantizer: TensorQuantizer) -> np.ndarray:
    assert quantizer.amax is not None
    bound, low = (255, 0) if quantizer.unsigned else (127, -128)
    scale = bound / quantizer.amax.double().numpy()
    return np.clip(np.rint(x * scale), low, bound) / scale


def reference(module: Any, query: Tensor, key: Tensor, value: Tensor, closed: np.ndarray) -> Any:
    """Batch-first, one sequence and one head after the other; `closed` is (batch, query, key)."""
    values = {name: p.detach().numpy() for name, p in module.named_parameters()}
    if "in_proj_weight" in values:
        weights = dict(zip("qkv", np.split(values["in_proj_weight"], 3), strict=True))
    else:
        weights = {part: values[f"{part}_proj_weight"] for part in "qkv"}
    biases = dict(zip("qkv", np.split(values["in_proj_bias"], 3), strict=True))

    def projected(part: str, x: np.ndarray) -> np.ndarray:
        weight = fake(weights[part], getattr(module, f"_{part}_proj_weight_quantizer"))
        return fake(x, getattr(module, f"_{part}_proj_input_quantizer")) @ weight.T + biases[part]

    outputs, probabilities = [], []
    out_weight = fake(values["out_proj.weight"], module._out_proj_weight_quantizer)
    for n in range(len(query)):
        q, k, v = (projected(part, x[n].numpy()) for part, x in zip("qkv", (query, key, value), strict=True))
        heads, context = [], []
        for h in range(H):
            own = slice(h * E // H, (h + 1) * E // H)
            left = fake(q[:, own] / np.sqrt(E // H), module._q_quantizer)
            scores = left @ fake(k[:, own], module._k_quantizer).T
            scores = np.where(closed[n], -np.inf, scores)
            exponentials = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(fake(exponentials / exponentials.sum(-1, keepdims=True), module._probs_quantizer))
            context.append(heads[-1] @ fake(v[:, own], module._v_quantizer))
        joined = fake(np.concatenate(context, -1), module._out_proj_input_quantizer)
        outputs.append(joined @ out_weight.T + values["out_proj.bias"])
        probabilities.append(np.stack(heads))
    return np.stack(outputs), np.stack(probabilities)


@pytest.mark.parametrize("arguments", [{}, {"kdim": 5, "vdim": 6}])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quantized_result(arguments: Any, seed: int) -> None:
    _, ours = twins(**arguments, batch_first=True, dtype=torch.float64)
    query, key, value = tensors((N, L, E), (N, S, ours.kdim), (N, S, ours.vdim), seed=seed)
    key = key * 3
    padding = masks("bool", (N, S))
    assert padding is not None
    ours.eval()
    calibrate(ours, query, key, value, key_padding_mask=padding)
    with torch.no_grad():
        output, weights = ours(query, key, value, key_padding_mask=padding, average_attn_weights=False)
        plain, _ = disabled(copy.deepcopy(ours))(query, key, value, key_padding_mask=padding)
    closed = np.broadcast_to(padding.numpy()[:, None, :], (N, L, S))
    expected, probabilities = reference(ours, query, key, value, closed)
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-9, atol=1e-11)
    assert weights is not None
    np.testing.assert_allclose(weights.numpy(), probabilities, rtol=1e-9, atol=1e-11)
    assert 1e-4 < float((output - plain).abs().max()) < 0.5


def test_each_of_twelve_quantizers_matters() -> None:
    _, ours = twins(batch_first=True, dtype=torch.float64)
    query, key, value = tensors((N, L, E), (N, S, E), (N, S, E))
    disabled(ours.eval())
    plain = ours(query, key, value)[0]
    for quantizer in quantizers(ours).values():
        quantizer.enable()
        assert not torch.allclose(ours(query, key, value)[0], plain, rtol=0, atol=1e-7)
        quantizer.disable()


def test_self_attention_gives_three_input_quantizers_one_amax() -> None:
    _, ours = twins()
    (x,) = tensors((L, N, E), dtype=torch.float32)
    calibrate(ours, x, x, x)
    amax = {float(getattr(ours, f"_{part}_proj_input_quantizer")._amax) for part in "qkv"}
    assert amax == {float(x.abs().max())}


def test_gradients_pass_straight_through() -> None:
    descriptor = QuantDescriptor(16, narrow_range=True)
    of_torch = nn.MultiheadAttention(E, H, dtype=torch.float64)
    ours = QuantMultiheadAttention(
        E, H, dtype=torch.float64, quant_desc_input=descriptor, quant_desc_weight=QuantDescriptor(16, axis=0)
    )
    ours.load_state_dict(of_torch.state_dict())
    (x,) = tensors((L, N, E))
    for module in (of_torch, ours):
        module(x, x, x)[0].square().sum().backward()
    for name, parameter in of_torch.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=5e-3, atol=1e-3)
    for quantizer in quantizers(ours).values():
        quantizer.amax = 1e-3  # nothing but biases lies inside
    ours.zero_grad()
    ours(x * 100, x * 100, x * 100)[0].sum().backward()
    assert ours.in_proj_weight.grad is not None and ours.out_proj.bias.grad is not None
    assert ours.in_proj_weight.grad.abs().max() == 0
    assert ours.out_proj.bias.grad.min() == L * N


def test_descriptors() -> None:
    ours = QuantMultiheadAttention(
        E, H, quant_desc_input=QuantDescriptor(6, calib_method="histogram"), quant_desc_weight=QuantDescriptor(4)
    )
    for name, quantizer in quantizers(ours).items():
        assert quantizer.num_bits == (4 if "weight" in name else 6)
    assert ours._probs_quantizer.unsigned
    assert type(ours._probs_quantizer._calibrator) is type(ours._q_quantizer._calibrator)
    ours = QuantMultiheadAttention(E, H, quant_desc_probs=QuantDescriptor(9))
    assert (ours._probs_quantizer.num_bits, ours._probs_quantizer.unsigned) == (9, False)
    e4m3 = QuantMultiheadAttention(E, H, quant_desc_input=QuantDescriptor((4, 3)))
    assert (e4m3._probs_quantizer.num_bits, e4m3._probs_quantizer.unsigned) == ((4, 3), False)
    (x,) = tensors((L, N, E), dtype=torch.float32)
    assert bool(torch.isfinite(e4m3(x, x, x)[0]).all())


def test_class_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("default_quant_desc_input", "default_quant_desc_weight"):
        monkeypatch.setattr(QuantMultiheadAttention, name, getattr(QuantMultiheadAttention, name))
    QuantMultiheadAttention.set_default_quant_desc_input(QuantDescriptor(5))
    QuantMultiheadAttention.set_default_quant_desc_weight(QuantDescriptor(3))
    bits = {name: quantizer.num_bits for name, quantizer in quantizers(QuantMultiheadAttention(E, H)).items()}
    assert bits == {name: 3 if "weight" in name else 5 for name in NAMES}
    assert QuantLinear(2, 2).input_quantizer.num_bits == QuantLinear(2, 2).weight_quantizer.num_bits == 8


@pytest.mark.parametrize("which", ["quant_desc_input", "quant_desc_weight", "quant_desc_probs"])
def test_refused_descriptors(which: str) -> None:
    build: Any = QuantMultiheadAttention
    with pytest.raises(ValueError, match=f"Only fake quantization is supported in a layer: {which}"):
        build(E, H, **{which: QuantDescriptor(fake_quant=False)})
    with pytest.raises(ValueError, match=f"{which} must be a QuantDescriptor, got int"):
        build(E, H, **{which: 8})
    if which != "quant_desc_weight":
        with pytest.raises(ValueError, match=f"{which} of QuantMultiheadAttention must be per tensor, got axis=1"):
            build(E, H, **{which: QuantDescriptor(axis=1)})


def test_refused_keyword() -> None:
    with pytest.raises(TypeError, match="Unused keys: heads"):
        QuantMultiheadAttention(E, H, heads=2)


@pytest.mark.parametrize(
    ("shapes", "keywords", "error", "message"),
    [
        ([(L, N, E, 1)] * 3, {}, ValueError, "all be 3-d .batched. or all 2-d, got query with 4 dimensions"),
        ([(L, N, E), (L, E), (L, E)], {}, ValueError, "got key with 2 dimensions"),
        ([(L, N, E), (L, N, E), (L, N, E + 1)], {}, ValueError, "value must have 8 features"),
        ([(L, N, E), (S, N, E), (L, N, E)], {}, ValueError, "key and value must agree in batch and sequence"),
        ([(L, N, E), (L, 1, E), (L, 1, E)], {}, ValueError, "query and key must agree in batch.*batch_first=False"),
        ([(L, N, E)] * 3, {"attn_mask": (L, S)}, ValueError, r"attn_mask must have the shape \(4, 4\) or \(6, 4, 4\)"),
        ([(L, N, E)] * 3, {"key_padding_mask": (L, N)}, ValueError, r"key_padding_mask must have the shape \(3, 4\)"),
        ([(L, E)] * 3, {"attn_mask": (1, L, L)}, ValueError, r"\(4, 4\) or \(2, 4, 4\), got \(1, 4, 4\)"),
        ([(L, E)] * 3, {"key_padding_mask": (1, L)}, ValueError, r"must have the shape \(4,\), got \(1, 4\)"),
        ([(L, N, E)] * 3, {"is_causal": True}, RuntimeError, "is_causal only says that attn_mask is causal"),
    ],
)
def test_refused_inputs(shapes: Any, keywords: Any, error: Any, message: str) -> None:
    keywords = {k: torch.zeros(v, dtype=torch.bool) if isinstance(v, tuple) else v for k, v in keywords.items()}
    with pytest.raises(error, match=message):
        QuantMultiheadAttention(E, H)(*tensors(*shapes, dtype=torch.float32), **keywords)


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_refused_mask_of_integers(name: str) -> None:
    (x,) = tensors((L, E), dtype=torch.float32)
    mask = torch.zeros((L, L) if name == "attn_mask" else (L,), dtype=torch.int64)
    with pytest.raises(TypeError, match=f"{name} must be bool or floating point, got torch.int64"):
        QuantMultiheadAttention(E, H)(x, x, x, **{name: mask})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_refused_nested_tensor() -> None:
    x = torch.nested.nested_tensor([torch.zeros(2, E), torch.zeros(3, E)])
    with pytest.raises(ValueError, match=r"query is a nested tensor.*use_nested_tensor = False"):
        QuantMultiheadAttention(E, H, batch_first=True)(x, x, x)


def test_public_name() -> None:
    assert "QuantMultiheadAttention" in qdq.nn.__all__
