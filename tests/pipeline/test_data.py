"""Data at the door of `quantize` and `verify`: what is taken, and how bad data are answered."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import qdq
from pipeline.helpers import deploy, quantize, randn
from qdq.analysis.fidelity import Fidelity


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Rooted(Tiny):
    """NaN arises inside the model where an input is negative."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x).sqrt()))


class Scaled(Tiny):
    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale


X = randn(32, 6, seed=1)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="module")
def ranges(tiny: Tiny) -> dict[str, Tensor]:
    """What calibration on X gives, however it is split: the reference of the tests below."""
    return states(quantize(tiny, [X]))


def states(model: nn.Module) -> dict[str, Tensor]:
    return {n: v for n, v in model.state_dict().items() if n.endswith(("step_size", "zero_point"))}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def _generator() -> Iterator[Tensor]:
    yield from X.split(8)


def _run(model: Callable[..., Any]) -> None:
    for part in X.split(8):
        model(part)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: list(X.split(8)), id="list"),
        pytest.param(_generator, id="generator"),
        pytest.param(lambda: [{"x": part} for part in X.split(4)], id="dicts"),
        pytest.param(lambda: [part.numpy() for part in X.split(8)], id="numpy"),
        pytest.param(lambda: DataLoader(TensorDataset(X, torch.arange(32)), batch_size=8), id="loader with labels"),
        pytest.param(lambda: DataLoader(TensorDataset(X), batch_size=5), id="loader with a short last batch"),
        pytest.param(lambda: _run, id="callable"),
        pytest.param(lambda: list(X.split(1)), id="single samples"),
    ],
)
def test_every_kind_of_data_calibrates_alike(tiny: Tiny, ranges: dict[str, Tensor], data: Callable[[], Any]) -> None:
    assert_equal(states(quantize(tiny, data())), ranges)


def test_inputs_of_serves_quantize_and_verify(tiny: Tiny, ranges: dict[str, Tensor], tmp_path: Path) -> None:
    batches = [{"pixels": part, "other": 1} for part in X.split(8)]
    qmodel = quantize(tiny, batches, inputs_of=lambda b: b["pixels"])
    assert_equal(states(qmodel), ranges)
    path = qdq.export_onnx(qmodel, tmp_path / "m.onnx")
    fidelity = qdq.verify(qmodel, path, batches, inputs_of=lambda b: b["pixels"], progress=False)
    assert fidelity.samples == 32


