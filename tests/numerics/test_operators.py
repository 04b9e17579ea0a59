"""`torch.ops.qdq`: what an exported program keeps of a quantizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from numerics.engine_data import as_tuple, assert_same
from qdq.descriptor import QuantDescriptor
from qdq.functional import fake_tensor_quant, scaled_e4m3
from qdq.kernels import engine, native, operations
from qdq.quantizer import TensorQuantizer

# PyTorch's compiler does so itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
ENGINES = ["reference"] if native.library().functions is None else ["reference", "cpu"]


@pytest.fixture(params=ENGINES)
def run(request: pytest.FixtureRequest) -> Iterator[str]:
    with engine.forced(request.param):
        yield request.param


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "empty": lambda x: x[:0],
}


def calls(dtype: torch.dtype, view: str) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for every operator, of which those that can have a gradient ask for it."""
    generator = torch.Generator().manual_seed(1)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).abs().add(0.1)

    x, grad = (VIEWS[view](torch.randn(2, 6, 3, 4, generator=generator).to(dtype)).detach() for _ in range(2))
    one, amax, step = torch.tensor(1.0), new(1, 6, 1, 1), new(1, 6, 1, 1)
    zero = torch.randint(0, 9, (1, 6, 1, 1), generator=generator)
    blocks, first = new(x.shape[0], 6, 3, 2), torch.tensor(3)
    leaf, grad_leaf = x.detach().requires_grad_(), grad.detach().requires_grad_()
    positive = x.abs().requires_grad_()
    axes = [None, 1, -1] if x.numel() else [None]
    return {
        "fake_tensor_quant": [
            *((leaf, one, 8, False, False), (leaf, amax, 8, False, True), (positive, amax, 4, True, True)),
            *((leaf, amax.double(), 0, False, False), (leaf, blocks, 4, False, True, 2)),
        ],
        "tensor_quant": [(leaf, amax, 8, False, True), (leaf, one, 4, False, True), (leaf, blocks, 4, False, True, 2)],
        "fake_quantize_affine": [(leaf, step, zero, 0, 255), (leaf, one, first, -8, 7), (leaf, blocks, first, 0, 9, 2)],
        "quantize_affine": [(x, step, zero, 0, 255), (x, blocks, first, 0, 9, 2)],
        "fake_affine_tensor_quant": [(leaf, -one, one, 8), (leaf, -amax, amax, 4)],
        "scaled_e4m3": [(leaf, amax), (leaf, None), (leaf, blocks, 2)],
        "round_to_float_format": [(leaf, 4, 3), (leaf, 5, 2), (leaf, 2, 1)],
        "round_to_e8m0": [(positive.detach(),)],
        "symmetric_gradient": [(grad_leaf, x, one), (grad_leaf, x, amax), (grad_leaf, x, blocks, 2)],
        "affine_gradient": [(grad_leaf, x, step, zero, 0, 255), (grad_leaf, x, blocks, first, 0, 9, 2)],
        "range_gradient": [(grad, x, -one, one), (grad, x, -amax, amax), (grad, x, -amax, one.double())],
        "clip_gradient": [(grad, x, -one, one), (grad, x, -one.reshape(1), one.double())],
        "absmax": [(x, axis) for axis in axes],
        "minmax": [(x, axis) for axis in axes if x.numel()],
        "histogram": [(x, 0.25, -3, 9)],
        "abs_histogram": [(x, 0.25, 9)],
    }


NAMES = [operator._name.removeprefix("qdq::") for operator in operations.OPERATORS]


def test_every_operator_is_checked() -> None:
    assert sorted(NAMES) == sorted(calls(torch.float32, "contiguous"))
    assert {name for name in vars(torch.ops.qdq) if hasattr(getattr(torch.ops.qdq, name), "default")} <= set(NAMES)


@pytest.mark.filterwarnings("ignore")  # opcheck warns of its own fallbacks
@pytest.mark.parametrize(
    ("run", "dtype", "view"),
    [
        *((ENGINES[-1], torch.float32, view) for view in ("contiguous", "gaps", "empty")),
        *((ENGINES[-1], torch.float16, "channels last"), (ENGINES[-1], torch.bfloat16, "expanded")),
        *((ENGINES[-1], torch.float64, "transposed"), ("reference", torch.bfloat16, "transposed")),
    ],
    indirect=["run"],
)
@pytest.mark.parametrize("name", NAMES)
def test_the_operators_pass_opcheck(name: str, dtype: torch.dtype, view: str, run: str) -> None:
    operator: Any = getattr(operations, name)
    # The slowest check runs where strides are least and most of a kind.
    checks = OPCHECKS if view in ("contiguous", "gaps") else OPCHECKS[:-1]
    for arguments in calls(dtype, view)[name]:
        torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("view", VIEWS)
