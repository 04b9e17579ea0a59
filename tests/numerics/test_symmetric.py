"""The symmetric functions against the float64 reference, and the worked example to the digit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import qdq.functional as F
from numerics import float64_reference as reference
from numerics.strategies import amax_for, inputs
from qdq.formats import IntFormat
from qdq.kernels.reference import symmetric_quantize

EXACT_BITS = {torch.float16: 12, torch.bfloat16: 9, torch.float32: 25, torch.float64: 54}


def as_array(x: Tensor) -> np.ndarray:
    return x.detach().to(torch.float64).numpy()


def assert_codes_agree(codes: np.ndarray, expected: reference.Codes, exact: bool) -> None:
    """Equal, but for float32 values so near a tie that their product with the scale may round to the other side."""
    np.testing.assert_array_equal(np.isnan(codes), np.isnan(expected.codes))
    size = np.maximum(np.abs(expected.codes), 1.0)
    clear = np.full(codes.shape, True) if exact else expected.tie_distance > 4e-7 * size
    number = ~np.isnan(expected.codes)
    np.testing.assert_array_equal(codes[clear & number], expected.codes[clear & number])
    assert (np.abs(codes - expected.codes)[number] <= 1).all()


@given(st.data(), st.integers(1, 16), st.booleans(), st.booleans())
def test_codes_and_scale_equal_the_reference(data: st.DataObject, bits: int, unsigned: bool, narrow: bool) -> None:
    x = data.draw(inputs(non_negative=unsigned))
    assume(bits + unsigned <= EXACT_BITS[x.dtype])
    amax = data.draw(amax_for(x))
    expected = reference.quantize(as_array(x), as_array(amax), bits, unsigned, narrow)
    if x.dtype == torch.float16 and (expected.scale > 65504).any():
        with pytest.raises(ValueError, match="scale is too large for FP16 with amax="):
            F.tensor_quant(x, amax, bits, unsigned, narrow)
        return
    codes, scale = F.tensor_quant(x, amax, bits, unsigned, narrow)
    assert codes.dtype == x.dtype
    assert scale.dtype == x.dtype
    assert codes.shape == x.shape
    assert scale.shape == amax.shape
    assert_codes_agree(as_array(codes), expected, exact=x.dtype == torch.float64)
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-7, torch.float16: 1e-3, torch.bfloat16: 4e-3}[x.dtype]
    finite = np.isfinite(as_array(amax)) | (expected.scale == 1)
    np.testing.assert_allclose(as_array(scale)[finite], expected.scale[finite], rtol=tolerance)
    if bits > 1 or unsigned:
        assert np.isnan(as_array(scale)[~finite]).all()


@given(st.data(), st.integers(1, 16), st.booleans(), st.booleans())
def test_fake_quantization_equals_the_reference(data: st.DataObject, bits: int, unsigned: bool, narrow: bool) -> None:
    x = data.draw(inputs(non_negative=unsigned))
    amax = data.draw(amax_for(x))
    expected = reference.quantize(as_array(x), as_array(amax), bits, unsigned, narrow)
    outputs = F.fake_tensor_quant(x, amax, bits, unsigned, narrow)
    assert outputs.dtype == x.dtype
    assert outputs.shape == x.shape
    # Dequantized in float64, the outputs are the codes again.
    wide = x.to(torch.float32 if x.dtype != torch.float64 else torch.float64)
    exact = as_array(F.fake_tensor_quant(wide, amax, bits, unsigned, narrow))
    with np.errstate(invalid="ignore"):
        codes = np.rint(exact * expected.scale)
    assert_codes_agree(codes, expected, exact=x.dtype == torch.float64)
    # 16-bit outputs are the wide ones, cast once.
    np.testing.assert_array_equal(as_array(outputs), as_array(torch.from_numpy(exact).to(wide.dtype).to(x.dtype)))


@given(st.data(), st.integers(1, 16), st.booleans(), st.booleans())
def test_legacy_is_equal_bit_for_bit(data: st.DataObject, bits: int, unsigned: bool, narrow: bool) -> None:
    x = data.draw(inputs(non_negative=unsigned))
    amax = data.draw(amax_for(x))
    torch.testing.assert_close(
        F.legacy_fake_tensor_quant(x, amax, bits, unsigned, narrow),
        F.fake_tensor_quant(x, amax, bits, unsigned, narrow),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@given(st.data(), st.integers(2, 16))
def test_fake_is_codes_over_scale_in_float32(data: st.DataObject, bits: int) -> None:
    x = data.draw(inputs(dtypes=(torch.float32,)))
    amax = data.draw(amax_for(x))
    codes, scale = F.tensor_quant(x, amax, bits)
    torch.testing.assert_close(F.fake_tensor_quant(x, amax, bits), codes / scale, rtol=0, atol=0, equal_nan=True)


def test_worked_example() -> None:
    torch.manual_seed(12345)
    x = torch.rand(10)
    codes, scale = F.tensor_quant(x, x.abs().max())
    assert codes.tolist() == [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]
    assert f"{scale.item():.4f}" == "128.0057"
    fake = [f"{v:.4f}" for v in F.fake_tensor_quant(x, x.abs().max()).tolist()]
    assert fake == "0.9843 0.8828 0.9921 0.4609 0.0859 0.1797 0.3672 0.5703 0.3359 0.2109".split()


def test_scale_is_a_true_division() -> None:
    amax = torch.linspace(0.01, 10, 10_000)
    _, scale = F.tensor_quant(torch.zeros(10_000), amax)
    expected = np.float32(127) / amax.numpy()
    np.testing.assert_array_equal(scale.numpy(), expected)
    assert (scale != amax.reciprocal() * 127).any(), "the data cannot tell the two apart"


def test_ties_round_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    codes, _ = F.tensor_quant(x, torch.tensor(127.0))
    assert codes.tolist() == [0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize(
    ("unsigned", "narrow", "lowest"), [(False, True, -127), (False, False, -128), (True, True, 0), (True, False, 0)]
)
def test_limits(unsigned: bool, narrow: bool, lowest: int) -> None:
    fmt = IntFormat(8, unsigned, narrow)
    codes, _ = symmetric_quantize(torch.tensor([-1e9, 1e9]), torch.tensor(1.0), fmt)
    assert codes.tolist() == [lowest, 255 if unsigned else 127]
    assert (fmt.lo, fmt.hi, fmt.bound) == (lowest, codes[1], codes[1])


@pytest.mark.parametrize(("bits", "unsigned"), [(0, False), (0, True), (1, False)])
def test_without_a_positive_bound_everything_is_zero(bits: int, unsigned: bool) -> None:
    x = torch.tensor([0.0, 3.0, float("inf"), float("nan")])
    codes, scale = F.tensor_quant(x, torch.tensor(1.0), bits, unsigned)
    torch.testing.assert_close(codes, torch.tensor([0.0, 0.0, 0.0, float("nan")]), equal_nan=True)
    assert scale == 1
    fake = F.fake_tensor_quant(x, torch.tensor(1.0), bits, unsigned)
    torch.testing.assert_close(fake, codes, equal_nan=True)


def test_unsigned_one_bit_has_two_codes() -> None:
    codes, scale = F.tensor_quant(torch.tensor([0.0, 0.4, 0.6, 2.0]), torch.tensor(1.0), 1, True)
    assert codes.tolist() == [0, 0, 1, 1]
    assert scale == 1


@pytest.mark.parametrize("amax", [0.0, 1e-9, 2.0**-24])
def test_tiny_amax_counts_as_zero(amax: float) -> None:
    x = torch.tensor([1.0, -1e-9, float("inf"), -float("inf"), float("nan")])
    codes, scale = F.tensor_quant(x, torch.tensor(amax))
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, float("nan")])
    torch.testing.assert_close(codes, expected, equal_nan=True)
    assert scale == 1
    torch.testing.assert_close(F.fake_tensor_quant(x, torch.tensor(amax)), expected, equal_nan=True)


@pytest.mark.parametrize("amax", [float("nan"), float("inf")])
def test_amax_that_is_not_finite_marks_its_values_only(amax: float) -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    column = torch.tensor([[amax], [2.0]])
    codes, scale = F.tensor_quant(x, column)
    assert codes[0].isnan().all()
    assert codes[1].tolist() == [64, 127]
    assert scale[0].isnan()
    fake = F.fake_tensor_quant(x, column)
    assert fake[0].isnan().all()
    assert fake[1].isfinite().all()


def test_float16_fake_quantization_of_a_tiny_amax_stays_finite() -> None:
    x = torch.tensor([1e-5, -1e-5], dtype=torch.float16)
    fake = F.fake_tensor_quant(x, torch.tensor(1e-5, dtype=torch.float16))
    assert fake.isfinite().all()
    torch.testing.assert_close(fake, x)


def test_numbers_are_taken_as_amax() -> None:
    x = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(F.fake_tensor_quant(x, 1.5), F.fake_tensor_quant(x, torch.tensor(1.5)), rtol=0, atol=0)


def test_inputs_are_not_changed() -> None:
    x = torch.randn(4, 5)
    before = x.clone()
    amax = torch.tensor(1.0)
    F.tensor_quant(x, amax)
    F.fake_tensor_quant(x, amax)
    F.fake_affine_tensor_quant(x, -1.0, 1.0)
    F.fake_quantize_affine(x, 0.1, 3, 0, 255)
    F.scaled_e4m3(x, amax)
    assert torch.equal(x, before)
    assert amax == 1
