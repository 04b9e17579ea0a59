"""What QuantLSTM and QuantGRU share: equal to torch's layers without quantizers, and the quantizers' places."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from qdq.descriptor import QuantDescriptor
from qdq.nn import QuantGRU, QuantLSTM, TensorQuantizer

Layer = QuantLSTM | QuantGRU
KINDS = [pytest.param(QuantLSTM, nn.LSTM, id="lstm"), pytest.param(QuantGRU, nn.GRU, id="gru")]
DOUBLE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}

pytestmark = pytest.mark.parametrize(("quant", "plain"), KINDS)


def quantizers(module: nn.Module) -> Iterator[TensorQuantizer]:
    return (m for m in module.modules() if isinstance(m, TensorQuantizer))


def disable(module: Any) -> Any:
    for quantizer in quantizers(module):
        quantizer.disable()
    return module


def twins(quant: Any, plain: Any, *args: Any, seed: int = 0, **kwargs: Any) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    expected = plain(*args, **kwargs)
    torch.manual_seed(seed)
    return quant(*args, **kwargs), expected


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def states(quant: Any, *shape: int, **kwargs: Any) -> Any:
    h = random(*shape, seed=2, **kwargs)
    return (h, random(*shape, seed=3, **kwargs)) if quant is QuantLSTM else h


def flat(result: Any) -> list[Tensor]:
    """The tensors of (output, h) or (output, (h, c)); of a packed output its data."""
    output, final = result
    return [
        output.data if isinstance(output, PackedSequence) else output,
        *(final if type(final) is tuple else [final]),
    ]


def assert_equal_results(actual: Any, expected: Any, **tolerance: Any) -> None:
    for a, b in zip(flat(actual), flat(expected), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or DOUBLE))


# -- the same module as torch's -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "num_layers": 3}])
def test_seeded_twins_and_state_dicts(quant: Any, plain: Any, options: dict[str, Any]) -> None:
    ours, theirs = twins(quant, plain, 4, 5, **options)
    after = torch.rand(1)
    torch.manual_seed(0)
    plain(4, 5, **options)
    assert torch.equal(after, torch.rand(1))
    assert isinstance(ours, nn.RNNBase)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(ours.state_dict()[key], state[key]) for key in state)
    plain(4, 5, **options).load_state_dict(ours.state_dict())
    quant(4, 5, **options).load_state_dict(state)


def test_positional_arguments_are_torchs(quant: Any, plain: Any) -> None:
    arguments = (4, 5, 2, False, True, 0.25, True)
    ours, theirs = twins(quant, plain, *arguments)
    assert ours.extra_repr() == theirs.extra_repr()
    assert quant(4, 5, device="meta", dtype=torch.float16).weight_ih_l0.dtype == torch.float16


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_states", [False, True])
def test_disabled_equals_torch_with_gradients(
    quant: Any, plain: Any, num_layers: int, bidirectional: bool, batch_first: bool, with_states: bool
) -> None:
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first}
    ours, theirs = twins(quant, plain, 4, 6, bias=with_states, dtype=torch.float64, **options)
    disable(ours)
    results, gradients = [], []
    for module in (ours, theirs):
        x = random(3, 5, 4).requires_grad_()
        batch = 3 if batch_first else 5
        hx = states(quant, num_layers * (1 + bidirectional), batch, 6) if with_states else None
        leaves = [] if hx is None else [state.requires_grad_() for state in (hx if isinstance(hx, tuple) else (hx,))]
        result = module(x, hx)
        loss = torch.stack([(tensor * random(*tensor.shape, seed=9)).sum() for tensor in flat(result)]).sum()
        gradients.append(torch.autograd.grad(loss, [x, *leaves, *module.parameters()]))
        results.append(result)
    assert_equal_results(*results)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **DOUBLE)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_equals_torch_with_the_same_seed(quant: Any, plain: Any, training: bool) -> None:
    ours, theirs = twins(quant, plain, 4, 6, 3, dropout=0.5, bidirectional=True, dtype=torch.float64)
    x = random(5, 2, 4)
    results = []
    for module in (disable(ours).train(training), theirs.train(training)):
        torch.manual_seed(4)
        results.append(module(x))
    assert_equal_results(*results)
    assert torch.equal(ours(x)[0], ours(x)[0]) != training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(quant: Any, plain: Any, dtype: torch.dtype) -> None:
    ours, theirs = twins(quant, plain, 4, 6, dtype=dtype)
    x = random(3, 2, 4, dtype=torch.float32).to(dtype)
    tolerance = {"rtol": 0.0, "atol": 4 * torch.finfo(dtype).eps}
    assert_equal_results(disable(copy.deepcopy(ours))(x), theirs(x), **tolerance)
    for tensor in flat(ours(x)):
        assert tensor.dtype == dtype and bool(torch.isfinite(tensor).all())


# -- packed sequences -----------------------------------------------------------------------------------

LENGTHS = [2, 5, 1, 5, 3]


@pytest.mark.parametrize("order", ["sorted", "unsorted"])
@pytest.mark.parametrize("with_states", [False, True])
def test_packed_sequence_equals_torch(quant: Any, plain: Any, order: str, with_states: bool) -> None:
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    ours, theirs = twins(quant, plain, 4, 6, **options)
    disable(ours)
    lengths = sorted(LENGTHS, reverse=True) if order == "sorted" else LENGTHS
    hx = states(quant, 4, 5, 6) if with_states else None
    results, gradients = [], []
    for module in (ours, theirs):
        x = random(5, 5, 4).requires_grad_()
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=order == "sorted")
        result = module(packed, hx)
        assert isinstance(result[0], PackedSequence)
        loss = torch.stack([(tensor * random(*tensor.shape, seed=9)).sum() for tensor in flat(result)]).sum()
        gradients.append(torch.autograd.grad(loss, [x, *module.parameters()]))
        results.append(result)
    assert_equal_results(*results)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **DOUBLE)
    for a, b in zip(pad_packed_sequence(results[0][0]), pad_packed_sequence(results[1][0]), strict=True):
        torch.testing.assert_close(a, b, **DOUBLE)


def test_defect_unsorted_packed_sequence_keeps_its_order(quant: Any, plain: Any) -> None:
    """Each sequence of an unsorted batch gives what it gives alone, in its own place, quantizers on."""
    module = quant(4, 6, 2, bidirectional=True, dtype=torch.float64)
    for quantizer in quantizers(module):
        quantizer.amax = 1.5  # static, so that a sequence does not see the rest of its batch
    x, hx = random(5, 5, 4), states(quant, 4, 5, 6)
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
    output, final = module(packed, hx)
    padded, lengths = pad_packed_sequence(output)
    assert lengths.tolist() == LENGTHS
    for i, length in enumerate(LENGTHS):
        own = tuple(state[:, i : i + 1] for state in hx) if isinstance(hx, tuple) else hx[:, i : i + 1]
        alone = flat(module(x[:length, i : i + 1], own))
        together = [padded[:length, i : i + 1], *(state[:, i : i + 1] for state in flat((output, final))[1:])]
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a, b, **DOUBLE)


# -- the quantizers' places -----------------------------------------------------------------------------


def seen_by(quantizers: Any) -> list[list[Tensor]]:
    seen: list[list[Tensor]] = [[] for _ in quantizers]
    for quantizer, calls in zip(quantizers, seen, strict=True):
        quantizer.register_forward_hook(lambda _, inputs, __, calls=calls: calls.append(inputs[0].detach()))
    return seen


@pytest.mark.parametrize("bidirectional", [False, True])
def test_quantizers_see_inputs_per_step_and_weights_once(quant: Any, plain: Any, bidirectional: bool) -> None:
    directions = 1 + bidirectional
    module = quant(4, 6, 2, bidirectional=bidirectional)
    assert type(module._input_quantizers) is type(module._weight_quantizers) is nn.ModuleList
    assert len(module._input_quantizers) == len(module._weight_quantizers) == 2 * directions
    inputs, weights = seen_by(module._input_quantizers), seen_by(module._weight_quantizers)
    x = random(3, 5, 4, dtype=torch.float32)
    module(x)
    for layer in range(2):
        features = 4 if layer == 0 else 6 * directions
        for direction, suffix in enumerate(["", "_reverse"][:directions]):
            index = layer * directions + direction
            parts = [getattr(module, f"weight_{kind}_l{layer}{suffix}") for kind in ("ih", "hh")]
            (weight,) = weights[index]
            assert torch.equal(weight, torch.cat(parts, 1))
            assert [tuple(step.shape) for step in inputs[index]] == [(5, features + 6)] * 3
            assert not inputs[index][0][:, features:].any() and inputs[index][1][:, features:].any()
            if layer == 0:
                in_time = inputs[index] if direction == 0 else inputs[index][::-1]
                assert torch.equal(torch.stack(in_time)[..., :4], x)


def test_quantizers_see_no_padding(quant: Any, plain: Any) -> None:
    module = quant(4, 6, bidirectional=True)
    inputs = seen_by(module._input_quantizers)
    x = random(5, 5, 4, dtype=torch.float32)
    module(pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False))
    rows = [[len(step) for step in steps] for steps in inputs]
    assert rows == [[5, 4, 3, 2, 2], [2, 2, 3, 4, 5]]


def test_defect_input_quantizer_property_raises_no_more(quant: Any, plain: Any) -> None:
    module = quant(4, 6, 2)
    assert module.input_quantizer is module._input_quantizers
    assert module.weight_quantizer is module._weight_quantizers


def test_bias_is_not_quantized(quant: Any, plain: Any) -> None:
    ours, theirs = twins(quant, plain, 4, 6, 2, dtype=torch.float64)
    for quantizer in ours._weight_quantizers:
        quantizer.amax = 0.0  # every weight becomes 0
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.startswith("weight"):
                parameter.zero_()
    x = random(3, 2, 4)
    assert_equal_results(ours(x), theirs(x))


def test_default_descriptors_and_keywords(quant: Any, plain: Any) -> None:
    module = quant(4, 6, 2)
    assert [q.axis for q in module._input_quantizers] == [None, None]
    assert [q.axis for q in module._weight_quantizers] == [0, 0]
    module = quant(4, 6, quant_desc_input=QuantDescriptor(num_bits=4), quant_desc_weight=QuantDescriptor(num_bits=6))
    assert module._input_quantizers[0].num_bits == 4 and module._weight_quantizers[0].num_bits == 6
    with pytest.raises(TypeError, match=f"Unused keys: descriptor .*{quant.__name__}"):
        quant(4, 6, descriptor=None)
    with pytest.raises(ValueError, match="Only fake quantization is supported"):
        quant(4, 6, quant_desc_weight=QuantDescriptor(fake_quant=False))


def test_class_defaults_are_per_class(quant: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = QuantGRU if quant is QuantLSTM else QuantLSTM
    monkeypatch.setattr(quant, "default_quant_desc_input", quant.default_quant_desc_input, raising=False)
    monkeypatch.setattr(quant, "default_quant_desc_weight", quant.default_quant_desc_weight, raising=False)
    wrong: Any = "8 bits"
    quant.set_default_quant_desc_input(QuantDescriptor(num_bits=5))
    quant.set_default_quant_desc_weight(QuantDescriptor(num_bits=3))
    assert quant(4, 6)._input_quantizers[0].num_bits == 5 and quant(4, 6)._weight_quantizers[0].num_bits == 3
    assert other(4, 6)._input_quantizers[0].num_bits == 8 and other(4, 6)._weight_quantizers[0].num_bits == 8
    with pytest.raises(ValueError, match=quant.__name__):
        quant.set_default_quant_desc_weight(wrong)


@pytest.mark.parametrize("method", ["max", "histogram"])
def test_calibration_loop(quant: Any, plain: Any, method: str) -> None:
    descriptor = QuantDescriptor(num_bits=8, calib_method=method)
    model = nn.ModuleDict({"encoder": quant(4, 6, 2, bidirectional=True, quant_desc_input=descriptor)})
    x = random(3, 5, 4, dtype=torch.float32)
    for _, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            module.disable_quant()
            module.enable_calib()
    seen = seen_by(model["encoder"]._input_quantizers)
    model["encoder"](x)
    for _, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            keywords = {} if module.axis == 0 or method == "max" else {"method": "percentile", "percentile": 100.0}
            module.load_calib_amax(**keywords)
            module.enable_quant()
            module.disable_calib()
    keys = set(model.state_dict())
    encoder: Any = model["encoder"]
    for index, steps in enumerate(seen):
        layer, direction = divmod(index, 2)
        suffix = f"l{layer}" + "_reverse" * direction
        weight = torch.cat([getattr(encoder, f"weight_{kind}_{suffix}") for kind in ("ih", "hh")], 1)
        assert torch.equal(encoder._weight_quantizers[index].amax, weight.detach().abs().amax(1, keepdim=True))
        largest = torch.cat(steps).abs().max()
        torch.testing.assert_close(encoder._input_quantizers[index].amax, largest, rtol=1e-3, atol=0.0)
        assert {f"encoder._input_quantizers.{index}._amax", f"encoder._weight_quantizers.{index}._amax"} <= keys
    fresh = nn.ModuleDict({"encoder": quant(4, 6, 2, bidirectional=True)})
    fresh.load_state_dict(model.state_dict())
    assert_equal_results(fresh["encoder"](x), model["encoder"](x), rtol=0.0, atol=0.0)


def test_straight_through_gradients_reach_every_parameter(quant: Any, plain: Any) -> None:
    module = quant(4, 6, 2, bidirectional=True, quant_desc_weight=QuantDescriptor(num_bits=4, axis=0))
    module(random(3, 5, 4, dtype=torch.float32))[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_learned_ranges(quant: Any, plain: Any) -> None:
    module = quant(4, 6, quant_desc_input=QuantDescriptor(learn_amax=True, amax=0.25))
    module(random(3, 5, 4, dtype=torch.float32))[0].square().sum().backward()
    bound = module._input_quantizers[0].clip.clip_value_max
    assert bound.grad is not None and bool(bound.grad.any())
    before = module.weight_ih_l0.detach().clone()
    torch.manual_seed(7)
    module.reset_parameters()
    assert bound.item() == 0.25 and not torch.equal(module.weight_ih_l0, before)
    expected = plain(4, 6)
    torch.manual_seed(7)
    expected.reset_parameters()
    assert torch.equal(module.bias_hh_l0, expected.bias_hh_l0)


# -- the ways of PyTorch --------------------------------------------------------------------------------


def calibrated(quant: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    module = quant(*args, **kwargs)
    for quantizer in quantizers(module):
        quantizer.enable_calib()
    module(x)
    for quantizer in quantizers(module):
        quantizer.load_calib_amax()
        quantizer.disable_calib()
    return module


def test_deepcopy_pickle_and_save(quant: Any, plain: Any) -> None:
    x = random(3, 5, 4, dtype=torch.float32)
    module = calibrated(quant, x, 4, 6, 2, bidirectional=True)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = quant(4, 6, 2, bidirectional=True)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert twin is not module and twin.weight_ih_l0 is not module.weight_ih_l0
        assert_equal_results(twin(x), module(x), rtol=0.0, atol=0.0)


def test_functional_call_takes_the_given_parameters(quant: Any, plain: Any) -> None:
    x = random(3, 5, 4)
    ours, theirs = twins(quant, plain, 4, 6, 2, dtype=torch.float64)
    disable(ours)
    tensors = {name: (2 * parameter).detach() for name, parameter in theirs.named_parameters()}
    functional_call = torch.func.functional_call
    assert_equal_results(functional_call(ours, tensors, (x,)), functional_call(theirs, tensors, (x,)))
    assert_equal_results(ours(x), theirs(x))


def test_autocast(quant: Any, plain: Any) -> None:
    x = random(3, 5, 4, dtype=torch.float32)
    module = calibrated(quant, x, 4, 6, 2, bidirectional=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = module(x)
        result[0].sum().backward()
        from_16_bits = module(x.to(torch.bfloat16))
    assert_equal_results(result, module(x), rtol=0.0, atol=0.03)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in flat(from_16_bits))
    assert module.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_fullgraph(quant: Any, plain: Any) -> None:
    x = random(2, 3, 4, dtype=torch.float32)
    module = calibrated(quant, x, 4, 6, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    result = compiled(x)
    assert_equal_results(result, module(x), rtol=0.0, atol=1e-6)
    result[0].sum().backward()
    assert bool(module.weight_hh_l0.grad.any())


def test_export_with_a_dynamic_batch(quant: Any, plain: Any) -> None:
    x = random(3, 2, 4, dtype=torch.float32)
    module = calibrated(quant, x, 4, 6, batch_first=True).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (x,), strict=False, dynamic_shapes={"input": {0: batch}})
    wider = random(7, 2, 4, dtype=torch.float32, seed=8)
    assert_equal_results(program.module()(wider), module(wider), rtol=0.0, atol=1e-6)
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any("lstm" in name or "gru" in name for name in operators)


def test_flatten_parameters_changes_nothing(quant: Any, plain: Any) -> None:
    x = random(3, 5, 4, dtype=torch.float32)
    module = calibrated(quant, x, 4, 6, 2)
    before = module(x)
    module.flatten_parameters()
    assert_equal_results(module(x), before, rtol=0.0, atol=0.0)
    assert_equal_results(module.double().float()(x), before, rtol=0.0, atol=0.0)


def test_no_fused_kernel_walks_around_the_quantizers(quant: Any, plain: Any) -> None:
    """A quantizer that gives 0 for everything must be felt, in training and, without gradients, in eval mode."""
    module = quant(4, 6, bias=False)
    for quantizer in quantizers(module):
        quantizer.amax = 0.0
    x = random(3, 5, 4, dtype=torch.float32)
    assert not module(x)[0].any()
    with torch.inference_mode():
        assert not module.eval()(x)[0].any()


def test_conversion_of_an_existing_instance(quant: Any, plain: Any) -> None:
    module = plain(4, 6, 2, bidirectional=True, dtype=torch.float64)
    x = random(3, 5, 4)
    before = module(x)
    parameters = list(module.parameters())
    module.__class__ = quant
    module.add_quantizers(quant.default_quant_desc_input, quant.default_quant_desc_weight)
    assert len(module._input_quantizers) == len(module._weight_quantizers) == 4
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert not torch.equal(module(x)[0], before[0])
    assert_equal_results(disable(module)(x), before)


def test_parametrized_weights(quant: Any, plain: Any) -> None:
    ours, theirs = twins(quant, plain, 4, 6, dtype=torch.float64)
    for module in (ours, theirs):
        nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
        with torch.no_grad():
            module.parametrizations.weight_hh_l0.original0.mul_(2)
    weights = seen_by(ours._weight_quantizers)
    ours(random(3, 5, 4))
    assert torch.equal(weights[0][0][:, 4:], theirs.weight_hh_l0)


def test_empty_batch(quant: Any, plain: Any) -> None:
    output = quant(4, 6, 2)(torch.zeros(3, 0, 4))[0]
    assert output.shape == (3, 0, 6)


# -- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (3, 4), (1, 3, 2, 4)])
def test_input_must_have_3_dimensions(quant: Any, plain: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=f"{quant.__name__} needs an input of 3 dimensions, got {len(shape)}"):
        quant(4, 6)(torch.zeros(shape))


def test_refused_inputs(quant: Any, plain: Any) -> None:
    module, x = quant(4, 6, 2), torch.zeros(3, 5, 4)
    with pytest.raises(RuntimeError, match="at least one time step"):
        module(x[:0])
    with pytest.raises(RuntimeError, match="input_size=4, got an input with 3 features"):
        module(x[..., :3])
    with pytest.raises(RuntimeError, match="input_size=4, got an input with 3 features"):
        module(pack_padded_sequence(x[..., :3], torch.tensor([3, 3, 2, 1, 1])))
    with pytest.raises(ValueError, match="the input is torch.float64, but the weights are torch.float32"):
        module(x.double())


def test_refused_states(quant: Any, plain: Any) -> None:
    module, x = quant(4, 6, 2), torch.zeros(3, 5, 4)
    good = states(quant, 2, 5, 6, dtype=torch.float32)
    name = r"hx\[0\]"
    for shape in [(1, 5, 6), (2, 3, 6), (2, 5, 4), (5, 6)]:
        wrong = torch.zeros(shape)
        with pytest.raises(RuntimeError, match=name + r" must have the shape \(2, 5, 6\)"):
            module(x, (wrong, good[1]) if isinstance(good, tuple) else wrong)
    with pytest.raises(ValueError, match=name + " is torch.float64"):
        module(x, (good[0].double(), good[1]) if isinstance(good, tuple) else good.double())
