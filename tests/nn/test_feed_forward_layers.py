"""What all feed-forward quantized layers share: construction, results, gradients, and what models are put through."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdq.nn as qnn
from qdq import QuantDescriptor, TensorQuantizer
from qdq.nn import QuantMixin, pop_quant_desc_in_kwargs


@dataclass
class Case:
    """A layer, its arguments and the shape of an input."""

    name: str
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def quantized(self) -> Any:
        return getattr(qnn, f"Quant{self.name}")

    @property
    def of_torch(self) -> Any:
        return getattr(nn, self.name)

    @property
    def weighted(self) -> bool:
        return issubclass(self.quantized, QuantMixin)

    def build(self, **kwargs: Any) -> Any:
        return self.quantized(*self.args, **self.kwargs, **kwargs)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        torch.manual_seed(7)
        return torch.randn(self.shape, dtype=dtype)

    def __str__(self) -> str:
        return self.name


SPATIAL = {1: (6,), 2: (6, 5), 3: (4, 5, 6)}
WEIGHTED = [Case("Linear", (4, 3), (2, 4))]
WEIGHTED += [Case(f"Conv{d}d", (2, 3, 3, 1, 1), (2, 2, *SPATIAL[d])) for d in SPATIAL]
WEIGHTED += [Case(f"ConvTranspose{d}d", (2, 3, 3, 2), (2, 2, *SPATIAL[d])) for d in SPATIAL]
UNWEIGHTED = [Case(f"MaxPool{d}d", (2,), (2, 2, *SPATIAL[d])) for d in SPATIAL]
UNWEIGHTED += [Case(f"AvgPool{d}d", (2,), (2, 2, *SPATIAL[d])) for d in SPATIAL]
UNWEIGHTED += [Case(f"AdaptiveAvgPool{d}d", (2,), (2, 2, *SPATIAL[d])) for d in SPATIAL]
UNWEIGHTED += [Case(f"InstanceNorm{d}d", (2,), (2, 2, *SPATIAL[d]), {"affine": True}) for d in SPATIAL]
CASES = WEIGHTED + UNWEIGHTED

every_layer = pytest.mark.parametrize("case", CASES, ids=str)
every_weighted = pytest.mark.parametrize("case", WEIGHTED, ids=str)


def fake_quantized(x: Tensor, amax: Tensor, bits: int = 8) -> Tensor:
    """The definition, in float64."""
    bound = 2 ** (bits - 1) - 1
    step = amax.double() / bound
    return torch.clamp(torch.round(x.double() / step), -bound - 1, bound) * step


def weight_amax(case: Case, weight: Tensor) -> Tensor:
    axis = 1 if "Transpose" in case.name else 0
    return weight.abs().amax([i for i in range(weight.dim()) if i != axis], keepdim=True)


@pytest.fixture
def defaults() -> Iterator[None]:
    """Puts the default descriptors of all classes back."""
    classes = {base for case in CASES for base in case.quantized.__mro__}
    names = ("default_quant_desc_input", "default_quant_desc_weight")
    before = {(cls, name): vars(cls)[name] for cls in classes for name in names if name in vars(cls)}
    yield
    for cls in classes:
        for name in names:
            if (cls, name) in before:
                setattr(cls, name, before[cls, name])
            elif name in vars(cls):
                delattr(cls, name)


# construction


@every_layer
def test_constructor_draws_the_random_numbers_of_torch(case: Case) -> None:
    torch.manual_seed(3)
    reference = case.of_torch(*case.args, **case.kwargs)
    after = torch.rand(4)
    torch.manual_seed(3)
    layer = case.build()
    assert torch.equal(torch.rand(4), after)
    expected = reference.state_dict()
    assert layer.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in layer.state_dict().items())


@every_layer
def test_works_while_it_stands_in_torch_nn(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `quant_modules.initialize()` puts it there: its constructor must not find itself as its base."""
    expected, x = case.build(), case.input()
    monkeypatch.setattr(nn, case.name, case.quantized)
    layer = case.of_torch(*case.args, **case.kwargs)
    assert type(layer) is case.quantized
    layer.load_state_dict(expected.state_dict())
    assert torch.equal(layer(x), expected(x))
    assert torch.equal(copy.deepcopy(layer)(x), expected(x))


