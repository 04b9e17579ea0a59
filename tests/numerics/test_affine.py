"""Affine quantization against the float64 reference and against ONNX Runtime; E4M3 against a table of its values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qdq.functional as F
from numerics import float64_reference as reference
from numerics.strategies import inputs
from qdq.formats import E2M1, E4M3, E5M2
from qdq.kernels.reference import (
    affine_dequantize,
    affine_fake_quantize,
    affine_parameters,
    affine_quantize,
    round_to_float_format,
)

CODE_RANGES = ((0, 255), (-128, 127), (-127, 127), (0, 65535), (-32768, 32767), (0, 15), (0, 1))


@given(st.data(), st.sampled_from(CODE_RANGES), st.floats(1e-4, 10.0), st.floats(0, 1), st.booleans())
def test_affine_equals_the_reference(
    data: st.DataObject, limits: tuple[int, int], step: float, position: float, per_channel: bool
) -> None:
    lo, hi = limits
    x = data.draw(inputs())
    zero = round(lo + position * (hi - lo))
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    shape = [1] * (x.dim() - 1) + [x.shape[-1]] if per_channel and x.dim() else []
    steps = torch.full(shape, step)
    zeros = torch.full(shape, zero, dtype=torch.int32)
    # Exactly the division that float32 does; everything after it is exact.
    quotient = (wide / steps.to(wide.dtype)).to(torch.float64).numpy()
    expected = reference.affine_codes(quotient, np.array(1.0), np.array(float(zero)), lo, hi)
    codes = affine_quantize(x, steps, zeros, lo, hi)
    assert codes.dtype == wide.dtype
    np.testing.assert_array_equal(codes.numpy(), expected)
    fake = affine_fake_quantize(x, steps, zeros, lo, hi)
    assert fake.dtype == x.dtype
    torch.testing.assert_close(fake, affine_dequantize(codes, steps, zeros).to(x.dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(F.fake_quantize_affine(x, steps, zeros, lo, hi), fake, rtol=0, atol=0, equal_nan=True)
    finite = np.isfinite(expected)
    np.testing.assert_allclose(
        affine_dequantize(codes, steps, zeros).double().numpy()[finite],
        (expected[finite] - zero) * float(np.float32(step)),
        rtol=2e-7,
    )


@pytest.mark.parametrize("code", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("axis", [None, 1])
def test_affine_is_what_onnx_runtime_computes(code: str, axis: int | None) -> None:
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    dtype = np.dtype(code)
    lo, hi = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    generator = torch.Generator().manual_seed(0)
    size = () if axis is None else (6,)
    steps = torch.rand(size, generator=generator) * 0.1 + 0.01
    zeros = torch.randint(lo, hi + 1, size, generator=generator, dtype=torch.int32)
    x = torch.randn(2000, 6, generator=generator) * 5
    # Exact ties, and values far outside.
    width = hi - lo + 44
    ties = torch.arange(-width, width).unsqueeze(1).expand(-1, 6) + 0.5
    x = torch.cat([x, ties * steps, torch.tensor([[3e38] * 6, [-3e38] * 6])])

    attributes = {} if axis is None else {"axis": axis}
    initializers = [
        onnx.numpy_helper.from_array(steps.numpy(), "step"),
        onnx.numpy_helper.from_array(zeros.numpy().astype(dtype), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"], **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "qdq",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 6])],
        [
            helper.make_tensor_value_info("q", helper.np_dtype_to_tensor_dtype(dtype), [None, 6]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 6]),
        ],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    q, y = session.run(None, {"x": x.numpy()})
    np.testing.assert_array_equal(affine_quantize(x, steps, zeros, lo, hi).numpy(), q.astype(np.float32))
    np.testing.assert_array_equal(affine_fake_quantize(x, steps, zeros, lo, hi).numpy(), y)
    np.testing.assert_array_equal(F.fake_quantize_affine(x, steps, zeros, lo, hi).numpy(), y)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.sampled_from(CODE_RANGES))
def test_affine_parameters_represent_zero_and_cover_the_range(a: float, b: float, limits: tuple[int, int]) -> None:
    lo, hi = limits
    low, high = torch.tensor(min(a, b), dtype=torch.float64), torch.tensor(max(a, b), dtype=torch.float64)
    step, zero = affine_parameters(low, high, lo, hi)
    assert step.dtype == torch.float32
    assert zero.dtype == torch.int32
    assert lo <= int(zero) <= hi
    width = max(float(high), 0.0) - min(float(low), 0.0)
    if width / (hi - lo) < 2.0**-126:
        assert step == 1
    else:
        np.testing.assert_allclose(float(step), width / (hi - lo), rtol=1e-7)
        half = float(step) * 0.5001
        assert (lo - int(zero)) * float(step) <= min(float(low), 0.0) + half
        assert (hi - int(zero)) * float(step) >= max(float(high), 0.0) - half
    assert affine_dequantize(zero, step, zero) == 0


def test_affine_parameters_of_one_sided_zero_width_and_bad_ranges() -> None:
    low = torch.tensor([0.0, 2.0, -5.0, 0.0, float("nan"), -float("inf")])
    high = torch.tensor([255.0, 10.2, -1.0, 0.0, 1.0, 1.0])
    step, zero = affine_parameters(low, high, 0, 255)
    torch.testing.assert_close(step[:4], torch.tensor([1.0, 10.2 / 255, 5.0 / 255, 1.0]))
    assert zero[:4].tolist() == [0, 0, 255, 0]
    assert not step[4:].isfinite().any()
    marked = affine_fake_quantize(torch.tensor([0.0, 1.0]), step[4:], zero[4:], 0, 255)
    assert marked.isnan().all()


@given(st.data(), st.floats(-5, 5), st.floats(0.01, 10), st.integers(1, 16))
def test_published_affine_equals_the_reference(data: st.DataObject, low: float, width: float, bits: int) -> None:
    x = data.draw(inputs(dtypes=(torch.float64,)))
    high = low + width
    result = F.fake_affine_tensor_quant(x, low, high, bits)
    expected = reference.published_affine(x.numpy(), low, high, bits)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert F.fake_affine_tensor_quant(x.half(), low, high, bits).dtype == torch.float16


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_published_affine_of_a_zero_width_range_has_one_value(value: float) -> None:
    x = torch.tensor([0.0, -3.0, float("inf"), float("nan")])
    result = F.fake_affine_tensor_quant(x, value, value)
    torch.testing.assert_close(result, torch.tensor([value, value, value, float("nan")]), equal_nan=True)


def test_every_e4m3_value_and_every_midpoint() -> None:
    values = reference.e4m3_values()
    assert (values.max(), len(values)) == (E4M3.max_value, 253)
    middles = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, middles, middles * (1 + 1e-6), middles * (1 - 1e-6), [1e6, -1e6, np.inf, np.nan]])
    for dtype in (torch.float32, torch.float64):
        result = F.scaled_e4m3(torch.tensor(x, dtype=dtype))
        np.testing.assert_array_equal(
            result.double().numpy(), reference.e4m3_round(torch.tensor(x, dtype=dtype).numpy())
        )


def test_e4m3_equals_the_cast_of_pytorch_and_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = (torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 100).clamp(-448, 448)
    result = F.scaled_e4m3(x)
    assert torch.equal(result, x.to(torch.float8_e4m3fn).float())
    np.testing.assert_array_equal(result.numpy(), x.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    for fmt, kind in ((E5M2, ml_dtypes.float8_e5m2), (E2M1, ml_dtypes.float4_e2m1fn)):
        y = x.clamp(-fmt.max_value, fmt.max_value)
        np.testing.assert_array_equal(round_to_float_format(y, fmt).numpy(), y.numpy().astype(kind).astype(np.float32))
        assert fmt.num_bits == (8 if fmt is E5M2 else 4)


@given(st.data())
def test_e4m3_with_amax_scales(data: st.DataObject) -> None:
    x = data.draw(inputs(dtypes=(torch.float64,)))
    finite = x[x.isfinite()].abs()
    amax = finite.max() * 0.7 if finite.numel() else torch.tensor(1.0, dtype=torch.float64)
    scale = 448 / float(amax) if float(amax) > 2.0**-24 else 1.0
    expected = reference.e4m3_round(x.numpy() * scale) / scale
    if scale == 1.0:
        expected = np.where(np.isnan(x.numpy()), np.nan, 0.0)
    expected = np.where(np.abs(x.numpy()) < 2.0**-24, 0.0, expected)
    np.testing.assert_allclose(F.scaled_e4m3(x, amax).numpy(), expected, rtol=1e-12, atol=1e-30)


def test_e4m3_per_channel_small_and_bad_amax() -> None:
    x = torch.randn(3, 4, 5).transpose(0, 2)
    amax = x.abs().amax((0, 2), keepdim=True)
    result = F.scaled_e4m3(x, amax)
    for channel in range(4):
        assert torch.equal(result[:, channel], F.scaled_e4m3(x[:, channel], amax[0, channel, 0]))
    assert F.scaled_e4m3(torch.tensor([1e-9, 2.0**-25]), torch.tensor(1e-7)).tolist() == [0, 0]
    assert F.scaled_e4m3(torch.tensor([1.0]), torch.tensor(0.0)) == 0
    for bad in (float("nan"), float("inf")):
        assert F.scaled_e4m3(torch.tensor([1.0]), torch.tensor(bad)).isnan()
