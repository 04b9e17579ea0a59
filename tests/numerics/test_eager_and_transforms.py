"""Eager calls with gradients, and every transform of PyTorch around them, on both engines: same values, same errors."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import qdq.functional as F
from numerics.engine_data import VIEWS, adversarial, assert_same
from qdq.descriptor import QuantDescriptor
from qdq.kernels import engine, native
from qdq.quantizer import TensorQuantizer

# PyTorch's own compiler instantiates autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

ENGINES = ["reference"] if native.library().functions is None else ["reference", "cpu"]
AMAX = torch.tensor(1.0)
ROWS = torch.tensor([[0.4], [0.0], [1.0], [2.0], [math.inf], [0.9]])
# More values than this take another way through the eager call.
MANY = 1500

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor_quant": lambda x: F.tensor_quant(x, AMAX)[0],
    "fake_tensor_quant": lambda x: F.fake_tensor_quant(x, AMAX),
    "4 bits": lambda x: F.fake_tensor_quant(x, AMAX * 0.7, 4, False, False),
    "no bits": lambda x: F.fake_tensor_quant(x, AMAX, 0),
    "rows": lambda x: F.fake_tensor_quant(x, ROWS, 4, False, False),
    "blocks": lambda x: F.fake_tensor_quant(x, ROWS.expand(6, -(-x.shape[-1] // 3)), 4, block_size=3),
    "nan": lambda x: F.fake_tensor_quant(x, torch.tensor([math.nan])),
    "infinite": lambda x: F.fake_tensor_quant(x, torch.tensor(math.inf)),
    "zero": lambda x: F.fake_tensor_quant(x, torch.zeros(())),
    "number": lambda x: F.fake_tensor_quant(x, 1.5),
    "legacy": lambda x: F.legacy_fake_tensor_quant(x, AMAX),
    "range": lambda x: F.fake_affine_tensor_quant(x, -0.5, 1.0),
    "range of rows": lambda x: F.fake_affine_tensor_quant(x, -torch.ones(6, 1), torch.ones(6, 1) * 2),
    "e4m3": lambda x: F.scaled_e4m3(x),
    "e4m3 of rows": lambda x: F.scaled_e4m3(x, ROWS),
    "affine": lambda x: F.fake_quantize_affine(x, 0.01, 100, 0, 255),
    "affine rows": lambda x: F.fake_quantize_affine(x, torch.linspace(0.01, 0.1, 6)[:, None], ROWS.new_ones(1), 0, 15),
    "affine blocks": lambda x: F.fake_quantize_affine(
        x, torch.rand(6, -(-x.shape[-1] // 3)) + 1, 1, 0, 3, block_size=3
    ),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
SOME = [FUNCTIONS[name] for name in ("fake_tensor_quant", "rows", "blocks", "range", "e4m3", "affine", "tensor_quant")]
some_functions = pytest.mark.parametrize("function", SOME)


@pytest.fixture(params=ENGINES, autouse=True)
def run(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.manual_seed(0)
    with engine.forced(request.param):
        yield request.param


def x_of(columns: int = 4) -> Tensor:
    return torch.randn(6, columns, generator=torch.Generator().manual_seed(3)).requires_grad_()


def mask_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Where the reference passes the gradient."""
    with engine.forced("reference"):
        y = x.detach().requires_grad_()
        torch.manual_seed(0)
        return torch.autograd.grad(function(y).sum(), y)[0]


# -- gradients -------------------------------------------------------------------------------------


@every_function
@pytest.mark.parametrize(
    ("view", "columns"),
    [("contiguous", 1), ("offset", MANY), ("gaps", MANY)]
    + [(view, 4) for view in ("contiguous", "transposed", "gaps", "expanded", "negative")],
)
def test_values_and_gradients_are_those_of_the_reference(
    function: Callable[[Tensor], Tensor], view: str, columns: int
) -> None:
    for dtype in (torch.float32, torch.bfloat16) if columns < MANY else (torch.float32,):
        x = VIEWS[view](adversarial((6, columns), dtype, 7, AMAX)).detach()
        leaf, other = x.detach().requires_grad_(), x.detach().requires_grad_()
        torch.manual_seed(0)
        with engine.forced("reference"):
            expected = function(other)
            gradient = torch.autograd.grad(expected, other, torch.full_like(expected, 3.0))[0]
        torch.manual_seed(0)
        y = function(leaf)
        assert y.requires_grad
        assert_same(y, expected)
        assert_same(torch.autograd.grad(y, leaf, torch.full((), 3.0).to(dtype).expand(y.shape))[0], gradient)
        torch.manual_seed(0)
        with torch.no_grad():
            without = function(leaf)
        assert not without.requires_grad
        assert_same(without, y)


