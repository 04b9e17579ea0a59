"""Recipe(tune="latency"): the cheapest placement, the files that are timed for it, and the recipe that is recorded."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qdq
from pipeline.helpers import operations, optimized_graph, quantize, randn, run_file, sqnr_db
from qdq.analysis.conversion_times import ConversionTimes, conversion_times
from qdq.analysis.operation_times import NodeTime, operation_times
from qdq.errors import ExportError, RecipeError, RuntimeMissingError
from qdq.export.marked_file import MarkedFile
from qdq.graph.capture import capture
from qdq.graph.fold import fold
from qdq.graph.place import place
from qdq.graph.targets import ONNXRUNTIME
from qdq.recipe import Recipe
from qdq.tuning.cheapest_placement import Cost, Crossing, cheapest_placement
from qdq.tuning.latency import _save, fastest
from qdq.tuning.minimum_cut import minimum_cut
from qdq.tuning.placement_costs import PlacementCosts, patterns_for


class Blocks(nn.Module):
    """Convolutions with what surrounds them in mobile networks: SiLU, a gate, a clip, a residual addition, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.relu = nn.ReLU()
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.relu(self.depthwise(x))
        x = x + self.pointwise(self.gate(y) * y)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Blocks().eval()


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    return [randn(4, 3, 32, 32, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def marked(model: nn.Module, batches: list[torch.Tensor]) -> MarkedFile:
    return MarkedFile(quantize(model, batches))


@pytest.fixture(scope="module")
def graph(model: nn.Module, batches: list[torch.Tensor]) -> torch.fx.Graph:
    return fold(capture(model, (batches[0],), {})).graph


# The choice, by given costs


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Cost], list[Crossing], list[tuple[str, str]]]:
    names = [f"op{i}" for i in range(draw(st.integers(1, 7)))]
    cost = st.integers(0, 20)
    costs = {"input": Cost(0, math.inf)}
    for name in names:
        costs[name] = Cost(draw(cost), math.inf if draw(st.integers(0, 5)) == 0 else draw(cost))
    crossings = []
    for index, name in enumerate(["input", *names]):
        later = names[index:]
        readers = draw(st.lists(st.sampled_from(later), unique=True, max_size=3)) if later else []
        crossings.append(Crossing(name, readers, draw(st.integers(0, 8)), draw(st.integers(0, 8))))
    pair = st.tuples(st.sampled_from(names), st.sampled_from(names))
    return costs, crossings, draw(st.lists(pair, max_size=2))


def total_cost(costs: Mapping[str, Cost], crossings: Iterable[Crossing], in_integers: frozenset[str]) -> float:
    total = sum(cost.in_integers if name in in_integers else cost.in_float for name, cost in costs.items())
    for crossing in crossings:
        sides = {reader in in_integers for reader in crossing.readers}
        if crossing.producer in in_integers:
            total += crossing.dequantize if False in sides else 0.0
        else:
            total += crossing.quantize if True in sides else 0.0
    return total


@given(problems())
def test_placement_costs_as_little_as_the_best_of_all(
    problem: tuple[dict[str, Cost], list[Crossing], list[tuple[str, str]]],
) -> None:
    costs, crossings, together = problem
    found = cheapest_placement(costs, crossings, together)
    assert all((a in found) == (b in found) for a, b in together)
    sides = (frozenset(s) for n in range(len(costs) + 1) for s in itertools.combinations(costs, n))
    allowed = (s for s in sides if all((a in s) == (b in s) for a, b in together))
    assert total_cost(costs, crossings, found) == min(total_cost(costs, crossings, s) for s in allowed)


def test_placement_stays_in_integers_where_both_ways_cost_the_same() -> None:
    assert cheapest_placement({"a": Cost(3, 3), "b": Cost(0, 0)}, [Crossing("a", ["b"], 1, 1)]) == {"a", "b"}


