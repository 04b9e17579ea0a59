"""The CUDA engine against the reference, on a GPU where there is one, else in Triton's interpreter.

test_cuda_engine.py runs this file in a process of its own, as Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from qdq.formats import E2M1, E4M3, E5M2, FloatFormat, IntFormat
from qdq.kernels import cuda, reference, triton_elementwise, triton_histogram, triton_launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
INT8 = IntFormat(8)

pytestmark = [
    # The interpreter computes with NumPy, which warns where a GPU is silent.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
]


def adversarial(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Ties of every step of 1/8, ordinary, tiny and huge values, subnormal ones, both zeros, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator, dtype=torch.float64)
    values[::3] = torch.randint(-2100, 2100, (len(values[::3]),), generator=generator) / 16
    values[1::7] *= 10.0 ** torch.randint(-44, 38, (len(values[1::7]),), generator=generator)
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-40, 3.4e38, -3.4e38, 2.0**-24, 0.5, -0.5, 127.5]
    special += [0.49999997, -0.49999997, 8388607.5, 8388609.0, 1.0000001, 2.0**-25, -(2.0**-126), 65504.0, -255.5]
    values[: len(special)] = torch.tensor(special, dtype=torch.float64)
    return values[torch.randperm(n, generator=generator)].to(dtype)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    strides = [
        (a, b) for a, b, size in zip(actual.stride(), expected.stride(), expected.shape, strict=True) if size > 1
    ]
    assert not expected.numel() or all(have == want for have, want in strides)
    actual, nan = actual.cpu(), torch.isnan(expected)
    assert torch.equal(torch.isnan(actual), nan)
    kind = BITS[expected.element_size()]
    have, want = (value.masked_fill(nan, 0).contiguous().view(kind) for value in (actual, expected))
    assert torch.equal(have, want), f"{(have != want).sum()} of {have.numel()} differ"


def check(name: str, *arguments: object) -> None:
    """The function ``name`` of the engine gives the bits and the strides of the reference."""
    expected = getattr(reference, name)(*arguments)
    moved = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in arguments]
    actual = getattr(cuda, name)(*moved)
    if isinstance(expected, tuple):
        for have, want in zip(actual, expected, strict=True):
            assert_same(have, want)
    else:
        assert_same(actual, expected)


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@pytest.fixture(params=[False, True], ids=["division", "float64 inverse"])
def doubles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_elementwise, "has_fast_doubles", lambda device: request.param)


AMAX = [0.0, 2.0**-24, 2.0**-23, 0.3, 1.7, 127.0, 131.25, 1e-30, 1e30, 3.4e38, torch.inf, torch.nan]


@pytest.mark.parametrize("amax", AMAX)
@pytest.mark.usefixtures("doubles")
def test_symmetric_per_tensor(amax: float) -> None:
    x = adversarial(700)
    check("symmetric_fake_quantize", x, scalar(amax), INT8)
    check("symmetric_quantize", x, scalar(amax), IntFormat(8, narrow_range=True))
    check("symmetric_gradient", torch.randn(700), x, scalar(amax))


@pytest.mark.parametrize("fmt", [IntFormat(b, u) for b in (1, 2, 8, 25, 32) for u in (False, True)], ids=str)
def test_every_width_of_integers(fmt: IntFormat) -> None:
    for dtype in (torch.float32, torch.float64):
        check("symmetric_fake_quantize", adversarial(300, dtype), scalar(130.0, dtype), fmt)
        check("symmetric_quantize", adversarial(300, dtype), scalar(130.0, dtype), fmt)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype) -> None:
    x, grad = adversarial(400, dtype).view(4, 100), adversarial(400, dtype, seed=1).view(4, 100)
    amax = torch.tensor([[0.0], [0.7], [100.0], [3e4]])
    step, zero = torch.tensor(0.037), torch.tensor(3)
    check("symmetric_fake_quantize", x, amax.to(dtype), INT8)
    check("symmetric_quantize", x, amax, INT8)
    check("symmetric_gradient", grad, x, amax)
    check("symmetric_gradient", grad, x.float(), amax.double())
    check("affine_quantize", x, step, zero, 0, 255)
    check("affine_fake_quantize", x, step, zero, 0, 255)
    check("affine_gradient", grad, x, step, zero, 0, 255)
    check("range_fake_quantize", x, -amax, amax, 8)
    check("round_to_float_format", x, E4M3)
    check("scaled_float_fake_quantize", x, amax, E4M3)
    check("scaled_float_fake_quantize", x, None, E4M3)
    check("round_to_e8m0", x)


@pytest.mark.parametrize(("lo", "hi", "zero"), [(-128, 127, 0), (0, 255, 128), (0, 15, 15), (-8, 7, -8)])
@pytest.mark.usefixtures("doubles")
def test_affine(lo: int, hi: int, zero: int) -> None:
    x, grad = adversarial(350, seed=2), torch.randn(350)
    for step in (0.037, 1e-44, 3e36, torch.nan, torch.inf):
        parameters = (scalar(step), torch.tensor(zero, dtype=torch.int32), lo, hi)
        check("affine_fake_quantize", x, *parameters)
        check("affine_quantize", x, *parameters)
        check("affine_gradient", grad, x, *parameters)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int64, torch.float16])
def test_zero_points_of_any_dtype(kind: torch.dtype) -> None:
    check("affine_fake_quantize", adversarial(64), scalar(0.1), torch.tensor(3).to(kind), -128, 127)


@pytest.mark.parametrize("bits", [1, 2, 8, 16, 32])
@pytest.mark.usefixtures("doubles")
def test_range(bits: int) -> None:
    x = adversarial(300, seed=3)
    for low, high in ((-1.0, 3.0), (0.0, 0.0), (2.5, 2.5), (-3e38, 3e38), (torch.nan, 1.0), (0.1, 0.7)):
        check("range_fake_quantize", x, scalar(low), scalar(high), bits)


# Sizes of the tensor, axes in the order of memory, sizes of the parameter.
LAYOUTS = [
    ((3, 5, 40), (0, 1, 2), (3, 1, 1)),
    ((3, 5, 40), (0, 1, 2), (1, 5, 1)),
    ((3, 5, 40), (0, 1, 2), (40,)),
    ((2, 3, 2, 4), (0, 1, 2, 3), (3, 1, 1)),
    ((2, 3, 5, 7), (0, 2, 3, 1), (3, 1, 1)),
    ((2, 3, 5, 7), (3, 1, 0, 2), (1, 3, 1, 1)),
    ((40, 3, 16), (0, 1, 2), (3, 1)),
    ((1100, 3), (0, 1), (3,)),
    ((3, 700), (1, 0), (3, 1)),
    ((4, 6, 5), (0, 1, 2), (4, 1, 5)),
    ((4, 6, 5), (0, 1, 2), (4, 6, 5)),
    ((2, 2500), (0, 1), (2, 1)),
    ((5, 3), (0, 1), (1, 1, 1)),
    ((), (), (1, 1)),
    ((0, 3), (0, 1), (3,)),
]


def ordered(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same values in memory whose slowest axis is ``order[0]``."""
    back = [order.index(axis) for axis in range(len(order))]
    return values.permute(order).contiguous().permute(back)


