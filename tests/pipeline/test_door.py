"""What users do wrong, or in their own way, at the door of `quantize`: how it is taken, or how it is answered."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdq
from pipeline.helpers import quantize, randn
from qdq.batches import Batches, signature_of
from qdq.calibration import collect
from qdq.graph.capture import capture
from qdq.graph.record import record_of

X, Y, LABEL = randn(6, 4), randn(6, 4, seed=1), torch.arange(6)


class Model(nn.Module):
    """A linear, and a `forward` that each test writes."""

    def __init__(self, forward: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)
        self.width = 4
        if forward is not None:
            self.written = forward
            signature = inspect.signature(forward)
            parameters = list(signature.parameters.values())[1:]

            def bound(*args: Any, **kwargs: Any) -> Any:
                return self.written(self, *args, **kwargs)

            bound.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
            self.forward = bound

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        twin = Model(getattr(self, "written", None))
        twin.load_state_dict(self.state_dict())
        return twin

    def forward(self, x: Tensor) -> Any:
        return self.fc(x)


def pair(self: Model, a: Tensor, b: Tensor) -> Tensor:
    return self.fc(a) + self.fc(b)


def optional(self: Model, x: Any, y: Any = None) -> Tensor:
    return self.fc(x) if y is None else self.fc(x) + y.sum()


def listed(self: Model, x: Any, y: Any = None) -> Tensor:
    return self.fc(x[0]) + self.fc(x[1]) if isinstance(x, (tuple, list)) else self.fc(x)


def one_batch(self: Model, batch: Any) -> Tensor:
    return self.fc(batch["pixels"]) * batch["scale"]


def keywords(self: Model, x: Tensor, **more: Tensor) -> Tensor:
    return self.fc(x) + self.fc(more["y"])


def with_number(self: Model, x: Tensor, k: Any = 1) -> Tensor:
    return self.fc(x) * 2 if k == 3 else self.fc(x)


# --- batches that forward could take in two ways -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "batch", "names"),
    [
        (pair, ((X, Y), LABEL), ["a", "b"]),
        (pair, [[X, Y], LABEL], ["a", "b"]),
        (pair, ({"a": X, "b": Y}, LABEL), ["a", "b"]),
        (pair, ({"b": X, "a": Y}, LABEL), ["a", "b"]),
        (optional, ({"x": X}, LABEL), ["x"]),
        (optional, ((X, Y), LABEL), ["x", "y"]),
        (one_batch, ({"pixels": X, "scale": Y[:, :1]}, LABEL), ["batch_pixels", "batch_scale"]),
        (one_batch, {"pixels": X, "scale": Y[:, :1]}, ["batch_pixels", "batch_scale"]),
        (keywords, {"x": X, "y": Y}, ["x", "y"]),
    ],
)
def test_the_reading_that_the_model_runs_on_is_meant(forward: Any, batch: Any, names: list[str]) -> None:
    model = Model(forward)
    qmodel = quantize(model, [batch, batch])
    assert record_of(qmodel).contract.names == names


def test_verify_reads_batches_as_quantize_did(tmp_path: Path) -> None:
    qmodel = quantize(Model(pair), [((X, Y), LABEL)])
    path = qdq.export_onnx(qmodel, tmp_path / "m.onnx")
    fidelity = qdq.verify(qmodel, path, [((X, Y), LABEL), ((X[:2], Y[:2]), LABEL)], progress=False)
    assert fidelity.samples == 8


@pytest.mark.parametrize(
    ("forward", "batch", "message"),
    [
        (listed, ((X, Y), LABEL), r"fits forward\(x, y=None\) in two ways.*the model runs on both; pass inputs_of"),
        (optional, ((X[:, :2], Y), LABEL), r"in two ways.*the model runs on neither; pass inputs_of"),
        (one_batch, {"other": X}, r"batch 0 \(\{'other': Tensor\[6, 4\]\}\) does not fit forward\(batch\)"),
    ],
)
def test_what_stays_open_is_an_error(forward: Any, batch: Any, message: str) -> None:
    with pytest.raises(qdq.DataError, match=message):
        quantize(Model(forward), [batch])


def test_the_reading_is_tried_once_and_holds_for_all_batches() -> None:
    asked: list[Any] = []

    def runs(inputs: Any) -> bool:
        asked.append(inputs)
        return isinstance(inputs[0][0], Tensor)

    data = Batches([((X, Y), LABEL)] * 3, signature_of(Model(optional).forward), runs=runs)
    assert [len(args) for args, _ in data] == [2, 2, 2]
    assert len(asked) == 2


def test_a_list_of_two_for_one_parameter_stays_input_and_label() -> None:
    data = Batches([[X, Y]], signature_of(Model().forward), runs=lambda inputs: True)
    ((args, _),) = data
    assert len(args) == 1 and args[0] is X


def test_a_failing_inputs_of_is_named_with_the_batch() -> None:
    with pytest.raises(
        qdq.DataError, match=r"inputs_of failed on batch 0 \(\{'img': Tensor\[6, 4\]\}\): KeyError: 'x'"
    ):
        quantize(Model(), [{"img": X}], inputs_of=lambda b: b["x"])


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["1.weight", "1.bias"])
def test_parameters_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    with pytest.raises(qdq.CaptureError, match=f"parameter '{name}' holds NaN or infinite values: the model is broken"):
        quantize(model, [X])


def test_statistics_that_are_not_finite_are_refused_and_infinite_masks_are_not() -> None:
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    norm[1].running_var[2] = torch.inf  # type: ignore[index]
    with pytest.raises(qdq.CaptureError, match="buffer '1.running_var' holds NaN or infinite values"):
        quantize(norm, [X])

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0, 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).add(self.mask).softmax(-1)

    assert quantize(Masked(), [X]) is not None


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(
        qdq.CaptureError, match="parameter 'weight' is on the meta device.*: load the model's weights fir"
    ):
        quantize(nn.Linear(4, 4, device="meta"), [X])


@dataclasses.dataclass
class Output:
    logits: Tensor


class Named(dict):
    pass


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: None, "the model returns no tensor, but NoneType: there is nothing to deploy"),
        (lambda self, x: (5, None), r"the model returns no tensor, but \(int, NoneType\)"),
        (
            lambda self, x: Output(self.fc(x)),
            r"returns a Output, which torch.export does not know: .*register_dataclass",
        ),
        (
            lambda self, x: Named(y=self.fc(x)),
            "returns a Named, which torch.export does not know: return a dict or tuple$",
        ),
    ],
)
def test_models_that_return_no_tensor_are_refused(forward: Any, message: str) -> None:
    with pytest.raises(qdq.CaptureError, match=message):
        quantize(Model(forward), [X])


def test_the_inputs_of_the_user_are_not_written_to() -> None:
    def written(self: Model, x: Tensor) -> Tensor:
        return self.fc(x.add_(1))

    x = X.clone()
    with pytest.raises(qdq.CaptureError, match="the model writes to the buffer or input 'x'"):
        quantize(Model(written), [x])
    assert torch.equal(x, X)


def test_a_model_with_nothing_to_quantize_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="qdq"):
        quantize(nn.Bilinear(4, 4, 2), [(X, Y)])
    (record,) = [r for r in caplog.records if r.name == "qdq.api"]
    assert record.getMessage().startswith("no operation of this model was quantized: ")
    assert record.getMessage().endswith("; see qdq.explain")
    caplog.clear()
    quantize(Model(), [X])
    assert not [r for r in caplog.records if r.name == "qdq.api"]


def test_output_names_are_unique(tmp_path: Path) -> None:
    def outputs(self: Model, x: Tensor) -> Any:
        y = self.fc(x)
        return {"a": [y], "a_0": y + 1, "x": y + 2, "x_out": y + 3}

    qmodel = quantize(Model(outputs), [X])
    names = record_of(qmodel).output_names
    assert names == ("a_0", "a_0_1", "x_out", "x_out_1")


def test_torch_prints_nothing_when_it_gives_up(capfd: pytest.CaptureFixture[str]) -> None:
    def branching(self: Model, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y if y.sum() > 0 else -y

    with pytest.raises(qdq.CaptureError, match="branches on values"):
        quantize(Model(branching), [X])
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


# --- shapes and dtypes ----------------------------------------------------------------------------------------------


def test_a_size_of_one_beside_larger_ones_is_no_batch() -> None:
    def masked(self: Model, x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        return self.fc(x * mask) * scale

    qmodel = quantize(Model(masked), [(X, Y[:1], torch.ones(1))])
    with torch.no_grad():
        assert qmodel(X[:3], Y[:1], torch.ones(1)).shape == (3, 3)
    with pytest.raises(qdq.DataError, match=r"input 'mask' has shape \[2, 4\], the model was captured for \[1, 4\]"):
        record_of(qmodel).contract.check((X, Y[:2], torch.ones(1)), {})


def test_one_sample_is_enough_for_a_free_batch() -> None:
    qmodel = quantize(Model(pair), [(X[:1], Y[:1])])
    with torch.no_grad():
        assert qmodel(X, Y).shape == (6, 3)


def test_a_model_for_one_sample_is_told() -> None:
    def single(self: Model, x: Tensor) -> Tensor:
        return self.fc(x.reshape(4))

    message = (
        "runs on the example inputs, a batch of 1, but not on the same batch repeated to 2: .*dynamic_shapes='static'"
    )
    with pytest.raises(qdq.CaptureError, match=f"(?s){message}"):
        quantize(Model(single), [X[:1]])
    assert quantize(Model(single), [X[:1]], dynamic_shapes="static")(X[:1]).shape == (3,)


def test_a_branch_on_the_size_holds_for_the_sizes_of_its_side() -> None:
    def sized(self: Model, x: Tensor) -> Tensor:
        return self.fc(x) * (2 if x.shape[0] > 5 else 3)

    small, large = quantize(Model(sized), [X[:2]]), quantize(Model(sized), [X])
    record_of(small).contract.check((X[:1],), {})
    message = "input 'x' has size 6 in dimension 0, the captured graph holds for 1 to 5: the model's code depends on"
    with pytest.raises(qdq.DataError, match=message):
        record_of(small).contract.check((X,), {})
    with pytest.raises(qdq.DataError, match="batch 1: input 'x' has size 2 in dimension 0.* holds for 6 or more"):
        quantize(Model(sized), [X, X[:2]])
    record_of(large).contract.check((torch.cat([X, X]),), {})


def test_keywords_of_the_model_may_have_any_size() -> None:
    qmodel = quantize(Model(keywords), [{"x": X, "y": Y}])
    with torch.no_grad():
        assert qmodel(X[:3], y=Y[:3]).shape == (3, 3)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X.double(), "the data are float64 and the model's parameters float32: convert the data with .float()"),
        (
            LABEL.repeat(4, 1).T,
            r"the data are int64 and the model's parameters float32: convert the data with .float\(\)",
        ),
        (None, "example inputs hold no tensor, but .NoneType.: give batches of tensors"),
        ("a", "example inputs hold no tensor, but .str."),
        ([[1.0, 2.0]], "example inputs hold no tensor, but ..float, float..: give batches"),
    ],
)
def test_data_of_the_wrong_kind_are_told_what_to_do(batch: Any, message: str) -> None:
    with pytest.raises((qdq.CaptureError, qdq.DataError), match=message):
        quantize(Model(), [batch])


def test_a_sample_without_a_batch_is_told() -> None:
    with pytest.raises(
        qdq.CaptureError, match=r"(?s)has the shape \[4\], whose one dimension .*add a dimension \(x\[No"
    ):
        quantize(Model(), [X[0]])


# --- what a captured graph holds fixed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (2, 3, "input 'k' is 3, the model was captured with 2: a captured graph holds such values fixed"),
        ("relu", "none", "input 'k' is 'none', the model was captured with 'relu'"),
        (None, 1.5, "input 'k' is 1.5, the model was captured with None"),
        (True, False, "input 'k' is False, the model was captured with True"),
        (2, LABEL, "input 'k' is a tensor, the model was captured with 2"),
        (LABEL, 2, "input 'k' is int, the model was captured with a tensor"),
    ],
)
def test_other_values_than_at_capture_are_refused(first: Any, second: Any, told: str) -> None:
    model = Model(
        lambda self, x, k=1: self.fc(x) * (2.0 if k == 3 else 1.0) if not isinstance(k, Tensor) else self.fc(x)
    )
    with pytest.raises(qdq.DataError, match=told):
        quantize(model, [(X, first), (X, second)])
    assert quantize(model, [(X, first), (X, first)]) is not None


def test_dicts_may_come_in_any_order() -> None:
    def nested(self: Model, batch: Any) -> Tensor:
        return self.fc(batch["a"]) - 2 * self.fc(batch["deep"]["b"])

    qmodel = quantize(Model(nested), [({"a": X, "deep": {"b": Y, "c": X}},), ({"deep": {"c": X, "b": Y}, "a": X},)])
    args, kwargs = record_of(qmodel).contract.check(({"deep": {"c": X, "b": Y}, "a": X},), {})
    assert list(args[0]) == ["a", "deep"] and list(args[0]["deep"]) == ["b", "c"]
    with torch.no_grad():
        assert torch.equal(qmodel(*args, **kwargs), qmodel({"a": X, "deep": {"b": Y, "c": X}}))


def test_other_arguments_are_answered_with_those_expected() -> None:
    qmodel = quantize(Model(keywords), [{"x": X, "y": Y}])
    contract = record_of(qmodel).contract
    message = (
        r"other arguments .* did: \(Tensor\[6, 4\], z=Tensor\[6, 4\]\) in place of \(Tensor\[6, 4\], y=Tensor\[6, 4\]\)"
    )
    with pytest.raises(qdq.DataError, match=message):
        contract.check((X,), {"z": Y})
    with pytest.raises(qdq.DataError, match=r"\(y=Tensor\[6, 4\]\) do not fit forward\(x, \*\*more\): missing .* 'x'"):
        contract.check((), {"y": Y})


# --- data functions, and errors while calibrating -------------------------------------------------------------------


def test_a_data_function_sees_parameters_and_attributes_and_cannot_change_the_model() -> None:
    model = Model().train()

    def run(given: Any) -> None:
        device = next(given.parameters()).device
        assert given.width == 4 and given.fc.out_features == 3
        given.eval()
        given.to(torch.float64)
        given(X.to(device))

    assert quantize(model, run) is not None
    assert model.training and model.fc.training
    assert model.fc.weight.dtype == torch.float32


def test_a_data_function_that_reads_what_is_not_there_is_told_so() -> None:
    with pytest.raises(AttributeError, match="no attribute 'depth'"):
        quantize(Model(), lambda given: given.depth)


@pytest.mark.parametrize("example", [None, X])
def test_a_wrong_call_in_a_data_function_is_a_data_error(example: Any) -> None:
    message = (
        r"data function's call does not fit forward\(x\): too many positional arguments; it gives \(Tensor\[6, 4\], "
    )
    with pytest.raises(qdq.DataError, match=message):
        quantize(Model(), lambda given: given(X, Y), example_inputs=example)


def test_an_error_while_calibrating_names_the_batch() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    good, bad = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 9], [2, 3]])
    with pytest.raises(qdq.DataError, match=r"the model fails on batch 1, \(Tensor\[2, 2\]\): IndexError: ") as caught:
        quantize(model, [good, bad])
    assert isinstance(caught.value.__cause__, IndexError)


def test_a_graph_can_be_calibrated_again_without_its_model() -> None:
    qmodel = quantize(Model(), [X])
    with torch.no_grad():
        collect(qmodel, lambda given: given(X.to(next(given.parameters()).device)), False)


def test_capture_leaves_the_ranges_of_its_inputs() -> None:
    graph_module = capture(Model(), (X,))
    (node,) = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    assert node.meta["qdq_ranges"] == {0: (1, None)}


# --- what the caller has switched on -------------------------------------------------------------------------------


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_autocast_of_the_caller_does_not_reach_ranges_and_files(tmp_path: Path) -> None:
    plain = quantize(Model(), [X, Y])
    with torch.autocast("cpu", torch.bfloat16):
        qmodel = quantize(Model(), [X, Y])
        assert torch.is_autocast_enabled("cpu")
        fidelity = qdq.verify(qmodel, qdq.export_onnx(qmodel, tmp_path / "m.onnx"), [X], progress=False)
    assert same_state(plain, qmodel) and fidelity.sqnr_db > 100


def test_step_sizes_are_float32_whatever_the_default_dtype() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    plain = quantize(model, [X, Y])
    torch.set_default_dtype(torch.float64)
    try:
        qmodel = quantize(model, [X, Y])
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_state(plain, qmodel)
    assert {v.dtype for v in qmodel.state_dict().values()} == {torch.float32, torch.int32}


@pytest.mark.parametrize("algorithm", ["block_reconstruction", "fine_tuning"])
def test_what_is_learned_is_learned_in_inference_mode_too(algorithm: str) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return x + self.down(self.up(x).relu())

    recipe = qdq.Recipe(algorithms={algorithm: {"steps": 3}})
    plain = quantize(Residual(), [X, Y], recipe=recipe)
    with torch.inference_mode():
        inside = quantize(Residual(), [X.clone(), Y.clone()], recipe=recipe)
        batches = [X.clone(), Y.clone()]
        assert torch.is_inference_mode_enabled()
    assert same_state(plain, inside)
    assert not any(v.is_inference() for v in inside.state_dict().values())

    def in_its_own_inference_mode(model: nn.Module) -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    for data in (batches, in_its_own_inference_mode):
        assert same_state(plain, quantize(Residual(), data, recipe=recipe))


@pytest.mark.parametrize("meta", [None, "qdq", {"qdq": 1}, [1]], ids=repr)
def test_a_model_may_have_an_attribute_of_the_name_that_graphs_use(meta: Any, tmp_path: Path) -> None:
    model = Model()
    model.meta = meta
    qmodel = quantize(model, [X])
    with pytest.raises(qdq.QdqError, match="model was returned by qdq.quantize"):
        quantize(qmodel, [X])
    assert qdq.export_onnx(model, tmp_path / "m.onnx", example_inputs=X).is_file()
    with pytest.raises(qdq.QdqError, match="expected a model that qdq.quantize returned, not a Model"):
        qdq.explain(model)


# --- what is found out before the data are gone through ------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithms", "most", "message"),
    [
        ({"gptq": {"dampening": 1.0}}, 0, r"algorithms\['gptq'\]: unknown option 'dampening'"),
        (["gtpq"], 0, "unknown algorithm 'gtpq'"),
        ({"adaround": {"layers": ["head"]}}, 1, "the pattern 'head' of layers names no layer"),
    ],
)
def test_wrong_algorithms_cost_no_pass_over_the_data(algorithms: Any, most: int, message: str) -> None:
    asked: list[int] = []

    def batches() -> Any:
        for number in range(3):
            asked.append(number)
            yield X

    with pytest.raises(qdq.RecipeError, match=message):
        quantize(Model(), batches(), recipe=qdq.Recipe(algorithms=algorithms))
    assert len(asked) == most


def test_a_data_function_is_asked_for_an_example_unless_it_is_given_one() -> None:
    samples = []
    for options in ({}, {"example_inputs": X}):
        source = iter([X, Y, X])

        def run(model: nn.Module, source: Any = source) -> None:
            for batch in source:
                model(batch)

        statistics = record_of(quantize(Model(), run, **options)).statistics
        assert statistics is not None
        samples.append(sum(len(args[0]) for args, _ in statistics.samples))
    assert samples == [12, 18]