def test_a_conversion_is_paid_once_however_many_read_the_tensor() -> None:
    costs = {"input": Cost(0, math.inf), "a": Cost(3, 0), "b": Cost(3, 0)}
    assert cheapest_placement(costs, [Crossing("input", ["a", "b"], 5, 0)]) == {"a", "b"}
    assert cheapest_placement(costs, [Crossing("input", ["a"], 5, 0), Crossing("input", ["b"], 5, 0)]) == frozenset()


def test_placement_without_any_way_is_refused() -> None:
    with pytest.raises(ValueError, match="infinite capacity"):
        cheapest_placement({"a": Cost(math.inf, math.inf)}, [])


def test_minimum_cut_is_nearest_to_the_source_and_leaves_unconnected_nodes_out() -> None:
    edges = [("s", "a", 2.0), ("a", "b", 1.0), ("b", "t", 1.0), ("x", "t", 5.0), ("a", "t", 0.0)]
    assert minimum_cut(edges, "s", "t") == {"s", "a"}
    assert minimum_cut([], "s", "t") == {"s"}


@pytest.mark.parametrize(
    ("milliseconds", "best"),
    [
        ({"quantized": 5.0, "float": 6.0, "mixed 1": 4.0}, "mixed 1"),
        ({"quantized": 5.0, "float": 6.0, "mixed 1": 4.99}, "quantized"),  # within noise
        ({"quantized": 5.0, "float": 4.0, "mixed 1": 4.5}, "float"),
        ({"quantized": 5.0, "float": 4.49, "mixed 1": 4.5}, "mixed 1"),
        ({"quantized": 5.0, "float": 5.0}, "quantized"),
    ],
)
def test_the_fastest_is_kept(milliseconds: dict[str, float], best: str) -> None:
    assert fastest(milliseconds) == best


# The files


@pytest.mark.parametrize(
    "exclude",
    [[], ["stem"], ["depthwise", "gate"], ["pointwise", "head"], ["gate.1", "mul_1*"], ["stem", "depthwise", "gate"]],
    ids=str,
)
def test_files_to_be_timed_run_what_an_exported_file_runs(
    exclude: list[str], model: nn.Module, batches: list[torch.Tensor], marked: MarkedFile, graph, tmp_path: Path
) -> None:
    names = {node.name for node in graph.nodes}
    exclude = [name for p in exclude for name in ([p] if "*" not in p else sorted(n for n in names if n == p[:-1]))]
    recipe = Recipe(exclude=tuple(exclude))
    path = _save(marked, tmp_path / "timed.onnx", place(graph, ONNXRUNTIME, recipe))
    exported = qdq.export_onnx(quantize(model, batches, recipe=recipe), tmp_path / "exported.onnx")
    assert operations(optimized_graph(path)) == operations(optimized_graph(exported))
    inputs = [batches[0][:1]]
    assert sqnr_db(run_file(exported, inputs), run_file(path, inputs)) > 20


def test_the_float_file_computes_what_the_model_does(
    model: nn.Module, batches: list[torch.Tensor], marked: MarkedFile, graph, tmp_path: Path
) -> None:
    recipe = Recipe(exclude=("*",))
    path = _save(marked, tmp_path / "float.onnx", place(graph, ONNXRUNTIME, recipe))
    exported = qdq.export_onnx(model, tmp_path / "exported.onnx", example_inputs=batches[0])
    assert operations(optimized_graph(path)) == operations(optimized_graph(exported))
    # The weights are those of the codes.
    assert sqnr_db(run_file(exported, [batches[0]]), run_file(path, [batches[0]])) > 35


def test_every_node_of_a_file_tells_its_operation(marked: MarkedFile, graph, tmp_path: Path) -> None:
    path = _save(marked, tmp_path / "m.onnx", place(graph, ONNXRUNTIME, Recipe()))
    known = {node.name for node in graph.nodes}
    told = {node.op_type: marked.operation_in(node.name) for node in onnx.load(path).graph.node}
    assert told["Gemm"] == ("operation", next(n for n in known if n.startswith("linear")))
    quantized = told["QuantizeLinear"]
    assert quantized is not None and quantized[0] == "quantize" and quantized[1] in known
    assert marked.operation_in("ReorderOutput_token_4") is None