def test_operators_give_what_their_fakes_promise(name: str, view: str, run: str) -> None:
    """Strides of axes of one element too; and engines agree."""
    operator: Any = getattr(operations, name)
    for dtype in (torch.float32, torch.bfloat16):
        for arguments in calls(dtype, view)[name]:
            real = as_tuple(operator(*arguments))
            on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
            for found, fake in zip(real, as_tuple(operator(*on_meta)), strict=True):
                # A copy to the meta device has the strides of `empty_like`, as results have.
                assert (found.shape, found.dtype, found.stride()) == (fake.shape, fake.dtype, fake.stride())
            for have in real:
                tensors = [a for a in arguments if isinstance(a, Tensor) and a.numel()]
                assert not have.numel() or have.data_ptr() not in [t.data_ptr() for t in tensors]
            with engine.forced("reference"):
                expected = as_tuple(operator(*arguments))
            if name in ("range_gradient", "clip_gradient"):  # sums are rounded in another order
                torch.testing.assert_close(real[1:], expected[1:])
                real, expected = real[:1], expected[:1]
            for have, want in zip(real, expected, strict=True):
                assert_same(have, want, name)


def test_operators_refuse_what_the_functions_refuse(run: str) -> None:
    x, one = torch.tensor([1.0, -1.0]), torch.tensor(1.0)
    for name in ("fake_tensor_quant", "tensor_quant"):
        operator: Any = getattr(operations, name)
        with pytest.raises(ValueError, match="Negative values in amax"):
            operator(x, -one, 8, False, True)
        with pytest.raises(TypeError, match="Negative values encountered in unsigned quantization"):
            operator(x, one, 8, True, True)
        with pytest.raises(ValueError, match=r"amax of shape \(3,\) does not broadcast"):
            operator(x, torch.ones(3), 8, False, True)
        with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
            operator(x, one, 8, False, True, 0)
        with pytest.raises(TypeError, match=r"inputs must be float16.*got torch\.int64"):
            operator(x.long(), one, 8, False, True)
    for name in ("fake_quantize_affine", "quantize_affine"):
        with pytest.raises(ValueError, match="step_size must be positive"):
            getattr(operations, name)(x, -one, one, 0, 255)
    with pytest.raises(ValueError, match="min_range must not exceed max_range"):
        operations.fake_affine_tensor_quant(x, one, -one, 8)
    with pytest.raises(ValueError, match="Negative values in amax"):
        operations.scaled_e4m3(x, -one)
    with pytest.raises(ValueError, match="no format has 3 exponent and 3 mantissa bits"):
        operations.round_to_float_format(x, 3, 3)


def test_value_and_gradient_are_those_of_the_functions() -> None:
    x = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.4, 1.0, 1.5], requires_grad=True)
    amax = torch.tensor(1.0)
    pairs: list[tuple[Any, Any]] = [
        (torch.ops.qdq.fake_tensor_quant(x, amax, 8, False, False), fake_tensor_quant(x, amax, 8, False, False)),
        (torch.ops.qdq.scaled_e4m3(x, amax), scaled_e4m3(x, amax)),
        (torch.ops.qdq.scaled_e4m3(x * 400, None), scaled_e4m3(x * 400)),
    ]
    for ours, expected in pairs:
        assert torch.equal(ours, expected)
        gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, expected)]
        assert torch.equal(*gradients)
        assert gradients[0].abs().sum() > 0


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.integer = TensorQuantizer(QuantDescriptor(amax=1.0))
        self.rows = TensorQuantizer(QuantDescriptor(num_bits=4, axis=1))
        self.e4m3 = TensorQuantizer(QuantDescriptor((4, 3), amax=2.0))
        self.learned = TensorQuantizer(QuantDescriptor(learn_amax=True, amax=0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.learned(self.e4m3(self.rows(self.integer(x))))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_one_node_per_quantizer(strict: bool) -> None:
    model, x = Quantized().eval(), torch.randn(3, 4)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict)
    nodes = [n for n in program.graph.nodes if str(n.target).startswith("qdq.")]
    assert [str(n.target) for n in nodes] == ["qdq.fake_tensor_quant.default"] * 2 + [
        "qdq.scaled_e4m3.default",
        "qdq.fake_tensor_quant.default",
    ]
    assert nodes[1].args[2:] == (4, False, False)
    other = torch.randn(5, 4)
    assert torch.equal(program.module()(other), model(other))


def test_bad_arguments_are_refused_while_capturing() -> None:
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fake_tensor_quant(x, torch.ones(3))

    with pytest.raises(ValueError, match=r"amax of shape \(3,\) does not broadcast"):
        torch.export.export(Bad(), (torch.randn(2, 4),))


def test_neither_eager_calls_nor_the_compiler_use_the_operators() -> None:
    model, x = Quantized().eval(), torch.randn(3, 4)
    seen: list[str] = []

    def keep(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph_module.graph.nodes)
        return graph_module

    compiled = torch.compile(model, fullgraph=True, backend=keep)
    assert torch.equal(compiled(x), model(x))
    assert seen and not [name for name in seen if "qdq" in name]
    for size in (x, torch.randn(100, 100)):
        y = fake_tensor_quant(size.requires_grad_(), torch.tensor(1.0))
        assert y.grad_fn is not None and "qdq" not in y.grad_fn.name()