@some_functions
def test_graphs_as_those_of_any_operation(function: Callable[[Tensor], Tensor]) -> None:
    """Backward twice, a change of the result in place, hooks on what is saved, a change of the input."""
    for columns in (4, MANY):
        x = x_of(columns)
        mask = mask_of(function, x)
        y = function(x)
        first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
        second = torch.autograd.grad(y.sum(), x)[0]
        assert torch.equal(first, mask) and torch.equal(second, mask)
        y = function(x)
        assert torch.equal(torch.autograd.grad(y.mul_(2).sum(), x)[0], 2 * mask)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: [t.clone()], lambda kept: kept[0]):
            y = function(x)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], mask)
        assert torch.equal(torch.autograd.grad(checkpoint(function, x, use_reentrant=False).sum(), x)[0], mask)
        before = x.detach().clone().requires_grad_()
        changed = before * 1
        y = function(changed)
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_small_and_large_calls_leave_inputs_alone() -> None:
    for columns in (4, MANY):
        x = x_of(columns)
        before = x.detach().clone()
        for function in SOME:
            y = function(x)
            assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
            y.sum().backward()
        assert torch.equal(x, before)


@some_functions
def test_double_backward(function: Callable[[Tensor], Tensor]) -> None:
    """The gradient is linear in the one that comes in: its own gradient is itself, none for the inputs."""
    for columns in (4, MANY):
        x = x_of(columns)
        mask = mask_of(function, x)
        weights = torch.randn(x.shape, requires_grad=True)
        gradient = torch.autograd.grad((function(x) * weights).sum(), x, create_graph=True)[0]
        assert torch.equal(gradient, mask * weights)
        assert torch.equal(torch.autograd.grad(gradient.sum(), weights, retain_graph=True)[0], mask)
        cubed = torch.autograd.grad((function(x) ** 3).sum(), x, create_graph=True)[0]
        found = torch.autograd.grad(cubed.sum(), x)[0]
        torch.testing.assert_close(found, 6 * function(x).detach() * mask, equal_nan=True)


@some_functions
@pytest.mark.parametrize("columns", [4, MANY])
def test_batched_gradients(function: Callable[[Tensor], Tensor], columns: int) -> None:
    x = x_of(columns)
    mask = mask_of(function, x)
    grads = torch.randn(3, *x.shape)
    found = torch.autograd.grad(function(x), x, grads, is_grads_batched=True)[0]
    assert torch.equal(found, grads * mask + 0.0)


@some_functions
def test_jacobians(function: Callable[[Tensor], Tensor]) -> None:
    x = x_of().detach()
    expected = torch.diag(mask_of(function, x).reshape(-1)).reshape(*x.shape, *x.shape)
    assert torch.equal(torch.autograd.functional.jacobian(function, x), expected)
    assert torch.equal(torch.autograd.functional.jacobian(function, x, vectorize=True), expected)
    assert torch.equal(torch.func.jacrev(function)(x), expected)


# -- torch.func ------------------------------------------------------------------------------------


@every_function
def test_func_grad_and_vmap(function: Callable[[Tensor], Tensor]) -> None:
    x = x_of().detach()
    assert torch.equal(torch.func.grad(lambda v: function(v).sum())(x), mask_of(function, x))
    batch = torch.randn(3, 6, 4)
    torch.manual_seed(0)
    found = torch.func.vmap(function, randomness="same")(batch)
    for one, each in zip(batch, found, strict=True):
        torch.manual_seed(0)
        assert_same(each, function(one))