# Costs, given


def test_a_costly_region_is_left_in_float_and_named_by_its_module(marked: MarkedFile, graph, tmp_path: Path) -> None:
    plan = place(graph, ONNXRUNTIME, Recipe())
    slow = {n.name for n in graph.nodes if "depthwise" in str(n.meta.get("nn_module_stack"))}
    assert slow

    def times(path: Path, integers: bool) -> list[NodeTime]:
        out = []
        for node in onnx.load(path).graph.node:
            told = marked.operation_in(node.name)
            if told is None or told[0] != "operation":
                continue
            taken = 500.0 if integers and told[1] in slow else 50.0 if integers else 100.0
            out.append(NodeTime(node.name, node.op_type, tuple(node.output), node.name, taken, 1000))
        return out

    full = times(_save(marked, tmp_path / "a.onnx", plan), True)
    floats = times(_save(marked, tmp_path / "b.onnx", place(graph, ONNXRUNTIME, Recipe(exclude=("*",)))), False)
    conversions = ConversionTimes((1.0, 0.0), (1.0, 0.0), (2.0, 0.001), (2.0, 0.001))
    costs = PlacementCosts(graph, plan, marked, floats, full, conversions)
    assert patterns_for(plan, costs.better_in_float(1.0)) == ["depthwise"]
    # Where conversions cost more than the region, all of it goes one way.
    assert patterns_for(plan, costs.better_in_float(1000.0)) in ([], patterns_for(plan, list(plan.operations)))
    table = {cost.name: cost for cost in costs.table(plan)}
    assert {table[name].in_integers for name in slow if name in table} == {500.0}
    assert any(cost.module == "head" and cost.in_float == 100.0 for cost in table.values())


def test_patterns_name_no_other_operation(graph) -> None:
    plan = place(graph, ONNXRUNTIME, Recipe())
    for count in range(1, len(plan.operations)):
        excluded = list(plan.operations)[:count]
        recipe = Recipe(exclude=tuple(patterns_for(plan, excluded)))
        left = set(place(graph, ONNXRUNTIME, recipe).operations)
        assert left.isdisjoint(excluded)
        named = {n for n in plan.operations if not recipe.for_name(*_names(n), node=n.name).quantize}
        assert named == set(excluded)


def _names(node: torch.fx.Node) -> tuple[str, ...]:
    from qdq.graph.plan import names_of

    return names_of(node)


# Measured


def test_profiles_tell_the_time_of_every_operation(marked: MarkedFile, graph, tmp_path: Path) -> None:
    path = _save(marked, tmp_path / "m.onnx", place(graph, ONNXRUNTIME, Recipe()))
    (times,) = operation_times([path], [np.zeros((1, 3, 32, 32), np.float32)], 3, progress=False)
    assert all(time.microseconds >= 0 for time in times) and sum(time.microseconds for time in times) > 0
    convolutions = [time for time in times if time.operation == "QLinearConv"]
    assert len(convolutions) == 3 and {time.elements for time in convolutions} == {16, 16 * 16 * 16}
    assert all(marked.operation_in(time.source) for time in times)


def test_conversions_are_measured_to_take_longer_for_larger_tensors() -> None:
    found = conversion_times()
    assert found.to_codes(10**7, True) >= found.to_codes(10**3, True) >= 0
    assert found.to_float(10**7, False) >= found.to_float(10**3, False) >= 0


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ExportError, match="ONNX Runtime cannot load"):
        operation_times([path], [], 1, progress=False)