@every_layer
def test_is_a_torch_layer_and_has_its_quantizers(case: Case) -> None:
    layer = case.build()
    assert isinstance(layer, case.of_torch)
    assert layer.input_quantizer is layer._input_quantizer
    names = [name for name, module in layer.named_modules() if isinstance(module, TensorQuantizer)]
    if case.weighted:
        assert layer.weight_quantizer is layer._weight_quantizer
        assert names == ["_input_quantizer", "_weight_quantizer"]
    else:
        assert not hasattr(layer, "weight_quantizer")
        assert names == ["_input_quantizer"]


@every_layer
def test_default_descriptors(case: Case) -> None:
    layer = case.build()
    assert case.quantized.default_quant_desc_input == QuantDescriptor()
    assert (layer.input_quantizer.num_bits, layer.input_quantizer.axis) == (8, None)
    if case.weighted:
        axis = 1 if "Transpose" in case.name else 0
        assert case.quantized.default_quant_desc_weight == QuantDescriptor(axis=axis)
        assert (layer.weight_quantizer.num_bits, layer.weight_quantizer.axis) == (8, axis)


@every_layer
def test_descriptors_by_keyword(case: Case) -> None:
    weight = {"quant_desc_weight": QuantDescriptor(5, axis=(0, 1))} if case.weighted else {}
    layer = case.build(quant_desc_input=QuantDescriptor(6, unsigned=True, amax=2.5), **weight)
    assert (layer.input_quantizer.num_bits, layer.input_quantizer.unsigned) == (6, True)
    assert layer.input_quantizer.amax.item() == 2.5
    if case.weighted:
        assert (layer.weight_quantizer.num_bits, layer.weight_quantizer.axis) == (5, (0, 1))


@every_layer
def test_other_keywords_are_refused_before_anything_is_drawn(case: Case) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(TypeError, match=rf"Unused keys: quant_desc, zeta \(arguments of Quant{case.name}\)"):
        case.build(zeta=1, quant_desc=QuantDescriptor())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", UNWEIGHTED, ids=str)
def test_a_layer_without_weight_takes_no_weight_descriptor(case: Case) -> None:
    with pytest.raises(TypeError, match="Unused keys: quant_desc_weight"):
        case.build(quant_desc_weight=QuantDescriptor())


@every_layer
def test_codes_are_refused_in_a_layer(case: Case) -> None:
    for key in ("quant_desc_input", "quant_desc_weight")[: 1 + case.weighted]:
        with pytest.raises(ValueError, match=rf"Only fake quantization is supported.*{key} of Quant{case.name}"):
            case.build(**{key: QuantDescriptor(fake_quant=False)})


@every_layer
def test_what_is_no_descriptor_is_refused(case: Case) -> None:
    for key in ("quant_desc_input", "quant_desc_weight")[: 1 + case.weighted]:
        with pytest.raises(ValueError, match=f"{key} must be a QuantDescriptor, got dict"):
            case.build(**{key: {"num_bits": 8}})


# class defaults


@every_layer
@pytest.mark.usefixtures("defaults")
def test_set_default_is_a_copy_for_one_class(case: Case) -> None:
    others = [other for other in CASES if other is not case]
    descriptor = QuantDescriptor(4, name="mine")
    case.quantized.set_default_quant_desc_input(descriptor)
    assert case.quantized.default_quant_desc_input == descriptor
    assert case.quantized.default_quant_desc_input is not descriptor
    assert case.build().input_quantizer.num_bits == 4
    assert all(other.quantized.default_quant_desc_input == QuantDescriptor() for other in others)
    if case.weighted:
        case.quantized.set_default_quant_desc_weight(descriptor)
        assert case.quantized.default_quant_desc_weight is not descriptor
        assert case.build().weight_quantizer.num_bits == 4
        assert all(o.quantized.default_quant_desc_weight.num_bits == 8 for o in others if o.weighted)
        assert case.build(quant_desc_weight=QuantDescriptor(3)).weight_quantizer.num_bits == 3


@every_layer
def test_set_default_takes_descriptors_only(case: Case) -> None:
    with pytest.raises(ValueError, match=f"default input descriptor of Quant{case.name} must be a QuantDescriptor"):
        case.quantized.set_default_quant_desc_input("8 bits")
    if case.weighted:
        with pytest.raises(ValueError, match=f"default weight descriptor of Quant{case.name} must be a QuantDesc"):
            case.quantized.set_default_quant_desc_weight(None)


# results