@pytest.mark.parametrize(("shape", "order", "kept"), LAYOUTS)
def test_layouts(shape: tuple[int, ...], order: tuple[int, ...], kept: tuple[int, ...]) -> None:
    n = torch.Size(shape).numel()
    x = ordered(adversarial(n + 32)[:n].reshape(shape), order)
    amax = torch.rand(kept, generator=torch.Generator().manual_seed(4)) * 20 + 0.01
    zero = torch.arange(amax.numel()).reshape(kept) % 7
    check("symmetric_fake_quantize", x, amax, INT8)
    check("affine_fake_quantize", x, amax, zero, -9, 90)
    check("symmetric_gradient", torch.randn(shape), x, amax)


@pytest.mark.parametrize(("shape", "order", "kept"), [LAYOUTS[index] for index in (1, 2, 4, 7, 11)])
def test_layouts_of_64_bit_places(
    shape: tuple[int, ...], order: tuple[int, ...], kept: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_launch, "WIDE_FROM", 0)
    test_layouts(shape, order, kept)


def test_parameters_of_different_shapes() -> None:
    x = adversarial(240).view(4, 6, 10)
    step = torch.rand(6, 1) + 0.01
    check("affine_fake_quantize", x, step, torch.tensor(3), 0, 255)
    check("affine_fake_quantize", x, scalar(0.1), torch.arange(6).view(6, 1), 0, 255)
    check("affine_fake_quantize", x, step, torch.arange(4).view(4, 1, 1), 0, 255)
    check("affine_gradient", torch.randn(x.shape), x, step, torch.arange(10), 0, 255)
    check("range_fake_quantize", x, -step, torch.rand(4, 1, 1), 8)


