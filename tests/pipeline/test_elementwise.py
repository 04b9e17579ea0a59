"""Ranges of what is read through an elementwise function: found by the error behind it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import qdq
from qdq.calib.collectors import HistogramCollector
from qdq.calib.ranges import affine_range
from qdq.calibration import functions_behind


class Gated(nn.Module):
    """A convolution whose output `function` reads."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "silu by hand": lambda x: x * torch.sigmoid(x),
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "with itself": lambda x: x + F.silu(x),
}


def quantized(model: nn.Module, **recipe: object) -> tuple[object, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    data = [8 * torch.randn(8, 4, 8, 8, generator=generator) for _ in range(2)]
    return qdq.quantize(model, data, recipe=qdq.Recipe(**recipe), progress=False), data  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_function_is_found(name: str) -> None:
    torch.manual_seed(0)
    qmodel, _ = quantized(Gated(FUNCTIONS[name]).eval())
    found = functions_behind(qmodel)["first.output_quantizer"]  # type: ignore[arg-type]
    x = torch.linspace(-8, 8, 201)
    torch.testing.assert_close(found(x), FUNCTIONS[name](x))


def test_none_is_found_where_the_tensor_is_read_as_it_is() -> None:
    for function in (lambda x: x, lambda x: x * x.mean((2, 3), keepdim=True), lambda x: x + x.flip(1)):
        qmodel, _ = quantized(Gated(function).eval())
        assert "first.output_quantizer" not in functions_behind(qmodel)  # type: ignore[arg-type]


def test_two_functions_of_a_tensor_are_none() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(F.silu(x)) + self.third(torch.tanh(x))

    qmodel, _ = quantized(Two().eval())
    assert hasattr(qmodel.first, "output_quantizer")  # type: ignore[attr-defined]
    assert "first.output_quantizer" not in functions_behind(qmodel)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(0.5, 20), shift=st.floats(-4, 4), seed=st.integers(0, 1000), symmetric=st.booleans())
def test_the_error_behind_the_function_is_no_larger(scale: float, shift: float, seed: int, symmetric: bool) -> None:
    x = shift + scale * torch.randn(4000, generator=torch.Generator().manual_seed(seed))
    seen = HistogramCollector()
    seen.collect(x)

    def error(low: float, high: float) -> float:
        # In float64, apart from the package: codes of 8 bits over the range, zero among them.
        lo, hi = (-128, 127) if symmetric else (0, 255)
        step = high / 127 if symmetric else (high - low) / 255
        zero = 0 if symmetric else round(-low / step)
        codes = torch.clamp(torch.round(x.double() / step) + zero, lo, hi)
        return float((F.silu((codes - zero) * step) - F.silu(x.double())).square().sum())

    through = affine_range(seen, "mse", symmetric=symmetric, through=F.silu)
    plain = affine_range(seen, "mse", symmetric=symmetric)
    # The histogram knows values up to its bins.
    assert error(*through) <= 1.1 * error(*plain) + 1e-6


def test_a_silu_takes_little_of_what_is_far_below_zero() -> None:
    seen = HistogramCollector()
    seen.collect(5 * torch.randn(20000, generator=torch.Generator().manual_seed(0)))
    low, high = affine_range(seen, "mse", through=F.silu)
    plain_low, plain_high = affine_range(seen, "mse")
    assert plain_low < -15 < -6 < low < -2
    assert math.isclose(high, plain_high, rel_tol=0.1)


def test_the_pipeline_gains_by_it_and_a_given_method_stays() -> None:
    torch.manual_seed(0)
    model = Gated(F.silu).eval()
    qmodel, data = quantized(model)
    with torch.no_grad():
        wanted = model(data[0])
    errors = {}
    for method in ("auto", "mse", "max"):
        qmodel, _ = quantized(model, calibration=method, algorithms=[])
        with torch.no_grad():
            errors[method] = float((qmodel(data[0]) - wanted).square().sum())  # type: ignore[operator]
    assert errors["auto"] < 0.95 * min(errors["mse"], errors["max"])
    one, _ = quantized(model, calibration="mse")
    low = (0 - one.first.output_quantizer.zero_point) * one.first.output_quantizer.step_size  # type: ignore[attr-defined]
    assert float(low) < -8