@every_layer
def test_result_is_that_of_torch_on_fake_quantized_tensors(case: Case) -> None:
    layer, x = case.build().double(), case.input(torch.float64)
    reference = case.of_torch(*case.args, **case.kwargs).double()
    reference.load_state_dict(layer.state_dict())
    if case.weighted:
        with torch.no_grad():
            reference.weight.copy_(fake_quantized(layer.weight, weight_amax(case, layer.weight)))
    expected = reference(fake_quantized(x, x.abs().max()))
    assert expected.dtype == torch.float64
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(layer(x), case.of_torch.forward(layer, x))


@every_layer
def test_disabled_quantizers_give_the_float_layer(case: Case) -> None:
    layer, x = case.build(), case.input()
    reference = case.of_torch(*case.args, **case.kwargs)
    reference.load_state_dict(layer.state_dict())
    for module in layer.modules():
        if isinstance(module, TensorQuantizer):
            module.disable()
    assert torch.equal(layer(x), reference(x))


@every_layer
def test_bits_and_granularity_of_the_descriptors_are_used(case: Case) -> None:
    """Per tensor, 4 bits, an input range that clips."""
    weight = {"quant_desc_weight": QuantDescriptor(4)} if case.weighted else {}
    layer = case.build(quant_desc_input=QuantDescriptor(4, amax=0.75), **weight).double()
    x = case.input(torch.float64)
    reference = case.of_torch(*case.args, **case.kwargs).double()
    reference.load_state_dict({k: v for k, v in layer.state_dict().items() if "quantizer" not in k})
    if case.weighted:
        with torch.no_grad():
            reference.weight.copy_(fake_quantized(layer.weight, layer.weight.abs().max(), 4))
    expected = reference(fake_quantized(x, torch.tensor(0.75), 4))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@every_layer
def test_gradients_are_straight_through(case: Case) -> None:
    """Those of torch's layer at the quantized tensors; none for inputs beyond amax."""
    layer, x = case.build(quant_desc_input=QuantDescriptor(amax=1.0)).double(), case.input(torch.float64)
    layer.train()
    x.requires_grad_()
    reference = case.of_torch(*case.args, **case.kwargs).double()
    reference.load_state_dict({k: v for k, v in layer.state_dict().items() if "quantizer" not in k})
    at = fake_quantized(x.detach(), torch.tensor(1.0)).requires_grad_()
    if case.weighted:
        with torch.no_grad():
            reference.weight.copy_(fake_quantized(layer.weight, weight_amax(case, layer.weight)))
    output, expected = layer(x), reference(at)
    seed = torch.randn_like(expected)
    output.backward(seed)
    expected.backward(seed)
    assert x.grad is not None and at.grad is not None
    inside = x.detach().abs() <= 1.0
    assert not bool(inside.all())
    torch.testing.assert_close(x.grad, torch.where(inside, at.grad, 0.0), rtol=1e-9, atol=1e-9)
    wanted = dict(reference.named_parameters())
    assert {name for name, _ in layer.named_parameters()} == set(wanted)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-9, atol=1e-9)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(case: Case, dtype: torch.dtype) -> None:
    layer = case.build().to(dtype)
    x = case.input()
    wide = copy.deepcopy(layer).float()(x)
    try:
        case.of_torch(*case.args, **case.kwargs).to(dtype)(x.to(dtype))
    except NotImplementedError:
        pytest.skip("torch has no such kernel")
    output = layer(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), wide, rtol=0.05, atol=0.08)
    if case.weighted:
        output.sum().backward()
        assert layer.weight.grad.dtype == dtype


@pytest.mark.parametrize("case", [c for c in CASES if c.weighted or c.name.startswith("InstanceNorm")], ids=str)
def test_device_and_dtype_keywords(case: Case) -> None:
    layer = case.build(device="meta", dtype=torch.bfloat16, quant_desc_input=QuantDescriptor(amax=2.0))
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)
    # Its value would be lost there.
    assert layer.input_quantizer.amax.item() == 2.0
    assert case.build(device="cpu", dtype=torch.float64).weight.dtype == torch.float64


@every_weighted
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_quantizers_are_made_on_the_device_of_the_layer(case: Case) -> None:
    layer = case.build(device="cuda", quant_desc_input=QuantDescriptor(amax=2.0))
    assert layer.input_quantizer.amax.device.type == "cuda"
    assert layer(case.input().to("cuda")).device.type == "cuda"


# what models are put through


