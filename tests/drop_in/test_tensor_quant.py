"""`pytorch_quantization.tensor_quant`, statement by statement of its published contract."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pytorch_quantization import tensor_quant
from pytorch_quantization.tensor_quant import (
    FakeAffineTensorQuantFunction,
    FakeTensorQuantFunction,
    LegacyFakeTensorQuantFunction,
    QuantDescriptor,
    ScaledE4M3Function,
    ScaledQuantDescriptor,
    TensorQuantFunction,
    fake_affine_tensor_quant,
    fake_tensor_quant,
    legacy_fake_tensor_quant,
    scaled_e4m3,
)

SYMMETRIC = (
    *(tensor_quant.tensor_quant, fake_tensor_quant, legacy_fake_tensor_quant),
    *(TensorQuantFunction.apply, FakeTensorQuantFunction.apply, LegacyFakeTensorQuantFunction.apply),
)


def outputs_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    result = function(*args, **kwargs)
    return result[0] if isinstance(result, tuple) else result


def randn(*shape: int, seed: int = 12345) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- descriptors -----------------------------------------------------------------------------------


def test_the_two_names_of_the_descriptor_are_one_class() -> None:
    assert QuantDescriptor is ScaledQuantDescriptor is tensor_quant.QuantDescriptor


def test_defaults_of_the_descriptor() -> None:
    fields = {
        "num_bits": 8,
        "name": None,
        "fake_quant": True,
        "axis": None,
        "amax": None,
        "learn_amax": False,
        "scale_amax": None,
        "calib_method": "max",
        "unsigned": False,
        "narrow_range": False,
    }
    desc = QuantDescriptor()
    assert {key: getattr(desc, key) for key in fields} == fields
    assert QuantDescriptor(6, "conv1").dict() == {"num_bits": 6, "name": "conv1"}
    for key in fields:
        with pytest.raises(AttributeError):
            setattr(desc, key, fields[key])


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "negative", {"num_bits": -1}),
        (TypeError, "num_bits", {"num_bits": (5, 2)}),
        (TypeError, "num_bits", {"num_bits": (7, 3)}),
        (TypeError, "num_bits", {"num_bits": [4, 3]}),
        (TypeError, "num_bits", {"num_bits": 8.0}),
        (TypeError, "num_bits", {"num_bits": "8"}),
        (TypeError, "num_bits", {"num_bits": None}),
        (TypeError, "name", {"name": 5}),
        (TypeError, "amax must be float, list or ndarray", {"amax": 1}),
        (TypeError, "amax must be float, list or ndarray", {"amax": torch.tensor(1.0)}),
        (TypeError, "amax must be float, list or ndarray", {"amax": "1"}),
        (TypeError, "axis is ignored and must be None", {"axis": 0, "learn_amax": True}),
        (TypeError, "Unused keys", {"random": True}),
        (ValueError, "calib_method", {"calib_method": "entropi"}),
    ],
)
def test_the_descriptor_refuses(error: type[Exception], match: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        QuantDescriptor(**arguments)


def test_num_bits(caplog: pytest.LogCaptureFixture) -> None:
    for bits in range(1, 16):
        assert QuantDescriptor(bits).num_bits == bits
    assert QuantDescriptor((4, 3)).num_bits == (4, 3)
    assert QuantDescriptor(True).num_bits == 1
    assert not caplog.records
    assert QuantDescriptor(0).num_bits == 0
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.parametrize("amax", [2.5, [1.0, 2.0], np.array([[1.0], [2.0]]), np.float64(2.5)])
def test_amax_of_the_descriptor_is_a_float32_array(amax: Any) -> None:
    stored = QuantDescriptor(amax=amax).amax
    assert isinstance(stored, np.ndarray)
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, np.asarray(amax, np.float32))


@pytest.mark.parametrize("axis", [None, 0, 3, -1, (0,), (0, 1), (0, -1)])
def test_axis_is_kept_as_given(axis: Any) -> None:
    assert QuantDescriptor(axis=axis).axis == axis
    assert type(QuantDescriptor(axis=axis).axis) is type(axis)


OTHER_FIELDS: list[dict[str, Any]] = [
    {"num_bits": 7},
    {"num_bits": (4, 3)},
    {"name": "fc.weight"},
    {"fake_quant": False},
    {"axis": 0},
    {"axis": (0, 1)},
    {"amax": 1.5},
    {"amax": [1.0, 2.0]},
    {"learn_amax": True},
    {"scale_amax": 0.9},
    {"calib_method": "histogram"},
    {"unsigned": True},
    {"narrow_range": True},
]


@pytest.mark.parametrize("fields", OTHER_FIELDS, ids=str)
def test_equality_hash_text_and_round_trips(fields: dict[str, Any]) -> None:
    desc = QuantDescriptor(**fields)
    assert desc == QuantDescriptor(**fields)
    assert hash(desc) == hash(QuantDescriptor(**fields))
    others = [QuantDescriptor(**other) for other in [{}, *OTHER_FIELDS] if other != fields]
    assert all(desc != other for other in others)
    assert desc != fields
    assert desc != 8
    assert len(str(desc).splitlines()) == 1
    assert set(desc.dict()) == {"num_bits", "name", *fields}
    copies = [QuantDescriptor(**desc.dict()), QuantDescriptor.from_yaml(desc.to_yaml())]
    for again in (*copies, copy.deepcopy(desc), pickle.loads(pickle.dumps(desc))):
        assert again == desc


def test_a_tuple_axis_is_a_list_in_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(QuantDescriptor(axis=(0, 2)).to_yaml())["axis"] == [0, 2]
    assert QuantDescriptor.from_yaml("num_bits: 8\naxis: [0, 2]").axis == (0, 2)


def test_amax_is_compared_by_value() -> None:
    assert QuantDescriptor(amax=[1.0, 2.0]) == QuantDescriptor(amax=np.array([1.0, 2.0]))
    assert QuantDescriptor(amax=[1.0, 2.0]) != QuantDescriptor(amax=[1.0, 2.5])


def test_predefined_descriptors() -> None:
    assert QuantDescriptor(num_bits=8) == tensor_quant.QUANT_DESC_8BIT_PER_TENSOR
    assert QuantDescriptor(num_bits=8, unsigned=True) == tensor_quant.QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR
    names = [f"{kind}{n}D_WEIGHT_PER_CHANNEL" for kind in ("CONV", "CONVTRANSPOSE") for n in (1, 2, 3)]
    for name in [*names, "LINEAR_WEIGHT_PER_ROW"]:
        assert getattr(tensor_quant, f"QUANT_DESC_8BIT_{name}") == QuantDescriptor(num_bits=8, axis=(0))


# -- the symmetric functions -----------------------------------------------------------------------


def codes_by_definition(x: Tensor, amax: Tensor, bits: int, unsigned: bool, narrow: bool) -> tuple[Tensor, Tensor]:
    """The codes in float64, with the float32 product of input and scale that the definition rounds."""
    bound = 2.0 ** (bits - 1 + unsigned) - 1
    lowest = 0.0 if unsigned else -bound if narrow else -bound - 1
    scale = torch.full_like(amax, bound) / amax
    return (x * scale).double().round().clamp(lowest, bound), scale


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize(
    ("bits", "unsigned", "narrow"), [(8, False, True), (8, False, False), (8, True, False), (4, False, True)]
)
def test_codes_scale_and_fake_values(bits: int, unsigned: bool, narrow: bool, axis: int | None) -> None:
    x = randn(6, 7).abs() if unsigned else randn(6, 7)
    amax = x.abs().max() * 0.8 if axis is None else x.abs().amax(1 - axis, keepdim=True) * 0.8
    expected, scale = codes_by_definition(x, amax, bits, unsigned, narrow)
    codes, found = tensor_quant.tensor_quant(x, amax, bits, unsigned, narrow)
    assert torch.equal(codes.double(), expected)
    assert torch.equal(found, scale)
    by_keyword, _ = tensor_quant.tensor_quant(x, amax=amax, num_bits=bits, unsigned=unsigned, narrow_range=narrow)
    assert torch.equal(by_keyword, codes)
    fake = fake_tensor_quant(x, amax=amax, num_bits=bits, unsigned=unsigned, narrow_range=narrow)
    assert torch.equal(fake, codes / scale)
    turned = x.t().contiguous().t()
    for function in (fake_tensor_quant, legacy_fake_tensor_quant, LegacyFakeTensorQuantFunction.apply):
        assert torch.equal(function(x, amax, bits, unsigned, narrow), fake)
        assert torch.equal(function(turned, amax, bits, unsigned, narrow), fake)


def test_defaults_are_8_bits_signed_and_narrow() -> None:
    x = torch.tensor([-2.0, 2.0])
    for function in SYMMETRIC:
        assert torch.equal(
            outputs_of(function, x, torch.tensor(1.0)), outputs_of(function, x, torch.tensor(1.0), 8, False, True)
        )
    assert tensor_quant.tensor_quant(x, torch.tensor(1.0))[0].tolist() == [-127, 127]


def test_limits_and_rounding() -> None:
    x, amax = torch.tensor([-9.0, -1.5, -0.5, 0.5, 1.5, 2.5, 9.0]), torch.tensor(7.0)
    assert tensor_quant.tensor_quant(x, amax, 4)[0].tolist() == [-7, -2, 0, 0, 2, 2, 7]
    assert tensor_quant.tensor_quant(x, amax, 4, False, False)[0].tolist() == [-8, -2, 0, 0, 2, 2, 7]
    assert tensor_quant.tensor_quant(x.abs(), torch.tensor(15.0), 4, True)[0].tolist() == [9, 2, 0, 0, 2, 2, 9]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x, amax = randn(50).to(dtype), torch.tensor(1.7, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codes, scale = tensor_quant.tensor_quant(x, amax)
    expected, expected_scale = tensor_quant.tensor_quant(x.to(wide), amax.to(wide))
    assert codes.dtype == scale.dtype == dtype
    assert torch.equal(codes, expected.to(dtype))
    assert torch.equal(scale, expected_scale.to(dtype))
    fake = fake_tensor_quant(x, amax)
    assert fake.dtype == dtype
    assert torch.equal(fake, fake_tensor_quant(x.to(wide), amax.to(wide)).to(dtype))


@pytest.mark.parametrize("amax", [0.0, 1e-12, 2.0**-24])
def test_a_tiny_amax_gives_zeros_and_scale_1(amax: float) -> None:
    for dtype in (torch.float32, torch.float16):
        x = randn(4).to(dtype)
        codes, scale = tensor_quant.tensor_quant(x, torch.tensor(amax))
        assert codes.tolist() == [0] * 4
        assert scale == 1
        assert fake_tensor_quant(x, torch.tensor(amax)).tolist() == [0] * 4
    assert tensor_quant.tensor_quant(randn(4), torch.tensor(2.0**-23))[1] == 127 * 2.0**23


@pytest.mark.parametrize("function", SYMMETRIC)
def test_the_symmetric_functions_refuse(function: Callable[..., Any]) -> None:
    x = torch.tensor([1.0, -1.0])
    with pytest.raises(TypeError, match="Negative values encountered"):
        function(x, torch.tensor(1.0), 8, True)
    with pytest.raises(ValueError, match="Negative values in amax"):
        function(x, torch.tensor(-1.0))
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        function(x, torch.ones(3))


def test_float16_scale_overflow() -> None:
    x, amax = torch.ones(3, dtype=torch.float16), torch.tensor(0.0019, dtype=torch.float16)
    with pytest.raises(ValueError, match="scale is too large for FP16"):
        tensor_quant.tensor_quant(x, amax)
    assert tensor_quant.tensor_quant(x, torch.tensor(0.00194))[1] <= 65504
    for tiny in (0.0019, 1e-6, 6e-8, 0.0):
        assert fake_tensor_quant(x, torch.tensor(tiny, dtype=torch.float16)).isfinite().all()


# -- affine and E4M3 -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.1), (0.0, 2.0), (0.5, 1.5), (-2.0, -0.25)])
def test_affine_by_its_definition(bits: int, low: float, high: float) -> None:
    x = randn(64)
    minimum, maximum = torch.tensor(low), torch.tensor(high)
    width = maximum - minimum
    step = width / torch.full_like(width, 2.0**bits - 1)
    zero = torch.round(minimum / step) + 2 ** (bits - 1)
    codes = torch.clamp(torch.round(x / step) - zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    expected = (codes + zero) * step
    assert torch.equal(fake_affine_tensor_quant(x, minimum, maximum, bits), expected)
    assert torch.equal(FakeAffineTensorQuantFunction.apply(x, minimum, maximum, bits), expected)
    if bits == 8:
        assert torch.equal(fake_affine_tensor_quant(x, min_range=minimum, max_range=maximum), expected)


def e4m3_values() -> np.ndarray:
    """All that 4 exponent bits (bias 7) and 3 mantissa bits can say, without the code of NaN."""
    subnormal = np.arange(8) / 8 * 2.0**-6
    normal = [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)]
    positive = np.concatenate([subnormal, normal[:-1]])
    return np.concatenate([-positive[:0:-1], positive])


def test_e4m3_rounds_to_the_nearest_value_and_saturates() -> None:
    values = e4m3_values()
    assert values.max() == 448
    x = torch.cat([randn(500) * 50, randn(500) * 0.01, torch.tensor([448.0, 449.0, -1e9, 0.0])])
    nearest = values[np.abs(x.double().numpy()[:, None] - values).argmin(1)]
    for out in (scaled_e4m3(x), ScaledE4M3Function.apply(x, None), scaled_e4m3(x, None, 4, 3)):
        np.testing.assert_array_equal(out.numpy(), nearest.astype(np.float32))
    # Ties go to the even mantissa.
    assert scaled_e4m3(torch.tensor([17.0, 19.0, -17.0])).tolist() == [16, 20, -16]


def test_e4m3_with_amax() -> None:
    x = randn(3, 5, 2)
    for amax in (torch.tensor(2.0), x.abs().amax((0, 2), keepdim=True)):
        scale = torch.full_like(amax, 448.0) / amax
        assert torch.equal(scaled_e4m3(x, amax), scaled_e4m3(x * scale) / scale)
        turned = x.transpose(0, 2).contiguous().transpose(0, 2)
        assert torch.equal(scaled_e4m3(turned, amax), scaled_e4m3(x, amax))
    small = torch.tensor([2.0**-25, -(2.0**-25), 2.0**-24])
    assert scaled_e4m3(small, torch.tensor(2.0**-20)).tolist() == [0, 0, 2.0**-24]


@pytest.mark.parametrize(("E", "M"), [(5, 2), (4, 2), (3, 3)])
def test_other_float_formats_are_not_implemented(E: int, M: int) -> None:
    with pytest.raises(NotImplementedError):
        scaled_e4m3(randn(3), None, E, M)


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "arguments", "low", "high"),
    [
        *((f, (torch.tensor(1.5, requires_grad=True),), -1.5, 1.5) for f in SYMMETRIC),
        *((f, (torch.tensor(1.5), 8, False, False), -1.5, 1.5) for f in SYMMETRIC),
        *(
            (f, (torch.tensor(-0.5), torch.tensor(2.0)), -0.5, 2.0)
            for f in (fake_affine_tensor_quant, FakeAffineTensorQuantFunction.apply)
        ),
        *((f, (None,), -448.0, 448.0) for f in (scaled_e4m3, ScaledE4M3Function.apply)),
        *((f, (torch.tensor(1.5),), -1.5, 1.5) for f in (scaled_e4m3, ScaledE4M3Function.apply)),
    ],
)
def test_gradient_is_1_from_bound_to_bound(
    function: Callable[..., Any], arguments: tuple[Any, ...], low: float, high: float
) -> None:
    x = torch.tensor([2 * low - 1, low, 0.0, high, 2 * high + 1], requires_grad=True)
    outputs_of(function, x, *arguments).backward(torch.arange(1.0, 6.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 0]
    assert all(a.grad is None for a in arguments if isinstance(a, Tensor) and a.requires_grad)


def test_the_scale_has_no_gradient() -> None:
    codes, scale = tensor_quant.tensor_quant(torch.ones(3, requires_grad=True), torch.tensor(1.0))
    assert codes.requires_grad
    assert not scale.requires_grad


def test_the_classes_are_autograd_functions() -> None:
    with_symbolic = (TensorQuantFunction, FakeTensorQuantFunction, ScaledE4M3Function)
    for function in (*with_symbolic, LegacyFakeTensorQuantFunction, FakeAffineTensorQuantFunction):
        assert issubclass(function, torch.autograd.Function)
    for function in with_symbolic:
        assert callable(getattr(function, "symbolic", None)), function
