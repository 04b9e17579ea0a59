"""QuantMultiheadAttention in models: PyTorch's fused path, conversion of instances, state, dtypes, tracing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nn.attention_cases import (
    NAMES,
    E,
    H,
    L,
    N,
    S,
    calibrate,
    collect,
    convert,
    disabled,
    masks,
    quantizers,
    tensors,
    twins,
)
from qdq.nn import QuantLinear, QuantMultiheadAttention


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


FUSED = {"_native_multi_head_attention", "_transformer_encoder_layer_fwd"}


def operations(module: nn.Module, *args: Any, **kwargs: Any) -> set[str]:
    with torch.no_grad(), Operations() as seen:
        module(*args, **kwargs)
    return seen.names


def encoder_layer(**arguments: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(E, H, 16, batch_first=True, **arguments).eval()


def test_the_attention_never_runs_fused() -> None:
    (x,) = tensors((N, L, E), dtype=torch.float32)
    of_torch, ours = twins(batch_first=True)
    assert operations(of_torch.eval(), x, x, x) & FUSED
    for module in (ours.eval(), convert(copy.deepcopy(of_torch))):
        assert not operations(module, x, x, x, need_weights=False) & FUSED


def test_an_encoder_layer_does_not_walk_around_the_attention() -> None:
    (x,) = tensors((N, L, E), dtype=torch.float32)
    layer = encoder_layer()
    assert operations(layer, x) & FUSED
    plain = layer(x)
    convert(layer.self_attn)
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not operations(module, x) & FUSED
        collect(module, x)
        assert all(q._calibrator and q._calibrator.compute_amax() is not None for q in quantizers(module).values())
    torch.testing.assert_close(disabled(layer)(x), plain)


def test_should_pytorch_still_take_the_fused_path_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    (x,) = tensors((N, L, E), dtype=torch.float32)
    layer = encoder_layer()
    convert(layer.self_attn)
    monkeypatch.setattr(QuantMultiheadAttention, "_qkv_same_embed_dim", True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="walk around the quantizers"):
        layer(x)


@pytest.mark.parametrize("how", ["converted", "constructed"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_calibration_reaches_every_quantizer_of_an_encoder_in_eval_mode(how: str, norm_first: bool) -> None:
    (x,) = tensors((N, L, E), dtype=torch.float32)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0, 2:] = True
    layer = encoder_layer(norm_first=norm_first)

    def quantized(layer: Any) -> None:
        convert(layer.self_attn)
        for linear in (layer.linear1, layer.linear2):
            linear.__class__ = QuantLinear
            linear.add_quantizers(QuantLinear.default_quant_desc_input, QuantLinear.default_quant_desc_weight)

    if how == "constructed":
        quantized(layer)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    else:
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        each: Any
        for each in encoder.layers:
            quantized(each)
            each.activation_relu_or_gelu = 0
        encoder.use_nested_tensor = False
    collect(encoder.eval(), x, src_key_padding_mask=padding)
    seen = {n for n, q in quantizers(encoder).items() if q._calibrator and q._calibrator.compute_amax() is not None}
    assert seen == set(quantizers(encoder))
    assert len(seen) == 2 * (12 + 4)


def test_an_encoder_built_around_it_makes_no_nested_tensors() -> None:
    layer = encoder_layer()
    convert(layer.self_attn)
    with pytest.warns(UserWarning, match="use_nested_tensor is False because"):
        encoder = nn.TransformerEncoder(layer, 2)
    assert not encoder.use_nested_tensor


def test_a_decoder_layer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, H, 16, dropout=0.0, dtype=torch.float64)
    target, memory = tensors((L, N, E), (S, N, E))
    expected = layer(target, memory, tgt_mask=masks("bool", (L, L), True), tgt_is_causal=True)
    convert(layer.self_attn)
    convert(layer.multihead_attn)
    calibrate(layer, target, memory)
    output = disabled(layer)(target, memory, tgt_mask=masks("bool", (L, L), True), tgt_is_causal=True)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("arguments", [{}, {"kdim": 5, "vdim": 6, "add_bias_kv": True}])
def test_an_existing_instance_is_converted_and_taken_back(arguments: Any) -> None:
    of_torch, ours = twins(**arguments, dtype=torch.float64)
    query, key, value = tensors((L, N, E), (S, N, of_torch.kdim), (S, N, of_torch.vdim))
    parameters, attributes = dict(of_torch.named_parameters()), dict(vars(of_torch))
    plain = of_torch(query, key, value)[0]
    module = convert(of_torch)
    assert all(module.get_parameter(name) is p for name, p in parameters.items())
    torch.testing.assert_close(module(query, key, value)[0], ours(query, key, value)[0], rtol=0, atol=0)
    for name in quantizers(module):
        delattr(module, name)
    module.__class__ = nn.MultiheadAttention
    assert vars(module).keys() == attributes.keys()
    assert module._qkv_same_embed_dim is (not arguments)
    assert torch.equal(module(query, key, value)[0], plain)


def test_state_dicts_pass_both_ways() -> None:
    of_torch, ours = twins(batch_first=True)
    (x,) = tensors((N, L, E), dtype=torch.float32)
    ours.load_state_dict(of_torch.state_dict())
    calibrate(ours.eval(), x, x, x)
    state = ours.state_dict()
    assert set(state) - set(of_torch.state_dict()) == {f"{name}._amax" for name in NAMES}
    assert state["_k_proj_weight_quantizer._amax"].shape == (E, 1)
    fresh = QuantMultiheadAttention(E, H, batch_first=True).eval()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x, x, x)[0], ours(x, x, x)[0])
    assert not of_torch.load_state_dict(state, strict=False).missing_keys


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("arguments", [{}, {"kdim": 5, "vdim": 5}])
def test_copied_and_pickled(make: Any, arguments: Any) -> None:
    _, ours = twins(**arguments)
    query, key = tensors((L, N, E), (S, N, ours.kdim), dtype=torch.float32)
    calibrate(ours.eval(), query, key, key)
    assert torch.equal(make(ours)(query, key, key)[0], ours(query, key, key)[0])


def test_functional_call() -> None:
    _, ours = twins()
    (x,) = tensors((L, N, E), dtype=torch.float32)
    zeros = {name: torch.zeros_like(p) for name, p in ours.named_parameters()}
    assert torch.func.functional_call(ours, zeros, (x, x, x))[0].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    of_torch, ours = twins(batch_first=True, dtype=dtype)
    (x,) = tensors((N, L, E), dtype=dtype)
    mask = masks("bool", (L, L), causal=True)
    output, weights = ours(x, x, x, attn_mask=mask)
    assert weights is not None
    assert output.dtype == weights.dtype == dtype
    torch.testing.assert_close(output, of_torch(x, x, x, attn_mask=mask)[0], rtol=0.1, atol=0.1)
    output.sum().backward()
    assert ours.in_proj_weight.grad is not None and ours.in_proj_weight.grad.dtype == dtype


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_autocast(kind: str) -> None:
    of_torch, ours = twins(batch_first=True, add_bias_kv=True, add_zero_attn=True)
    (x,) = tensors((N, L, E), dtype=torch.float32)
    mask = masks(kind, (L, L))
    mask = mask.float() if mask is not None and kind == "float" else mask
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = ours(x, x, x, attn_mask=mask)
        expected, _ = of_torch(x, x, x, attn_mask=mask)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0.1, atol=0.1)
    output.float().sum().backward()
    assert ours.bias_k is not None and ours.bias_k.grad is not None


# PyTorch's own compiler instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break_in_training() -> None:
    torch.compiler.reset()
    _, ours = twins(batch_first=True)
    (x,) = tensors((N, L, E), dtype=torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    mask = masks("bool", (L, L), causal=True)
    output = compiled(x, x, x, attn_mask=mask)[0]
    torch.testing.assert_close(output, ours(x, x, x, attn_mask=mask)[0])
    output.sum().backward()
    assert ours.in_proj_weight.grad is not None


def test_an_encoder_layer_compiles_without_a_graph_break() -> None:
    torch.compiler.reset()
    layer = encoder_layer()
    convert(layer.self_attn)
    (x,) = tensors((N, L, E), dtype=torch.float32)
    calibrate(layer, x)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def test_exports_with_dynamic_lengths() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = QuantMultiheadAttention(E, H, batch_first=True)

        def forward(self, query: Tensor, key: Tensor, mask: Tensor, padding: Tensor) -> Any:
            return self.attention(query, key, key, attn_mask=mask, key_padding_mask=padding)

    def inputs(n: int, length: int, source: int) -> Any:
        query, key = tensors((n, length, E), (n, source, E), dtype=torch.float32)
        return query, key, masks("bool", (length, source)), masks("bool", (n, source))

    model = Model().eval()
    calibrate(model, *inputs(N, L, S))
    n, length, source = (torch.export.Dim(name, min=2) for name in ("n", "length", "source"))
    shapes = ({0: n, 1: length}, {0: n, 1: source}, {0: length, 1: source}, {0: n, 1: source})
    with torch.no_grad():
        program = torch.export.export(model, inputs(N, L, S), strict=False, dynamic_shapes=shapes)
        for sizes in ((N, L, S), (2, 7, 3)):
            torch.testing.assert_close(program.module()(*inputs(*sizes)), model(*inputs(*sizes)))