def test_tuned_model_is_verified_and_its_recipe_gives_it_again(
    model: nn.Module, batches: list[torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO, "qdq.tuning.latency"):
        tuned = quantize(model, batches, recipe=Recipe(tune="latency", weight_calibration="mse"))
    assert any("float" in r.getMessage() and " ms" in r.getMessage() for r in caplog.records)
    recipe = qdq.explain(tuned).recipe
    assert recipe.tune is None and recipe.weight_calibration == "mse"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    path = qdq.export_onnx(tuned, tmp_path / "m.onnx")
    assert qdq.verify(tuned, path, batches, progress=False).sqnr_db > 40

    again = quantize(model, batches, recipe=Recipe.from_yaml(recipe.to_yaml()))
    first, second = tuned.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert str(qdq.explain(tuned)) == str(qdq.explain(again))


class Encoder(nn.Module):
    """Token embeddings, a linear with more than two dimensions, and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(ids)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        weights = (x @ x.transpose(1, 2) + mask[:, None, :]).softmax(-1)
        return {"tokens": weights @ x, "first": x[:, 0]}


@pytest.mark.parametrize("recipe", [{}, {"weights": qdq.QuantDescriptor(num_bits=4, axis=0), "activations": "float"}])
def test_transformers_are_tuned_too(recipe: dict[str, object], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randint(0, 32, (2, 8), generator=generator), randn(2, 8)) for _ in range(2)]
    tuned = quantize(model, data, recipe=Recipe(tune="latency", **recipe))  # type: ignore[arg-type]
    path = qdq.export_onnx(tuned, tmp_path / "m.onnx")
    assert qdq.verify(tuned, path, data, progress=False).sqnr_db > 40


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("packed", [True, False])
def test_the_float_file_of_weights_without_activations_is_float(bits: int, packed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    data = [(torch.arange(16).reshape(2, 8), randn(2, 8))]
    recipe = Recipe(weights=qdq.QuantDescriptor(bits, axis=0), activations="float", algorithms={})
    target = dataclasses.replace(ONNXRUNTIME, matmul_nbits=packed)
    quantized = quantize(model, data, target=target, recipe=recipe)
    path = MarkedFile(quantized).save(tmp_path / "float.onnx", *[lambda *_: False] * 3)
    exported = qdq.export_onnx(model, tmp_path / "exported.onnx", example_inputs=data[0])
    assert operations(optimized_graph(path)) == operations(optimized_graph(exported))
    # It computes from the values of the codes, and rounds nothing.
    values = {k: v for k, v in quantized.state_dict().items() if k in model.state_dict()}
    with torch.no_grad():
        for name, value in values.items():
            quantizer = dict(quantized.named_modules()).get(f"{name}_quantizer")
            values[name] = value if quantizer is None else quantizer(value)
    model.load_state_dict(values)
    with torch.no_grad():
        expected = [x.numpy() for x in model(*data[0]).values()]
    assert sqnr_db(expected, run_file(path, data[0])) > 100


def test_where_nothing_is_quantized_nothing_is_chosen(model: nn.Module, batches: list[torch.Tensor]) -> None:
    tuned = quantize(model, batches, recipe=Recipe(tune="latency", exclude=("stem", "*")))
    assert qdq.explain(tuned).recipe == Recipe(exclude=("stem", "*"))


# The door


def test_recipes_hold_tune() -> None:
    recipe = Recipe(tune="latency")
    assert recipe.to_dict() == {"version": 1, "tune": "latency"} and Recipe.from_yaml(recipe.to_yaml()) == recipe
    with pytest.raises(RecipeError, match="tune must be 'latency' or None, not 'size'"):
        Recipe(tune="size")


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_tuning_for_a_runtime_that_is_not_profiled_is_refused(target: str, model: nn.Module) -> None:
    with pytest.raises(RecipeError, match=f"tune='latency' needs target 'onnxruntime', not '{target}'"):
        quantize(model, [], target=target, recipe=Recipe(tune="latency"))


def test_tuning_without_the_runtime_names_the_extra(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeMissingError, match=r"'onnxruntime': pip install 'qdq\[onnx\]'"):
        quantize(model, [], recipe=dataclasses.replace(Recipe(), tune="latency"))
