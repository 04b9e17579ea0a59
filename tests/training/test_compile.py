"""`torch.compile` over every layer of `qdq.nn`, and over a change of a quantizer's settings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdq.nn
from qdq.descriptor import QuantDescriptor
from qdq.quantizer import TensorQuantizer
from training.layers import LAYERS, NO_LAYERS, tensors_of

# PyTorch's own compiler instantiates autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_every_layer_is_tested() -> None:
    assert set(qdq.nn.__all__) - NO_LAYERS - {n for n in qdq.nn.__all__ if n.endswith("quantize_modules")} <= set(
        LAYERS
    )


def gradients(layer: nn.Module, call: Any, inputs: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor | None]]:
    """What `call` gives for `inputs`, and the gradients of the parameters of `layer` for some loss."""
    layer.zero_grad()
    outputs = tensors_of(call(*inputs))
    for output in outputs:
        if output.requires_grad:
            weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
            (output * weights).sum().backward(retain_graph=True)
    return [output.detach() for output in outputs], [p.grad for p in layer.parameters()]


@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_same_values_same_gradients(name: str) -> None:
    torch.manual_seed(0)
    make, make_inputs = LAYERS[name]
    layer, inputs = make(), make_inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for left, right in zip(gradients(layer, compiled, inputs), gradients(layer, layer, inputs), strict=True):
        for found, expected in zip(left, right, strict=True):
            assert (found is None) == (expected is None)
            if found is not None and expected is not None:
                torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
# Inductor's own imports.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_default_backend() -> None:
    torch.manual_seed(0)
    layer, x = qdq.nn.QuantLinear(3, 4), torch.randn(2, 3)
    with torch._inductor.config.patch(compile_threads=1):
        found = gradients(layer, torch.compile(layer, fullgraph=True), (x,))
    expected = gradients(layer, layer, (x,))
    torch.testing.assert_close(found, expected)


# -- settings --------------------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "disable": lambda q: q.disable(),
    "disable_quant": lambda q: q.disable_quant(),
    "num_bits": lambda q: setattr(q, "num_bits", 3),
    "unsigned": lambda q: setattr(q, "unsigned", True),
    "amax": lambda q: setattr(q, "amax", 0.5),
    "pre_quant_scale": lambda q: setattr(q, "pre_quant_scale", 2.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_settings_takes_effect_in_a_compiled_model(change: str) -> None:
    q = TensorQuantizer()
    model = nn.Sequential(q)
    x = torch.rand(2, 3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = compiled(x)
    assert torch.equal(before, model(x))
    CHANGES[change](q)
    after = compiled(x)
    assert torch.equal(after, model(x))
    assert not torch.equal(after, before)


def test_back_and_forth_and_a_new_amax_in_place() -> None:
    q = TensorQuantizer(QuantDescriptor(amax=1.0))
    x = torch.rand(4)
    compiled = torch.compile(q, fullgraph=True, backend="eager")
    for switch in ("disable", "enable", "disable_quant", "enable_quant"):
        getattr(q, switch)()
        assert torch.equal(compiled(x), q(x))
        assert torch.equal(compiled(x), x) == switch.startswith("disable")
    for amax in (0.25, 0.5):
        q.amax = amax
        assert torch.equal(compiled(x), q(x))
        assert compiled(x).max() <= amax


def test_clip_can_be_switched_in_a_compiled_model() -> None:
    q = TensorQuantizer(QuantDescriptor(learn_amax=True, amax=0.5), if_quant=False)
    x = torch.linspace(-1, 1, 5)
    compiled = torch.compile(q, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), x)
    q.enable_clip()
    assert torch.equal(compiled(x), x.clamp(-0.5, 0.5))


def test_codes_keep_their_scale_when_compiled() -> None:
    q = TensorQuantizer(QuantDescriptor(fake_quant=False))
    x = torch.randn(5)
    codes = torch.compile(q, fullgraph=True, backend="aot_eager")(x)
    scale = q.scale
    assert torch.equal(codes, q(x))
    assert scale is not None
    assert torch.equal(scale, torch.tensor(127.0) / x.abs().max())


def test_calibration_in_a_compiled_model() -> None:
    """Collecting reads values, which breaks the graph; without `fullgraph` it runs beside it."""
    x = torch.randn(8)
    for method, arguments in (("max", ()), ("histogram", ("percentile",))):
        q = TensorQuantizer(QuantDescriptor(calib_method=method), if_calib=True, if_quant=False)
        compiled = torch.compile(q, backend="eager")
        for factor in (1.0, 2.0):
            assert torch.equal(compiled(x * factor), x * factor)
        q.load_calib_amax(*arguments)
        q.disable_calib()
        q.enable_quant()
        assert q.amax is not None
        assert float(q.amax) == pytest.approx(2 * float(x.abs().max()), rel=1e-3)
        assert torch.equal(compiled(x), q(x))


def test_layers_of_one_kind_do_not_use_up_the_compilers_limit() -> None:
    """One after another in one process: PyTorch refuses the ninth compilation of one function."""
    for name in ("Max", "Avg", "AdaptiveAvg"):
        for d in (1, 2, 3):
            layer = getattr(qdq.nn, f"Quant{name}Pool{d}d")(2)
            x = torch.randn(1, 2, *([4] * d))
            assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    for d in (1, 2, 3):
        layer = getattr(qdq.nn, f"QuantInstanceNorm{d}d")(2)
        x = torch.randn(2, 2, *([4] * d))
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