@pytest.mark.parametrize("block_size", [4, 8])
def test_many_rows_of_short_blocks(block_size: int) -> None:
    x = torch.randn(64, 128)
    check("symmetric_fake_quantize", x, torch.rand(64, 128 // block_size) + 0.1, INT8, block_size)


@pytest.mark.parametrize("block_size", [1, 3, 32, 100])
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 70), (130,), (0, 64)])
def test_blocks(block_size: int, shape: tuple[int, ...]) -> None:
    n = torch.Size(shape).numel()
    x = adversarial(n + 32)[:n].reshape(shape)
    amax = torch.rand(*shape[:-1], -(-shape[-1] // block_size)) * 20
    check("symmetric_fake_quantize", x, amax, INT8, block_size)
    check("symmetric_fake_quantize", x, amax[..., :1], INT8, block_size)
    check("symmetric_gradient", torch.randn(shape), x, amax, block_size)
    if len(shape) > 1:
        turned = ordered(x, tuple(range(len(shape)))[::-1])
        check("scaled_float_fake_quantize", turned, amax, E2M1, block_size)
        check("affine_gradient", torch.randn(shape), turned, amax + 0.1, scalar(1.0), -8, 7, block_size)


def test_memory_that_is_not_dense() -> None:
    x = adversarial(600).view(20, 30)
    amax = torch.rand(20, 1) * 9
    for view in (x[:, ::2], x[3:9], x.t()[5:], x[:, :1].expand(20, 30), torch.imag(torch.complex(x, x).conj())):
        check("symmetric_fake_quantize", view, amax[: view.shape[0]] if view.shape[0] <= 20 else scalar(2.0), INT8)
        check("symmetric_gradient", torch.randn(view.shape).t().contiguous().t(), view, scalar(2.0))
        check("absmax", view, 0)
        check("abs_histogram", view, 0.5, 40)
    check("symmetric_fake_quantize", x, amax.flip(0).expand(20, 30), INT8)


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1], ids=lambda fmt: fmt.name)
@pytest.mark.usefixtures("doubles")
def test_float_formats(fmt: FloatFormat) -> None:
    exponents = torch.arange(-20, 18).repeat_interleave(64)
    x = (1 + torch.arange(64).repeat(38) / 64) * 2.0**exponents
    check("round_to_float_format", torch.cat([x, -x]), fmt)
    check("round_to_float_format", adversarial(500, torch.float64), fmt)
    for amax in AMAX:
        check("scaled_float_fake_quantize", adversarial(200), scalar(amax), fmt)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_e8m0(dtype: torch.dtype) -> None:
    powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
    check("round_to_e8m0", torch.cat([powers * factor for factor in (1.0, 1.25, 1.4999999, 1.5, 1.75, -1.0)]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 5000])