@every_layer
def test_autocast_with_bfloat16(case: Case) -> None:
    layer, x = case.build(), case.input()
    expected = case.of_torch(*case.args, **case.kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, dtype = layer(x), expected(x).dtype
        if output.requires_grad:
            output.float().sum().backward()
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.08)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


# PyTorch's own compiler instantiates autograd.Function.
@every_layer
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break(case: Case) -> None:
    torch.compiler.reset()
    # A calibrated input; weights stay dynamic.
    layer, x = case.build(quant_desc_input=QuantDescriptor(amax=1.5)), case.input()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("case", [c for c in WEIGHTED if c.name in ("Linear", "Conv2d")], ids=str)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_trains_compiled(case: Case) -> None:
    torch.compiler.reset()
    layer, x = case.build(), case.input()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    twin(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad)


@every_layer
def test_exports(case: Case) -> None:
    layer, x = case.build().eval(), case.input()
    layer.input_quantizer.amax = 1.5
    program = torch.export.export(layer, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), layer(x))


@every_layer
def test_copies_and_pickles(case: Case) -> None:
    layer, x = case.build(quant_desc_input=QuantDescriptor(7, amax=1.5)), case.input()
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]
    expected = layer(x)
    for other in copies:
        assert type(other) is case.quantized
        assert other.input_quantizer is not layer.input_quantizer
        assert torch.equal(other(x), expected)
    copies[0].input_quantizer.amax = 0.1
    assert torch.equal(layer(x), expected)


@every_layer
def test_keys_of_the_state_dict(case: Case) -> None:
    layer = case.build()
    own = set(case.of_torch(*case.args, **case.kwargs).state_dict())
    assert set(layer.state_dict()) == own
    quantizers = [module for module in layer.modules() if isinstance(module, TensorQuantizer)]
    for module in quantizers:
        module.enable_calib()
        module.disable_quant()
    layer(case.input())
    for module in quantizers:
        module.disable_calib()
        module.enable_quant()
        module.load_calib_amax()
    names = {"_input_quantizer._amax", "_weight_quantizer._amax"} if case.weighted else {"_input_quantizer._amax"}
    assert set(layer.state_dict()) == own | names
    other = case.build()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(case.input()), layer(case.input()))


@every_layer
def test_functional_call(case: Case) -> None:
    layer, x = case.build(quant_desc_input=QuantDescriptor(amax=1.0)), case.input()
    expected = layer(x)
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    changed = {key: value.detach() * 2 for key, value in state.items()}
    assert torch.equal(torch.func.functional_call(layer, state, (x,)), expected)
    assert not torch.equal(torch.func.functional_call(layer, changed, (x,)), expected)
    assert torch.equal(layer(x), expected)


@every_layer
def test_repr_shows_arguments_and_quantizers(case: Case) -> None:
    layer = case.build()
    text = repr(layer)
    assert text.startswith(f"Quant{case.name}(")
    assert case.of_torch(*case.args, **case.kwargs).extra_repr() in text
    assert "(_input_quantizer): TensorQuantizer(8bit fake per-tensor amax=dynamic" in text
    axis = 1 if "Transpose" in case.name else 0
    assert (f"(_weight_quantizer): TensorQuantizer(8bit fake axis={axis} amax=dynamic" in text) == case.weighted


@every_layer
def test_an_existing_float_layer_becomes_a_quantized_one(case: Case) -> None:
    layer, x = case.of_torch(*case.args, **case.kwargs), case.input()
    built = case.build()
    built.load_state_dict(layer.state_dict())
    parameters = [id(p) for p in layer.parameters()]
    layer.__class__ = case.quantized
    descriptors = pop_quant_desc_in_kwargs(case.quantized, input_only=not case.weighted)
    layer.add_quantizers(*(descriptors if case.weighted else [descriptors]))
    assert torch.equal(layer(x), built(x))
    assert [id(p) for p in layer.parameters()] == parameters


@every_layer
def test_e4m3(case: Case) -> None:
    descriptor = QuantDescriptor((4, 3))
    layer = case.build(quant_desc_input=descriptor, **({"quant_desc_weight": descriptor} if case.weighted else {}))
    reference = case.of_torch(*case.args, **case.kwargs)
    reference.load_state_dict(layer.state_dict())
    x = case.input()
    output = layer(x)
    assert not torch.equal(output, reference(x))
    torch.testing.assert_close(output, reference(x), rtol=0.1, atol=0.15)