def test_keyword_arguments_and_callable_data_go_through_export_and_verify(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scale = torch.full((32, 1), 2.0)

    def run(model: Callable[..., Any]) -> None:
        assert model(x=X, scale=scale).shape == (32, 3)

    class Verdict(Exception):
        pass

    def seen_by_quantize(model: Callable[..., Any]) -> None:
        try:
            model(X, scale=scale)
        except Exception as error:  # what looks at the first call must pass such a handler
            raise Verdict from error

    model = Scaled().eval()
    deployed = deploy(model, seen_by_quantize, tmp_path / "m.onnx")
    assert deployed.fidelity.samples == 32 and deployed.fidelity.sqnr_db > 60
    fidelity = qdq.verify(deployed.qmodel, deployed.path, run, progress=False)
    assert isinstance(fidelity, Fidelity) and fidelity.samples == 32


def test_a_data_function_that_never_runs_the_model_is_refused(tiny: Tiny) -> None:
    message = "data function ran the model not once: it must call the model that it is given"
    with pytest.raises(qdq.DataError, match=message):
        quantize(tiny, lambda model: None)
    with pytest.raises(qdq.DataError, match=message):
        quantize(tiny, lambda model: None, example_inputs=X)


def test_example_inputs_are_not_calibrated_on(tiny: Tiny, ranges: dict[str, Tensor]) -> None:
    assert_equal(states(quantize(tiny, [X], example_inputs=1000 * X)), ranges)
    assert_equal(states(quantize(tiny, [X], example_inputs=({"x": X[:1]}))), ranges)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (randn(4, 7), r"input 'x' has shape [4, 7], the model was captured for [any, 6]"),
        (randn(4, 6, 1), r"input 'x' has shape [4, 6, 1], the model was captured for [any, 6]"),
        (X.double(), r"input 'x' has dtype torch.float64, the model was captured for torch.float32"),
        (X[:0], r"input 'x' holds an empty batch, of shape [0, 6]"),
        (torch.where(X > 2, torch.nan, X), r"input 'x' holds NaN: clean the data first"),
    ],
)
def test_a_later_batch_that_does_not_fit_is_refused(tiny: Tiny, second: Tensor, message: str) -> None:
    with pytest.raises(qdq.DataError, match=re.escape(message)):
        quantize(tiny, [X, second])


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], qdq.DataError, "batches holds no batch"),
        (X, qdq.DataError, "one array of shape (32, 6): pass a list"),
        ({"x": X}, qdq.DataError, "one dict of inputs is passed as [inputs]"),
        ([X[:0]], qdq.DataError, "an example input of shape (0, 6) holds an empty batch"),
        ([(3,)], qdq.DataError, "example inputs hold no tensor"),
        ([X[:, :5]], qdq.CaptureError, "the model does not run on the example inputs: RuntimeError: mat1 and mat2"),
        ([X.long()], qdq.CaptureError, "the model does not run on the example inputs"),
    ],
)
def test_a_first_batch_that_does_not_fit_is_refused(tiny: Tiny, data: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        quantize(tiny, data)


def test_a_model_that_does_not_run_is_answered_with_its_line(tiny: Tiny) -> None:
    with pytest.raises(qdq.CaptureError, match=r"test_data\.py:\d+, in forward\n\s+return self\.second"):
        quantize(tiny, [X[:, :5]])


def test_nan_in_the_first_batch_is_refused(tiny: Tiny) -> None:
    with pytest.raises(qdq.DataError, match="input 'x' holds NaN"):
        quantize(tiny, [torch.full((4, 6), torch.nan)])


def test_an_infinite_input_is_refused_by_the_quantizer_that_meets_it(tiny: Tiny) -> None:
    with pytest.raises(qdq.DataError, match="24 NaN or infinite values in the tensor of quantizer 'x_quantizer'"):
        quantize(tiny, [X, torch.full((4, 6), torch.inf)])


@pytest.mark.parametrize("method", ["max", "mse"])
def test_nan_that_arises_inside_names_the_first_quantizer(method: str) -> None:
    torch.manual_seed(0)
    model = Rooted().eval()
    with pytest.raises(qdq.DataError, match="NaN or infinite values in the tensor of quantizer 'relu_quantizer'"):
        quantize(model, [X], recipe=qdq.Recipe(calibration=method))


def test_other_arguments_than_in_the_first_batch_are_refused() -> None:
    class Optional(Tiny):
        def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
            y = super().forward(x)
            return y if bias is None else y + bias

    message = r"batch 1: a batch gives other arguments.* did: \(Tensor\[32, 6\], Tensor\[32, 3\]\) in place of "
    with pytest.raises(qdq.DataError, match=message):
        quantize(Optional().eval(), [X, (X, randn(32, 3))])


def test_a_part_that_no_data_reach_is_named() -> None:
    """Half of a batch of one sample is empty: the second linear sees no values."""

    class Halves(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            middle = x.shape[0] // 2
            return torch.cat([self.second(self.first(x[middle:])), self.second(self.first(x[:middle]).tanh())])

    with pytest.raises(qdq.CalibrationError, match=r"quantizers saw no data: .*; calibrate with data that reach these"):
        quantize(Halves().eval(), [X[:1]], example_inputs=X)


def test_collectors_are_gone_and_constants_on_again_after_a_failure(tiny: Tiny) -> None:
    from qdq.calibration import collect

    qmodel = quantize(tiny, [X])
    with pytest.raises(qdq.DataError), torch.no_grad():
        collect(qmodel, lambda model: model(torch.full((1, 6), torch.nan)), False)
    assert all(m.enabled for m in qmodel.modules() if hasattr(m, "enabled"))


@pytest.mark.parametrize("model", [None, "model.pt", Tiny])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(qdq.QdqError, match=f"model must be a torch.nn.Module, not {type(model).__name__}"):
        quantize(model, [X])
