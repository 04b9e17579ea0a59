"""Quantizers in graphs: `torch.jit.trace`, `torch.compile`, `torch.export`, `make_fx`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.fx.experimental.proxy_tensor import make_fx

import qdq.functional as F
from qdq.descriptor import QuantDescriptor
from qdq.kernels import engine, native
from qdq.quantizer import TensorQuantizer

# PyTorch's own compiler instantiates autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

# Eager calls, with which graphs are compared, compute on this; graphs hold the reference.
ENGINE = "reference" if native.library().functions is None else "cpu"
AMAX = torch.tensor(1.0)


@pytest.fixture(autouse=True)
def fast_engine() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with engine.forced(ENGINE):
        yield
    torch.compiler.reset()


class Block(nn.Module):
    """A residual block with every tensor that a target quantizes quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.input = TensorQuantizer(QuantDescriptor(amax=2.5))
        self.weight = TensorQuantizer(QuantDescriptor(axis=0))
        self.inner = TensorQuantizer(QuantDescriptor(unsigned=True))
        self.float8 = TensorQuantizer(QuantDescriptor((4, 3), amax=3.0))
        self.output = TensorQuantizer(QuantDescriptor(num_bits=4, axis=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        y = nn.functional.conv2d(x, self.weight(self.conv.weight), padding=1)
        y = self.inner(self.relu(self.norm(y)))
        y = F.fake_quantize_affine(y, torch.full((4, 1, 1), 0.02), 7, 0, 255)
        return self.output(y + self.float8(x))


def outcome(model: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


@pytest.mark.parametrize(("backend", "training"), [("eager", True), ("aot_eager", False)])
def test_a_residual_block_is_one_graph(backend: str, training: bool) -> None:
    block = Block().train(training)
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    parameters: list[Tensor] = list(block.parameters())
    expected = outcome(block, x, parameters)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for found, wanted in zip(outcome(compiled, x, parameters), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(compiled(x), block(x)) or training  # which changes the running statistics
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():
        block.eval()
        assert torch.equal(compiled(x), block(x))


class Each(nn.Module):
    """Every kind of quantization, once."""

    steps: Tensor
    blocks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tensor = TensorQuantizer(QuantDescriptor(amax=1.0))
        self.channel = TensorQuantizer(QuantDescriptor(axis=1, num_bits=4))
        self.e4m3 = TensorQuantizer(QuantDescriptor((4, 3), amax=2.0))
        self.register_buffer("steps", torch.tensor([0.1, 0.2, 0.3, 0.4]))
        self.register_buffer("blocks", torch.full((1, 2), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.e4m3(self.channel(self.tensor(x)))
        x = F.fake_quantize_affine(x, self.steps, 3, 0, 15)
        x = F.fake_tensor_quant(x, self.blocks, 4, block_size=2)
        return F.fake_quantize_affine(x, 0.1, torch.tensor(4), -8, 7)


NODES = [
    "qdq.fake_tensor_quant.default",
    "qdq.fake_tensor_quant.default",
    "qdq.scaled_e4m3.default",
    "qdq.fake_quantize_affine.default",
    "qdq.fake_tensor_quant.default",
    "qdq.fake_quantize_affine.default",
]


@pytest.mark.parametrize(("strict", "training"), [(False, False), (True, True)])
def test_an_exported_program_has_one_node_for_each(strict: bool, training: bool) -> None:
    model, x = Each().train(training), torch.randn(3, 4)
    program: Any = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict)
    assert [str(n.target) for n in program.graph.nodes if "qdq" in str(n.target)] == NODES
    assert not [n for n in program.graph.nodes if any(w in str(n.target) for w in ("round", "clamp", "where", "div"))]
    restored: Any = program.module()
    for rows in (2, 5):
        other = torch.randn(rows, 4)
        assert torch.equal(restored(other), model(other))
    leaf = torch.randn(2, 4).requires_grad_()
    gradients = [torch.autograd.grad(call(leaf).sum(), leaf)[0] for call in (restored, model)]
    assert torch.equal(*gradients)
    decomposed = program.run_decompositions()
    assert [str(n.target) for n in decomposed.graph.nodes if "qdq" in str(n.target)] == NODES


def test_a_saved_program(tmp_path: Any) -> None:
    model, x = Each().eval(), torch.randn(3, 4)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
    assert torch.equal(torch.export.load(tmp_path / "program.pt2").module()(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradient", [False, True])
def test_a_trace(gradient: bool) -> None:
    """It holds operations on the input, not the values that were seen."""
    model, x = Each().eval(), torch.randn(3, 4).requires_grad_(gradient)
    traced: Any = torch.jit.trace(model, x)
    for _ in range(3):
        other = torch.randn(3, 4).requires_grad_(gradient)
        assert torch.equal(traced(other), model(other))
        if gradient:
            found, expected = (torch.autograd.grad(call(other).sum(), other)[0] for call in (traced, model))
            assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_graph_of_make_fx(mode: Any) -> None:
    def gradient(x: Tensor, amax: Tensor) -> Tensor:
        y = F.fake_tensor_quant(F.fake_quantize_affine(x, amax / 7, 3, 0, 15), amax)
        return torch.autograd.grad(y.sum(), x)[0] + y

    graph = make_fx(gradient, tracing_mode=mode)(torch.randn(5).requires_grad_(), AMAX)
    for amax in (AMAX, AMAX / 2):
        other = torch.randn(5).requires_grad_()
        assert torch.equal(graph(other, amax), gradient(other, amax))


def test_compiled_backward() -> None:
    """The backward of eager calls, compiled."""
    x = torch.randn(4, 5, requires_grad=True)
    large = torch.randn(100, 100, requires_grad=True)
    for tensor, amax in ((x, AMAX), (x, torch.rand(5)), (large, AMAX)):
        y = F.fake_tensor_quant(tensor, amax).sum() + F.fake_quantize_affine(tensor, 0.1, 3, 0, 15).sum()
        expected = torch.autograd.grad(y, tensor, retain_graph=True)[0]
        with compiled_autograd._enable(torch.compile(backend="eager")):
            y.backward()
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, expected)
        tensor.grad = None


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (0, 4), (4,)])
def test_meta_tensors(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(shape, dtype=dtype, device="meta").requires_grad_()
        one = torch.ones((), device="meta")
        results = [
            F.fake_tensor_quant(x, one),
            F.fake_tensor_quant(x, 1.0, 4, True),
            F.tensor_quant(x, one)[0],
            F.fake_quantize_affine(x, 0.1, 3, 0, 15),
            F.fake_affine_tensor_quant(x, -1.0, 1.0),
            F.scaled_e4m3(x, one),
            F.fake_tensor_quant(x, one, block_size=2),
        ]
        for y in results:
            assert (y.device.type, y.shape, y.dtype) == ("meta", x.shape, dtype)
            assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