def test_vmap_over_parameters() -> None:
    x, amaxes = x_of().detach(), torch.tensor([0.0, 0.5, 1.0, math.inf])
    found = torch.func.vmap(lambda amax: F.fake_tensor_quant(x, amax))(amaxes)
    assert_same(found, torch.stack([F.fake_tensor_quant(x, amax) for amax in amaxes]))
    both = torch.func.vmap(F.fake_tensor_quant)(x, torch.rand(6))
    assert both.shape == x.shape
    steps = torch.tensor([0.1, 0.2])
    found = torch.func.vmap(lambda step: F.fake_quantize_affine(x, step, 3, 0, 15))(steps)
    assert_same(found, torch.stack([F.fake_quantize_affine(x, step, 3, 0, 15) for step in steps]))
    gradients = torch.func.vmap(torch.func.grad(lambda v, a: F.fake_tensor_quant(v, a).sum()), (None, 0))(x, amaxes)
    assert_same(gradients, torch.stack([(x.abs() <= amax).float() for amax in amaxes]))


def test_gradients_of_samples_of_a_layer() -> None:
    layer, quantizer = nn.Linear(4, 2), TensorQuantizer(QuantDescriptor(amax=1.0))

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return (quantizer(x) @ quantizer(weight).t()).square().sum()

    batch, weight = torch.randn(5, 4), layer.weight.detach()
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, batch)
    for one, each in zip(batch, found, strict=True):
        leaf = weight.clone().requires_grad_()
        torch.testing.assert_close(each, torch.autograd.grad(loss(leaf, one), leaf)[0])


@some_functions
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's own, at its first use
def test_forward_differentiation_raises(function: Callable[[Tensor], Tensor]) -> None:
    x = x_of().detach()
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        function(forward_ad.make_dual(x, torch.ones_like(x)))
    assert function(x).shape == x.shape


# -- modes and threads -----------------------------------------------------------------------------


@every_function
def test_inference_mode(function: Callable[[Tensor], Tensor]) -> None:
    x = x_of()
    torch.manual_seed(0)
    expected = function(x)
    for tensor in (x, x.detach()):
        torch.manual_seed(0)
        with torch.inference_mode():
            found = function(tensor)
        assert found.is_inference() and not found.requires_grad
        assert_same(found, expected)
    with torch.inference_mode():
        made_here = torch.randn(6, 4)
    torch.manual_seed(0)
    outside = function(made_here)
    assert not outside.requires_grad


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_another_default_device(device: str) -> None:
    for function in SOME:
        x = x_of()
        expected = function(x)
        with torch.device(device):
            y = function(x)
            gradient = torch.autograd.grad(y.sum(), x)[0]
        assert_same(y, expected)
        assert torch.equal(gradient, mask_of(function, x))


def test_autocast() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.fake_tensor_quant(layer(x), torch.tensor(1.0))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


def test_threads_of_python() -> None:
    """Forward here, backward elsewhere, and everything elsewhere at once."""
    problems: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for columns in (4, MANY):
                for function in SOME:
                    x = x_of(columns)
                    function(x).sum().backward()
                    assert x.grad is not None
                    assert torch.equal(x.grad, masks[columns, id(function)])
        except BaseException as problem:
            problems.append(problem)

    masks = {(c, id(f)): mask_of(f, x_of(c)) for c in (4, MANY) for f in SOME}
    x = x_of()
    y = F.fake_tensor_quant(x, AMAX)
    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    workers.append(threading.Thread(target=lambda: y.sum().backward()))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not problems
    assert x.grad is not None and torch.equal(x.grad, (x.abs() <= 1).float())


# -- errors ----------------------------------------------------------------------------------------

X = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
WRONG: Any = 1.0
LIST: Any = [8]
ERRORS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "negative amax": (ValueError, "Negative values in amax", lambda: F.fake_tensor_quant(X, -AMAX)),
    "one negative amax": (
        *(ValueError, "Negative values in amax"),
        lambda: F.tensor_quant(X, torch.tensor([1.0, 1.0, -1e-45, math.nan])),
    ),
    "negative amax of e4m3": (ValueError, "Negative values in amax", lambda: F.scaled_e4m3(X, -AMAX)),
    "negative amax and another": (
        *(ValueError, "Negative values in amax"),
        lambda: F.tensor_quant(X.half(), torch.tensor([-1.0, 1e-6, 1.0, 1.0])),
    ),
    "unsigned": (TypeError, "Negative values encountered in unsigned", lambda: F.fake_tensor_quant(X, AMAX, 8, True)),
    "unsigned rows": (
        *(TypeError, "Negative values encountered in unsigned"),
        lambda: F.tensor_quant(X.expand(5, 4).t(), torch.ones(4, 1), 8, True),
    ),
    "unsigned with gradient": (
        *(TypeError, "Negative values encountered in unsigned"),
        lambda: F.fake_tensor_quant(X.clone().requires_grad_(), AMAX, 8, True),
    ),
    "negative amax with gradient": (
        *(ValueError, "Negative values in amax"),
        lambda: F.fake_tensor_quant(X.clone().requires_grad_(), -AMAX),
    ),
    "step of 0": (ValueError, "step_size must be positive", lambda: F.fake_quantize_affine(X, 0.0, 0, 0, 255)),
    "negative step": (
        *(ValueError, "step_size must be positive"),
        lambda: F.fake_quantize_affine(X, torch.tensor([1.0, 1.0, math.nan, -1e-45]), 0, 0, 255),
    ),
    "order of the codes": (ValueError, "lo must be below hi", lambda: F.fake_quantize_affine(X, 1.0, 0, 3, 3)),
    "order of the range": (ValueError, "min_range must not exceed", lambda: F.fake_affine_tensor_quant(X, 2.0, 1.0)),
    "amax of another shape": (ValueError, r"amax of shape \(3,\) does not", lambda: F.tensor_quant(X, torch.ones(3))),
    "amax of more axes": (
        *(ValueError, r"amax of shape \(2, 1, 1\) does not broadcast to inputs of shape \(1, 4\)"),
        lambda: F.fake_tensor_quant(X, torch.ones(2, 1, 1)),
    ),
    "an amax that would make it larger": (
        *(ValueError, r"amax of shape \(5, 4\) does not broadcast to inputs of shape \(1, 4\)"),
        lambda: F.fake_tensor_quant(X, torch.ones(5, 4)),
    ),
    "an empty amax": (ValueError, r"amax of shape \(0,\) does not", lambda: F.fake_tensor_quant(X, torch.ones(0))),
    "amax of blocks": (
        *(ValueError, r"amax of shape \(4,\) does not broadcast to the blocks of shape \(1, 2\)"),
        lambda: F.fake_tensor_quant(X, torch.ones(4), block_size=3),
    ),
    "amax of e4m3": (ValueError, r"amax of shape \(3,\) does not", lambda: F.scaled_e4m3(X, torch.ones(3))),
    "step": (ValueError, r"step_size of shape \(3,\)", lambda: F.fake_quantize_affine(X, torch.ones(3), 0, 0, 1)),
    "zero point": (
        ValueError,
        r"zero_point of shape \(3,\)",
        lambda: F.fake_quantize_affine(X, 1, torch.ones(3), 0, 1),
    ),
    "range": (ValueError, r"max_range of shape \(3,\)", lambda: F.fake_affine_tensor_quant(X, 0.0, torch.ones(3))),
    "integers": (TypeError, r"inputs must be float16.*got torch\.int64", lambda: F.fake_tensor_quant(X.long(), AMAX)),
    "truths": (TypeError, r"got torch\.bool", lambda: F.fake_tensor_quant(X > 0, AMAX)),
    "complex": (TypeError, r"got torch\.complex64", lambda: F.tensor_quant(X.to(torch.complex64), AMAX)),
    "integers, affine": (TypeError, r"got torch\.int64", lambda: F.fake_quantize_affine(X.long(), 1.0, 0, 0, 1)),
    "integers, range": (TypeError, r"got torch\.int64", lambda: F.fake_affine_tensor_quant(X.long(), 0.0, 1.0)),
    "integers, e4m3": (TypeError, r"got torch\.int64", lambda: F.scaled_e4m3(X.long())),
    "amax of integers": (
        *(TypeError, r"amax must be a floating-point tensor, got torch\.int64"),
        lambda: F.fake_tensor_quant(X, torch.tensor(1)),
    ),
    "no tensor": (TypeError, "inputs must be a tensor, got float", lambda: F.fake_tensor_quant(WRONG, AMAX)),
    "no tensor, affine": (
        TypeError,
        "inputs must be a tensor, got float",
        lambda: F.fake_quantize_affine(WRONG, 1, 0, 0, 1),
    ),
    "no tensor and no tensor": (TypeError, "inputs must be a tensor, got float", lambda: F.tensor_quant(WRONG, 1.0)),
    "no tensor, e4m3": (TypeError, "inputs must be a tensor, got float", lambda: F.scaled_e4m3(WRONG)),
    "bits": (ValueError, "num_bits must be between 0 and 32, got 33", lambda: F.fake_tensor_quant(X, AMAX, 33)),
    "bits that are no number": (TypeError, "num_bits must be an integer", lambda: F.fake_tensor_quant(X, AMAX, WRONG)),
    "bits without a hash": (TypeError, "num_bits must be an integer", lambda: F.fake_tensor_quant(X, AMAX, LIST)),
    "bits of a range": (ValueError, "num_bits must be at least 1", lambda: F.fake_affine_tensor_quant(X, 0.0, 1.0, 0)),
    "too many bits": (ValueError, "not exact in torch.float16", lambda: F.tensor_quant(X.half(), AMAX, 16)),
    "a scale too large": (ValueError, "scale is too large for FP16", lambda: F.tensor_quant(X.half(), AMAX * 1e-6)),
}
BLOCK_ERRORS: dict[str, Callable[[int], Any]] = {
    "fake": lambda size: F.fake_tensor_quant(X, AMAX, block_size=size),
    "fake rows": lambda size: F.fake_tensor_quant(X, torch.ones(1, 2), block_size=size),
    "with gradient": lambda size: F.fake_tensor_quant(X.clone().requires_grad_(), AMAX, block_size=size),
    "codes": lambda size: F.tensor_quant(X, AMAX, block_size=size),
    "e4m3": lambda size: F.scaled_e4m3(X, AMAX, block_size=size),
    "affine": lambda size: F.fake_quantize_affine(X, 1.0, 0, 0, 1, block_size=size),
}