def test_gradients_with_sums(dtype: torch.dtype, n: int) -> None:
    # Integers have exact sums, in every order; the reference's own order of float64 is PyTorch's.
    x, grad = adversarial(n + 32, dtype)[:n], torch.randint(-9, 9, (n,)).to(dtype)
    for name in ("range_gradient", "clip_gradient"):
        check(name, grad, x, scalar(-0.5), scalar(0.5))
        check(name, grad, x, torch.full((1, 1), -2.0, dtype=torch.float64), scalar(torch.nan))
        check(name, grad[: n // 2].view(-1, 1), x[: n // 2].view(1, -1).t(), scalar(-1.0), scalar(3.0))


def test_sums_are_of_float64_and_repeat() -> None:
    x, grad = torch.linspace(-2, 2, 9000), torch.randn(9000) * 1e4
    arguments = [value.to(DEVICE) for value in (grad, x, scalar(-1.0, torch.float64), scalar(1.0, torch.float64))]
    first, second = cuda.clip_gradient(*arguments), cuda.clip_gradient(*arguments)
    exact = reference.clip_gradient(grad, x, scalar(-1.0, torch.float64), scalar(1.0, torch.float64))
    for have, again, want in zip(first, second, exact, strict=True):
        assert torch.equal(have, again)
        torch.testing.assert_close(have.cpu(), want, rtol=1e-12, atol=1e-9)


def test_what_goes_to_the_reference() -> None:
    x, grad = adversarial(60).view(3, 20), torch.randn(3, 20)
    check("symmetric_gradient", grad[:1], x, scalar(1.0))
    check("affine_gradient", grad[:1], x, scalar(0.1), scalar(0.0), -128, 127)
    check("range_gradient", grad.abs().round(), x, torch.tensor([[-1.0], [-2.0], [0.0]]), scalar(1.0))
    check("range_fake_quantize", x, scalar(-1.0), scalar(1.0), 0)
    check("histogram", torch.arange(20), 2.0, 0, 5)
    check("histogram", x, 0.25, 2**40, 5)
    check("abs_histogram", x.double(), 1e-305, 5)
    with pytest.raises(ValueError, match="clip values can only be scalar in training"):
        cuda.clip_gradient(grad, x, torch.zeros(3, 1), scalar(1.0))
    with pytest.raises(ValueError, match=r"amax of shape \(7,\) does not broadcast"):
        cuda.symmetric_fake_quantize(x.to(DEVICE), torch.ones(7), INT8)
    with pytest.raises(TypeError, match="inputs must be float16, bfloat16, float32 or float64"):
        cuda.absmax(torch.arange(3))
    with pytest.raises(ValueError, match="axis 2 is out of range for a tensor of 2 dimensions"):
        cuda.minmax(x, 2)
    with pytest.raises(ValueError, match="has no smallest and largest value"):
        cuda.minmax(x[:0])
    with pytest.raises(ValueError, match="width must be positive and finite"):
        cuda.histogram(x, 0.0, 0, 4)


REDUCED = [(300,), (3, 5, 20), (1100, 3), (3, 9), (1, 50), (4, 20, 2)]


@pytest.mark.parametrize("shape", REDUCED)
@pytest.mark.parametrize("least", [2**30, 0], ids=["32 bits", "64 bits"])
def test_extrema(shape: tuple[int, ...], least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "WIDE_FROM", least)
    n = torch.Size(shape).numel()
    # Without zeros: the sign of one among them is not defined.
    x = torch.randn(n, generator=torch.Generator().manual_seed(5)).reshape(shape)
    x.view(-1)[n // 3], x.view(-1)[n // 4], x.view(-1)[n // 2] = torch.inf, -torch.inf, -torch.nan
    for axis in (None, *range(len(shape))):
        check("absmax", x, axis)
        check("minmax", x, axis)


@pytest.mark.parametrize("factor", [1.0, -1.0, 1e-42, torch.inf])
def test_extrema_of_one_sign(factor: float) -> None:
    x = (torch.rand(40, 3) + 0.1) * factor
    for axis in (None, 1):
        check("absmax", x, axis)
        check("minmax", x, axis)


def test_extrema_of_many_values() -> None:
    x = torch.randn(20000)
    check("absmax", x)
    check("minmax", x)
    check("minmax", x.view(2, 10000), -2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extrema_of_other_dtypes_and_orders(dtype: torch.dtype) -> None:
    x = ordered(torch.randn(2, 3, 5, 7).to(dtype), (0, 2, 3, 1))
    for axis in (0, 1, 3):
        check("absmax", x, axis)
        check("minmax", x, axis)
    check("absmax", x[:0])
    check("absmax", x[:0], 1)
    check("absmax", x[:0], 0)
    check("absmax", x[0, 0, 0, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bins", [1, 33, 5000])
def test_histograms(dtype: torch.dtype, num_bins: int) -> None:
    x = adversarial(3000, dtype)
    check("abs_histogram", x, 0.125, num_bins)
    check("abs_histogram", x, 130.0 / num_bins, num_bins)
    for first in (-40, 1):
        check("histogram", x, 0.3, first, num_bins)


def test_histogram_edges() -> None:
    x = torch.arange(-60, 60, dtype=torch.float64) * 0.1
    x = torch.cat([x, x.nextafter(scalar(9.0).double()), x.nextafter(scalar(-9.0).double())])
    check("histogram", x, 0.1, -30, 55)
    largest = torch.tensor([float(x.abs().max())], dtype=torch.float64)
    check("abs_histogram", torch.cat([x, largest]), float(largest) / 7, 7)


def test_large_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "WIDE_FROM", 0)
    monkeypatch.setattr(triton_histogram, "_MANY", 0)
    check("abs_histogram", adversarial(40000), 0.5, 40)
    check("clip_gradient", torch.ones(5000), adversarial(5000), scalar(-1.0), scalar(1.0))


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_sizes_beyond_32_bits() -> None:
    x = torch.full((2**31 + 5,), 0.3, dtype=torch.bfloat16, device="cuda")
    x[-1] = 200.0
    assert float(cuda.absmax(x)) == 200.0
    assert float(cuda.symmetric_fake_quantize(x, torch.tensor(127.0), INT8)[-1]) == 127.0
    counts, outside, _ = cuda.abs_histogram(x, 0.25, 4)
    assert counts.tolist() == [0, 2**31 + 4, 0, 0] and int(outside) == 1
