"""The functions at the door: errors, gradients, and every way in which PyTorch traces or transforms them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qdq.functional as F
from qdq.kernels import checks

AMAX = torch.tensor(1.0)
STEPS, ZEROS = torch.tensor([0.02, 0.01, 0.05, 0.02]), torch.tensor([128, 0, 255, 3], dtype=torch.int32)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor_quant": lambda x: F.tensor_quant(x, AMAX)[0],
    "fake_tensor_quant": lambda x: F.fake_tensor_quant(x, AMAX),
    "fake_tensor_quant per channel": lambda x: F.fake_tensor_quant(x, STEPS * 40, 4, False, False),
    "legacy_fake_tensor_quant": lambda x: F.legacy_fake_tensor_quant(x, AMAX),
    "fake_affine_tensor_quant": lambda x: F.fake_affine_tensor_quant(x, -0.5, 1.0),
    "scaled_e4m3": lambda x: F.scaled_e4m3(x),
    "scaled_e4m3 with amax": lambda x: F.scaled_e4m3(x, AMAX),
    "fake_quantize_affine": lambda x: F.fake_quantize_affine(x, 0.01, 100, 0, 255),
    "fake_quantize_affine per channel": lambda x: F.fake_quantize_affine(x, STEPS, ZEROS, 0, 255),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 4, generator=generator).requires_grad_()


# -- errors ----------------------------------------------------------------------------------------

SYMMETRIC = (F.tensor_quant, F.fake_tensor_quant, F.legacy_fake_tensor_quant)
every_symmetric = pytest.mark.parametrize("function", SYMMETRIC)
APPLIES = (
    F.TensorQuantFunction.apply,
    F.FakeTensorQuantFunction.apply,
    F.LegacyFakeTensorQuantFunction.apply,
)


@pytest.mark.parametrize("function", [*SYMMETRIC, *APPLIES])
def test_bad_values_are_refused(function: Callable[..., Tensor]) -> None:
    x = torch.tensor([1.0, -1.0, float("nan")])
    with pytest.raises(ValueError, match="Negative values in amax"):
        function(x, torch.tensor([1.0, -1.0, float("nan")]))
    with pytest.raises(TypeError, match="Negative values encountered in unsigned quantization"):
        function(x, AMAX, 8, True)
    with pytest.raises(ValueError, match=r"amax of shape \(2,\) does not broadcast to inputs of shape \(3,\)"):
        function(x, torch.ones(2))
    with pytest.raises(ValueError, match=r"amax of shape \(1, 3\) does not broadcast"):
        function(x, torch.ones(1, 3))


@every_symmetric
def test_bad_types_are_refused(function: Callable[..., Tensor]) -> None:
    x = torch.ones(3)
    with pytest.raises(TypeError, match="inputs must be float16, bfloat16, float32 or float64"):
        function(torch.ones(3, dtype=torch.int32), AMAX)
    with pytest.raises(TypeError, match="inputs must be a tensor, got list"):
        function([1.0], AMAX)
    with pytest.raises(TypeError, match="amax must be a floating-point tensor"):
        function(x, torch.tensor(1))
    with pytest.raises(TypeError, match="num_bits must be an integer"):
        function(x, AMAX, 8.5)
    with pytest.raises(ValueError, match="num_bits must be between 0 and 32"):
        function(x, AMAX, 33)
    with pytest.raises(ValueError, match="num_bits must be between 0 and 32"):
        function(x, AMAX, -1)


def test_apply_takes_tensors_only() -> None:
    with pytest.raises(TypeError, match="amax must be a tensor, got float"):
        F.FakeTensorQuantFunction.apply(torch.ones(3), 1.0)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 9), (torch.float16, 12), (torch.float32, 25)])
def test_a_bound_that_is_not_exact_is_refused(dtype: torch.dtype, most: int) -> None:
    x = torch.ones(3, dtype=dtype)
    for bits, unsigned in ((most, False), (most - 1, True)):
        assert F.tensor_quant(x, 1.0, bits, unsigned)[0].max() == 2 ** (most - 1) - 1
        with pytest.raises(ValueError, match=f"num_bits={bits + 1} gives the bound .* not exact in {dtype}"):
            F.tensor_quant(x, 1.0, bits + 1, unsigned)
        assert F.fake_tensor_quant(x, 1.0, bits + 1, unsigned).isfinite().all()


def test_float16_scale_overflow_is_refused() -> None:
    x = torch.ones(2, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"scale is too large for FP16 with amax=0\.001"):
        F.tensor_quant(x, torch.tensor([1.0, 0.001]))
    _, scale = F.tensor_quant(x, torch.tensor([1.0, 0.0]))  # zero counts as scale 1
    assert scale.tolist() == [127, 1]
    assert F.tensor_quant(x.bfloat16(), torch.tensor(0.001))[1].isfinite()


def test_other_functions_refuse_bad_arguments() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(NotImplementedError, match="only E=4 and M=3 are supported, got E=5 and M=2"):
        F.scaled_e4m3(x, None, 5, 2)
    with pytest.raises(ValueError, match="Negative values in amax"):
        F.scaled_e4m3(x, -1.0)
    with pytest.raises(ValueError, match="min_range must not exceed max_range"):
        F.fake_affine_tensor_quant(x, 1.0, 0.0)
    with pytest.raises(ValueError, match="num_bits must be at least 1"):
        F.fake_affine_tensor_quant(x, 0.0, 1.0, 0)
    with pytest.raises(ValueError, match=r"min_range of shape \(2,\) does not broadcast"):
        F.fake_affine_tensor_quant(x, torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="lo must be below hi, got lo=5 and hi=5"):
        F.fake_quantize_affine(x, 0.1, 0, 5, 5)
    for step in (0.0, -1.0):
        with pytest.raises(ValueError, match="step_size must be positive"):
            F.fake_quantize_affine(x, step, 0, 0, 255)
    with pytest.raises(ValueError, match=r"step_size of shape \(2,\) does not broadcast"):
        F.fake_quantize_affine(x, torch.ones(2), 0, 0, 255)
    with pytest.raises(ValueError, match=r"zero_point of shape \(2,\) does not broadcast"):
        F.fake_quantize_affine(x, 1.0, torch.ones(2), 0, 255)
    assert F.fake_quantize_affine(x, float("nan"), 0, 0, 255).isnan().all()


def test_checks_on_cuda_are_asynchronous_asserts() -> None:
    # Without a CUDA device: the operator exists for CPU tensors too, where it raises at once.
    good, bad = torch.tensor([1.0]), torch.tensor([-1.0])
    cuda, other = torch.device("cuda"), torch.device("mps")
    checks._refuse_if(lambda: good < 0, cuda, "too small", ValueError)
    with pytest.raises(RuntimeError, match="too small"):
        checks._refuse_if(lambda: bad < 0, cuda, "too small", ValueError)
    checks._refuse_if(lambda: bad < 0, other, "too small", ValueError)


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@every_symmetric
def test_symmetric_gradient_is_one_up_to_amax(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5, float("nan")], dtype=dtype, requires_grad=True)
    amax = torch.tensor(1.0, requires_grad=True)
    out = function(x, amax)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(torch.tensor([3.0, 4.0, 5.0, 6.0, float("inf"), 7.0], dtype=dtype))
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert x.grad.tolist() == [0, 4, 5, 6, 0, 0]
    assert amax.grad is None


def test_scale_has_no_gradient() -> None:
    x = torch.ones(3, requires_grad=True)
    _, scale = F.tensor_quant(x, AMAX)
    assert not scale.requires_grad


@pytest.mark.parametrize("enabled", [True, False])
def test_amax_gets_no_gradient_even_alone(enabled: bool) -> None:
    amax = torch.tensor(1.0, requires_grad=True)
    with torch.set_grad_enabled(enabled):
        out = F.fake_tensor_quant(torch.ones(3), amax)
    if out.requires_grad:
        assert torch.autograd.grad(out.sum(), amax, allow_unused=True) == (None,)


def test_other_gradients() -> None:
    x = torch.tensor([-1.5, -0.5, 0.0, 1.0, 1.5, 500.0], requires_grad=True)

    def gradient(out: Tensor) -> list[float]:
        return torch.autograd.grad(out.sum(), x)[0].tolist()

    assert gradient(F.fake_affine_tensor_quant(x, -0.5, 1.0)) == [0, 1, 1, 1, 0, 0]
    assert gradient(F.scaled_e4m3(x)) == [1, 1, 1, 1, 1, 0]
    assert gradient(F.scaled_e4m3(x, 1.0)) == [0, 1, 1, 1, 0, 0]
    # Codes 0..6 with zero point 2 and step 0.25: from -0.5 to 1.
    assert gradient(F.fake_quantize_affine(x, 0.25, 2, 0, 6)) == [0, 1, 1, 1, 0, 0]
    per_channel = F.fake_quantize_affine(x.reshape(2, 3), torch.tensor([[0.25], [1.0]]), torch.tensor([[2], [0]]), 0, 6)
    assert gradient(per_channel) == [0, 1, 1, 1, 1, 0]


@every_function
def test_second_derivative_is_zero(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    (first,) = torch.autograd.grad((function(x) * x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    # d/dx (q + x q') with q' and x' straight through: 2 inside, 0 outside.
    assert set(second.tolist()[0]) <= {0.0, 1.0, 2.0}


# -- tracing and transforms ------------------------------------------------------------------------


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.grad(function(x).sum(), x)[0]


@every_function
# PyTorch's own compiler instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_one_graph(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), function(x))
    assert torch.equal(gradient_of(compiled, x), gradient_of(function, x))
    with torch.no_grad():
        assert torch.equal(compiled(x), function(x))


class Wrapped(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@every_function
def test_exports_with_a_dynamic_batch(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    example = (x.detach(),)
    program = torch.export.export(Wrapped(function), example, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    longer = torch.cat([x, x, x]).detach()
    assert torch.equal(program.module()(longer), function(longer))


def test_meta_tensors() -> None:
    x = torch.empty(5, 4, dtype=torch.bfloat16, device="meta")
    column = torch.empty(4, device="meta")
    codes, scale = F.tensor_quant(x, column, 8, True)
    assert (codes.shape, codes.dtype, codes.device.type) == (x.shape, x.dtype, "meta")
    assert (scale.shape, scale.dtype) == (column.shape, x.dtype)
    for out in (
        F.fake_tensor_quant(x, column),
        F.fake_affine_tensor_quant(x, -1.0, 1.0),
        F.scaled_e4m3(x, column),
        F.fake_quantize_affine(x, column, column, 0, 255),
    ):
        assert (out.shape, out.dtype, out.device.type) == (x.shape, x.dtype, "meta")


@every_function
def test_transforms_of_torch_func(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    expected = gradient_of(function, x)
    assert torch.equal(torch.func.grad(lambda t: function(t).sum())(x), expected)
    assert torch.equal(torch.func.vmap(function)(x), function(x))
    assert torch.equal(torch.func.vmap(torch.func.grad(lambda t: function(t).sum()))(x), expected)


def test_vmap_over_amax() -> None:
    x, amax = torch.randn(5), torch.tensor([0.5, 1.0, 2.0])
    result = torch.func.vmap(F.fake_tensor_quant, in_dims=(None, 0))(x, amax)
    assert torch.equal(result, torch.stack([F.fake_tensor_quant(x, a) for a in amax]))


# PyTorch's forward mode compiles its decompositions with TorchScript.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_is_refused_rather_than_zero() -> None:
    x = torch.randn(5)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda t: F.fake_tensor_quant(t, AMAX), (x,), (x,))


def test_checks_do_not_run_while_compiling() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda x, a: F.fake_tensor_quant(x, a, 8, True), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert compiled(torch.tensor([-1.0, 0.5]), torch.tensor(1.0)).tolist()[0] == 0