@pytest.mark.parametrize(("kind", "message", "call"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize("call", BLOCK_ERRORS.values(), ids=BLOCK_ERRORS.keys())
def test_errors_of_blocks(call: Callable[[int], Any], size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size must be at least 1, got {size}"):
        call(size)


def test_parameters_with_more_axes_than_the_inputs() -> None:
    """A single value may have any number of them, whatever the others are."""
    x, one = torch.linspace(-1, 1, 8).reshape(2, 4), torch.ones(1, 1, 1)
    steps = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    wanted = F.fake_quantize_affine(x, steps.repeat_interleave(2, -1), 1, 0, 7)
    assert_same(F.fake_quantize_affine(x, steps, one, 0, 7, block_size=2), wanted)
    wanted = F.fake_quantize_affine(x, 0.1, steps.repeat_interleave(2, -1).round(), 0, 7)
    assert_same(F.fake_quantize_affine(x, one * 0.1, steps.round(), 0, 7, block_size=2), wanted)
    assert_same(F.fake_tensor_quant(x, one), F.fake_tensor_quant(x, 1.0))
    assert_same(F.fake_affine_tensor_quant(x, -one, steps[0, :1]), F.fake_affine_tensor_quant(x, -1.0, 0.1))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_tensors_with_empty_parameters(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    empty = torch.empty((*shape[:-1], shape[-1]))
    for block_size in (None, 1):
        assert F.fake_tensor_quant(x, empty, block_size=block_size).shape == shape
        assert F.tensor_quant(x, empty, block_size=block_size)[1].shape == shape
        assert F.scaled_e4m3(x, empty, block_size=block_size).shape == shape
        assert F.fake_quantize_affine(x, empty, 0, 0, 255, block_size=block_size).shape == shape
        assert F.fake_quantize_affine(x, 1.0, empty, 0, 255, block_size=block_size).shape == shape
    assert F.fake_affine_tensor_quant(x, empty, 1.0).shape == shape
