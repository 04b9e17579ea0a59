"""`qdq.sensitivity`: the same figures as from running whole models, the model untouched, every wrong call answered."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import qdq
from fixtures import fashion
from fixtures.classifiers import s1, s2
from pipeline.helpers import quantize, randn, run_model, sqnr_db
from qdq.affine_quantizer import AffineQuantizer
from qdq.analysis.partial_run import PartialRun
from qdq.analysis.quantizer_switches import QuantizerSwitches, activation_at
from qdq.analysis.quantizer_trials import trials_of
from qdq.analysis.sensitivity import QuantizerSensitivity, Sensitivity
from qdq.calibration import histogram_of
from qdq.constant_quantizers import BiasQuantizer, WeightQuantizer
from qdq.graph.record import record_of
from qdq.integer_operations import IntegerAdd


class Branches(nn.Module):
    """A split, a concatenation whose parts share a quantizer, a residual addition, two outputs of which one is ints."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.mix = nn.Conv2d(8, 8, 1, bias=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.stem(x))
        first, _ = y.chunk(2, 1)
        joined = torch.cat([self.left(first), self.right(y)], 1)
        z = F.relu(self.mix(joined) + joined)
        out = self.fc(F.adaptive_avg_pool2d(z, 1).flatten(1))
        return out, out.argmax(1)


class NoFloats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).argmax(1)


# Of PyTorch itself, where a test copies a graph.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

BATCHES = [randn(4, 3, 8, 8, seed=i) for i in range(3)]
PLAIN = qdq.Recipe(algorithms={})


@pytest.fixture(scope="module")
def branches() -> fx.GraphModule:
    return quantize(Branches(), BATCHES, recipe=PLAIN)


def sensitivity(model: nn.Module, batches: Any, *args: Any, **options: Any) -> Sensitivity:
    return qdq.sensitivity(model, batches, *args, **{"progress": False, **options})


def switched(qmodel: fx.GraphModule, on: Collection[str]) -> fx.GraphModule:
    """A copy with these quantizers of activations and weights on; integer biases where input and weight are."""
    twin = copy.deepcopy(qmodel)
    modules = dict(twin.named_modules())
    for name, module in modules.items():
        if isinstance(module, (AffineQuantizer, WeightQuantizer)):
            module.enabled = name in on
    for node in twin.graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], BiasQuantizer):
            sources = [str(a.target).removesuffix(".step_size") for a in node.args[1:]]
            vars(modules[node.target])["enabled"] = all(s in on for s in sources)
    return twin


def names(qmodel: fx.GraphModule) -> set[str]:
    called = {str(n.target) for n in qmodel.graph.nodes if n.op == "call_module"}
    kinds = (AffineQuantizer, WeightQuantizer)
    return {n for n, m in qmodel.named_modules() if n in called and isinstance(m, kinds)}


def floats(model: nn.Module, batches: list[Tensor]) -> list[Any]:
    return [y for x in batches for y in run_model(model, [x]) if y.dtype == "float32"]


def check_against_whole_runs(
    qmodel: fx.GraphModule, result: Sensitivity, batches: list[Tensor], only: int | None = None, within: float = 1e-9
) -> None:
    every = names(qmodel)
    assert {e.name for e in result} == every
    reference = floats(switched(qmodel, ()), batches)
    quantized = sqnr_db(reference, floats(switched(qmodel, every), batches))
    assert result.quantized == pytest.approx(quantized, abs=within)
    for entry in result.entries[:only]:
        alone = sqnr_db(reference, floats(switched(qmodel, {entry.name}), batches))
        without = sqnr_db(reference, floats(switched(qmodel, every - {entry.name}), batches))
        assert entry.alone_on == pytest.approx(alone, abs=within), entry
        assert entry.alone_off == pytest.approx(without - quantized, abs=within), entry


@pytest.mark.parametrize("samples_at_once", [None, 3])
def test_figures_are_those_of_whole_runs(branches: fx.GraphModule, samples_at_once: int | None) -> None:
    modules = dict(branches.named_modules())
    calls = [n.target for n in branches.graph.nodes if n.op == "call_module"]
    shared = [m for n, m in modules.items() if isinstance(m, AffineQuantizer) and calls.count(n) > 1]
    assert shared and any(isinstance(m, IntegerAdd) for m in modules.values())
    result = sensitivity(branches, BATCHES, samples_at_once=samples_at_once)
    assert result.samples == 12
    # Other sizes are rounded otherwise in float32: the tenth part of a code more or less.
    check_against_whole_runs(branches, result, BATCHES, within=1e-9 if samples_at_once is None else 1e-3)


@pytest.mark.parametrize("build", [s1, s2])
def test_trained_classifiers(build: Any) -> None:
    images = fashion.load("train", limit=8)[0]
    qmodel = quantize(build(), [images], recipe=qdq.Recipe(calibration="max", algorithms={}))
    result = sensitivity(qmodel, [images[:4]])
    check_against_whole_runs(qmodel, result, [images[:4]], only=6)
    assert all(30 < e.alone_on < 90 for e in result)
    # One quantizer alone is a small part of the error of all.
    assert result.quantized < min(e.alone_on for e in result)


def test_only_what_lies_behind_a_node_is_computed(branches: fx.GraphModule) -> None:
    run = PartialRun(branches)
    last = next(n for n in branches.graph.nodes if n.target == "fc.weight_quantizer")
    values = run.whole([BATCHES[0]])
    # What is read of the earlier run is what the last layer reads: any other node computed anew would read more.
    read: set[str] = set()

    class Reading(dict[fx.Node, Any]):
        def __getitem__(self, node: fx.Node) -> Any:
            value = super().__getitem__(node)
            read.add(node.name)
            return value

    again = run.after(Reading(values), [last])
    layer = next(n for n in branches.graph.nodes if last in n.all_input_nodes and n.target is not last.target)
    around = {n.name for node in (last, layer) for n in node.all_input_nodes} - {last.name}
    assert around <= read and len(read) <= len(around) + 2, read
    assert all(torch.equal(a, b) for a, b in zip(again, run.outputs(values), strict=True))
    kept = {node: value.clone() for node, value in values.items() if isinstance(value, Tensor)}
    all_anew = run.after(values, [node for node in run.nodes[:-1] if node.op != "placeholder"])
    assert all(torch.equal(a, b) for a, b in zip(all_anew, run.outputs(values), strict=True))
    assert all(torch.equal(values[node], value) for node, value in kept.items())
    assert [id(a) for a in run.after(values, [])] == [id(b) for b in run.outputs(values)]


def test_entries(branches: fx.GraphModule) -> None:
    result = sensitivity(branches, BATCHES)
    assert [e.alone_on for e in result] == sorted(e.alone_on for e in result)
    assert len(result) == len(names(branches))
    weight, source = result.find("left.weight_quantizer"), result.find("x_quantizer")
    assert (weight.kind, weight.bits, weight.elements, weight.tried) == ("weight", 8, 4 * 4 * 9, False)
    assert (source.kind, source.bits, source.elements) == ("activation", 8, 3 * 8 * 8)
    gains = [e.alone_off for e in result.sorted_by("alone_off")]
    assert gains == sorted(gains, reverse=True)
    with pytest.raises(KeyError, match="no quantizer 'nothing' at 3 bits"):
        result.find("nothing", 3)
    with pytest.raises(qdq.QdqError, match="order must be one of alone_on, alone_off, not 'name'"):
        result.sorted_by("name")
    with pytest.raises(qdq.QdqError, match="kind must be one of activation, weight, layer, not 'bias'"):
        result.worst(1, kind="bias")
    with pytest.raises(qdq.QdqError, match=r"no layer was tried: pass kinds=\['activation', 'weight', 'layer'\] to"):
        result.worst(1, kind="layer")
    with pytest.raises(qdq.QdqError, match=r"nothing was tried at 4 bits: pass bits=4 to qdq.sensitivity"):
        result.worst(1, bits=4)
    for count in ("2", 2.0, None, True, -1):
        with pytest.raises(qdq.QdqError, match="count must be a number of entries, 0 or more, not"):
            result.worst(count)  # type: ignore[arg-type]
    text = str(result)
    assert text.splitlines()[0].startswith("quantized model: SQNR") and len(text.splitlines()) == len(result) + 2
    assert text.splitlines()[2].startswith(result.entries[0].name) and " dB" in text.splitlines()[2]
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["entries"][0]["name"] == result.entries[0].name and plain["samples"] == 12


def test_patterns_take_quantizers_away(branches: fx.GraphModule) -> None:
    result = sensitivity(branches, BATCHES[:1])
    # One of each form: a weight, several readers, a shared quantizer, an addition without a module of its own.
    for name in ("left.weight_quantizer", "relu_quantizer", "left.output_quantizer", "relu_quantizer_1"):
        entry = result.find(name)
        again = quantize(Branches(), BATCHES[:1], recipe=qdq.Recipe(algorithms={}, exclude=entry.patterns))
        tensors = [e.tensor for e in qdq.explain(branches) if e.quantizer == name]
        assert tensors and not any(qdq.explain(again).find(tensor).quantized for tensor in tensors), entry
    first = result.entries[0]
    assert result.worst(1) == list(first.patterns) and result.worst(0) == []
    weights = [e for e in result if e.kind == "weight"]
    assert result.worst(2, kind="weight") == [e.name.removesuffix("_quantizer") for e in weights[:2]]


class Gelu(nn.Module):
    """A linear with channels that are large throughout, a GELU, and a linear that reads them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 8)
        with torch.no_grad():
            self.fc1.weight[3] *= 60
            self.fc1.bias[3] = 20
            self.fc2.weight[:, 3] /= 60

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def test_patterns_speak_of_the_model_where_smoothquant_put_a_product() -> None:
    data = [randn(32, 16, seed=i) for i in range(3)]
    qmodel = quantize(Gelu(), data, recipe=qdq.Recipe())
    assert any(n.target is torch.ops.aten.mul.Tensor for n in qmodel.graph.nodes)
    result = sensitivity(qmodel, data)
    plain = sensitivity(quantize(Gelu(), data, recipe=PLAIN), data)
    assert {e.name: e.patterns for e in result} == {e.name: e.patterns for e in plain}
    again = quantize(Gelu(), data, recipe=qdq.Recipe(exclude=tuple(result.worst(len(result)))))
    assert not any(e.quantized for e in qdq.explain(again))
    alone = quantize(Gelu(), data, recipe=qdq.Recipe(exclude=result.find("gelu_quantizer").patterns))
    assert not qdq.explain(alone).find("gelu").quantized


def test_other_bits(branches: fx.GraphModule) -> None:
    own = sensitivity(branches, BATCHES)
    result = sensitivity(branches, BATCHES, bits=[4, 8, 16])
    assert [e for e in result if not e.tried] == list(own)
    tried = {(e.name, e.bits): e for e in result if e.tried}
    activations = {e.name for e in own if e.kind == "activation"}
    assert set(tried) == {(e.name, 4) for e in own} | {(name, 16) for name in activations}
    for entry in own:
        four = tried[entry.name, 4]
        assert four.alone_on < entry.alone_on - 10 and four.alone_off > entry.alone_off
        if entry.name in activations:
            assert tried[entry.name, 16].alone_on > entry.alone_on + 30
    assert result.worst(3, kind="weight", bits=16) == []  # weights are tried with 8 bits at most
    layers = sensitivity(branches, BATCHES[:1], lambda model: float(model.training), kinds=["layer", "weight"], bits=4)
    assert {e.alone_on for e in layers} == {0.0}, "the metric is given models in eval mode"
    assert layers.worst(1, bits=4) and layers.worst(1, kind="layer")
    with pytest.raises(qdq.QdqError, match="nothing was tried at 4 bits: layers have their own bits alone"):
        layers.worst(1, kind="layer", bits=4)
    assert result.worst(1, bits=4) == list(next(e for e in result if e.bits == 4).patterns)
    assert result.find("fc.weight_quantizer", 4) == tried["fc.weight_quantizer", 4]


@pytest.mark.parametrize("name", ["mix.weight_quantizer", "relu_quantizer"])
def test_other_bits_are_fitted_anew(branches: fx.GraphModule, name: str) -> None:
    entry = sensitivity(branches, BATCHES, bits=3).find(name, 3)
    reference = floats(switched(branches, ()), BATCHES)
    alone = switched(branches, {name})
    quantizer = alone.get_submodule(name)
    if isinstance(quantizer, WeightQuantizer):
        quantizer.num_bits, quantizer.pairs_axis = 3, None
        quantizer.fit(alone.get_parameter("mix.weight"), "auto")
    else:
        assert isinstance(quantizer, AffineQuantizer)
        quantizer.lo, quantizer.hi = 0, 7
        statistics = record_of(branches).statistics
        assert statistics is not None
        quantizer.find_range(histogram_of(branches, quantizer, statistics))
    assert entry.alone_on == pytest.approx(sqnr_db(reference, floats(alone, BATCHES)), abs=1e-6)


@pytest.mark.parametrize("algorithms", [["gptq"], {"adaround": {"steps": 20}}])
def test_a_weight_whose_codes_were_chosen_is_the_float_one_when_off(algorithms: Any) -> None:
    """The chosen codes lie on the grid: without the weight from before, each such quantizer would cost nothing."""
    model = Branches().eval()
    qmodel = quantize(model, BATCHES, recipe=qdq.Recipe(algorithms=algorithms))
    own = dict(model.named_parameters())
    name = "mix.weight_quantizer"
    assert not torch.equal(qmodel.get_parameter("mix.weight"), own["mix.weight"])
    result = sensitivity(qmodel, BATCHES, bits=4)
    reference = floats(model, BATCHES)

    def swapped(on: Collection[str], quantizer: WeightQuantizer | None = None) -> fx.GraphModule:
        """Weights of quantizers that are off are the model's own, and one of them may have another quantizer."""
        twin = switched(qmodel, on)
        for off in [n for n in names(qmodel) - set(on) if n.endswith(".weight_quantizer")]:
            path = off.removesuffix("_quantizer")
            twin.get_parameter(path).data = own[path].detach()
        if quantizer is not None:
            twin.get_submodule("mix").weight_quantizer = quantizer  # type: ignore[assignment]
        return twin

    entry, every = result.find(name), names(qmodel)
    assert entry.alone_on == pytest.approx(sqnr_db(reference, floats(swapped({name}), BATCHES)), abs=1e-6)
    without = sqnr_db(reference, floats(swapped(every - {name}), BATCHES))
    assert entry.alone_off == pytest.approx(without - result.quantized, abs=1e-6)
    four = copy.deepcopy(qmodel.get_submodule(name))
    assert isinstance(four, WeightQuantizer)
    four.num_bits, four.pairs_axis = 4, None
    four.fit(own["mix.weight"].detach(), "auto")
    alone = sqnr_db(reference, floats(swapped((), four), BATCHES))
    assert result.find(name, 4).alone_on == pytest.approx(alone, abs=1e-6)

    def closeness(candidate: nn.Module) -> float:
        return sqnr_db(reference, floats(candidate, BATCHES))

    by_metric = sensitivity(qmodel, BATCHES, closeness, kinds=["weight"], bits=4)
    for bits in (8, 4):
        assert by_metric.find(name, bits).alone_on == pytest.approx(result.find(name, bits).alone_on, abs=1e-6)
    # The model itself has its own quantizer and codes still.
    assert quantize(model, BATCHES, recipe=qdq.Recipe(algorithms=algorithms))(BATCHES[0])[0].equal(
        qmodel(BATCHES[0])[0]
    )


def test_a_weight_that_was_trained_since_is_the_one_that_counts() -> None:
    qmodel = quantize(Branches().eval(), BATCHES, recipe=qdq.Recipe(algorithms=["gptq"]))
    plain = quantize(Branches().eval(), BATCHES, recipe=PLAIN)
    with torch.no_grad():
        for one in (qmodel, plain):
            for name, value in one.named_parameters():
                value.copy_(1.25 * Branches().eval().get_parameter(name))
    plain.load_state_dict(qmodel.state_dict())
    found, expected = (sensitivity(one, BATCHES) for one in (qmodel, plain))
    assert found == expected


def test_a_range_before_a_silu_is_found_by_its_results_at_other_bits_too() -> None:
    """8 bits tried on a model of 16 are those that a recipe of 8 bits gets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3)).eval()
    data = [10 * randn(4, 4, 12, 12, seed=seed) for seed in range(2)]
    wide = quantize(model, data, recipe=qdq.Recipe(activations=qdq.QuantDescriptor(num_bits=16), algorithms={}))
    usual = quantize(model, data, recipe=qdq.Recipe(algorithms={})).get_submodule("0.output_quantizer")
    switches = QuantizerSwitches(wide)
    tried = {t.name: t for t in trials_of(switches, record_of(wide), ["activation"], [8]) if t.tried}
    found = tried["0.output_quantizer"].replaced["0.output_quantizer"]
    assert isinstance(found, AffineQuantizer) and isinstance(usual, AffineQuantizer)
    assert (float(found.step_size), int(found.zero_point)) == (float(usual.step_size), int(usual.zero_point))
    seen = record_of(wide).seen
    assert seen is not None
    histogram = histogram_of(wide, found, seen)
    assert float(activation_at(usual, 8, histogram).step_size) != float(usual.step_size)


def test_a_range_of_the_recipe_stays_at_other_bits() -> None:
    desc = qdq.QuantDescriptor(num_bits=8, amax=2.0, calib_method="histogram")
    for target, step in (("onnxruntime", 4 / 15), ("tensorrt", 2 / 7)):
        qmodel = quantize(Branches(), BATCHES, target=target, recipe=qdq.Recipe(activations=desc, algorithms={}))
        quantizer = qmodel.get_submodule("x_quantizer")
        assert isinstance(quantizer, AffineQuantizer)
        assert float(activation_at(quantizer, 4, None).step_size) == pytest.approx(step, rel=0.01)


def test_layers(branches: fx.GraphModule) -> None:
    result = sensitivity(branches, BATCHES, kinds=["weight", "layer"], bits=4)
    layers = {e.name: e for e in result if e.kind == "layer"}
    assert set(layers) == {f"{n}.weight" for n in ("stem", "left", "right", "mix", "fc")}
    assert {e.kind for e in result if e.tried} == {"weight"}
    for layer in layers.values():
        weight = result.find(f"{layer.name}_quantizer")
        # Errors of weight and input may cancel a little.
        assert layer.alone_on < weight.alone_on + 0.5 and layer.elements > weight.elements
        assert layer.patterns == (layer.name,)
    only = sensitivity(branches, BATCHES, kinds="activation")
    assert {e.kind for e in only} == {"activation"}


def test_a_metric_is_run_on_whole_models(branches: fx.GraphModule) -> None:
    reference = floats(switched(branches, ()), BATCHES)

    def metric(model: nn.Module) -> Tensor:
        assert next(model.train().to("meta").parameters()).device.type == "cpu"
        found = [model(x)[0].numpy() for x in BATCHES]
        return torch.tensor(min(sqnr_db(reference, found), 200.0), dtype=torch.float64)

    by_metric = sensitivity(branches, BATCHES, metric, bits=4)
    by_output = sensitivity(branches, BATCHES, bits=4)
    assert by_metric.in_float == 200 and by_metric.samples == 0
    assert by_metric.quantized == pytest.approx(by_output.quantized)
    assert [(e.name, e.bits, e.elements) for e in by_metric] == [(e.name, e.bits, e.elements) for e in by_output]
    for ours, theirs in zip(by_metric, by_output, strict=True):
        assert ours.alone_on == pytest.approx(theirs.alone_on) and ours.alone_off == pytest.approx(theirs.alone_off)
    assert "metric" in str(by_metric).splitlines()[0] and " dB" not in str(by_metric)


def test_a_metric_that_is_not_a_number_of_a_broken_model_is_the_worst() -> None:
    def entry(name: str, on: float, off: float) -> QuantizerSensitivity:
        return QuantizerSensitivity(name, "weight", 8, False, on, off, 1, (name,))

    found = Sensitivity((entry("a", 1.0, 0.1), entry("b", math.nan, 0.0), entry("c", 2.0, math.nan)), 1.0, 2.0)
    assert [e.name for e in found.sorted_by("alone_on")] == ["b", "a", "c"]
    assert [e.name for e in found.sorted_by("alone_off")] == ["c", "a", "b"]
    assert found.to_dict()["entries"][1]["alone_on"] is None


def test_a_float_model_is_quantized_first() -> None:
    model = Branches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = sensitivity(model, BATCHES, target="tensorrt", recipe=qdq.Recipe(exclude=("fc",)))
    qmodel = quantize(Branches(), BATCHES, target="tensorrt", recipe=qdq.Recipe(exclude=("fc",)))
    assert {e.name for e in result} == names(qmodel) and "fc.weight_quantizer" not in names(qmodel)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # The reference is the float model itself, whose biases are not corrected.
    given = sensitivity(qmodel, BATCHES, float_model=model)
    assert given == result
    assert result.quantized == pytest.approx(sqnr_db(floats(model.eval(), BATCHES), floats(qmodel, BATCHES)), abs=1e-6)
    assert sensitivity(qmodel, BATCHES).quantized != result.quantized
    by_metric = sensitivity(qmodel, BATCHES, lambda m: float(m(BATCHES[0])[0].sum()), float_model=model)
    assert by_metric.in_float == pytest.approx(float(model(BATCHES[0])[0].detach().sum()))


def test_forms_of_data(branches: fx.GraphModule) -> None:
    expected = sensitivity(branches, BATCHES)
    outputs = []

    def run(model: nn.Module) -> None:
        for x in BATCHES:
            outputs.append(model(x)[0])

    assert sensitivity(branches, run) == expected
    assert all(torch.equal(y, branches(x)[0]) for x, y in zip(BATCHES, outputs, strict=True))
    assert sensitivity(branches, iter(BATCHES)) == expected
    assert sensitivity(branches, [(x, 0) for x in BATCHES]) == expected
    assert sensitivity(branches, [{"image": x} for x in BATCHES], inputs_of=lambda b: b["image"]) == expected
    assert sensitivity(branches, record_of(branches).statistics) == expected
    for data in (run, record_of(branches).statistics):
        assert len(sensitivity(branches, data, lambda m: 1.0)) == len(expected)


def settings(qmodel: fx.GraphModule) -> tuple[Any, ...]:
    flags = [(n, id(m), getattr(m, "enabled", None)) for n, m in qmodel.named_modules()]
    return flags, {n: (id(v), v.clone()) for n, v in qmodel.state_dict(keep_vars=True).items()}, qmodel.code


def test_the_model_is_left_as_it_was(branches: fx.GraphModule) -> None:
    flags, state, code = settings(branches)
    calls = 0

    def interrupted(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return 0.0

    def batches() -> Any:
        yield BATCHES[0]
        raise KeyboardInterrupt

    sensitivity(branches, BATCHES, bits=4)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(branches, BATCHES, interrupted, bits=4)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(branches, batches())
    assert calls == 5
    after = settings(branches)
    assert after[0] == flags and after[2] == code and after[1].keys() == state.keys()
    assert all(after[1][n][0] == i and torch.equal(after[1][n][1], v) for n, (i, v) in state.items())


def test_quantizers_that_are_off_are_left_out(branches: fx.GraphModule) -> None:
    twin = copy.deepcopy(branches)
    off = twin.get_submodule("mix.weight_quantizer")
    assert isinstance(off, WeightQuantizer)
    off.enabled = False
    result = sensitivity(twin, BATCHES)
    assert {e.name for e in result} == names(branches) - {"mix.weight_quantizer"}
    reference = floats(switched(branches, ()), BATCHES)
    rest = switched(branches, names(branches) - {"mix.weight_quantizer"})
    assert result.quantized == pytest.approx(sqnr_db(reference, floats(rest, BATCHES)), abs=1e-6)


def test_outputs_that_are_infinite_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return torch.cat([y, torch.full_like(y, -math.inf)], 1)

    result = sensitivity(Masked(), [randn(8, 4)])
    assert len(result) and all(20 < e.alone_on < 80 for e in result)
    assert "48 of 96 values of the float model's outputs are NaN or infinite and were left out" in caplog.text
    with pytest.raises(qdq.DataError, match="no value of the float model's outputs on batches is finite"):
        sensitivity(quantize(Masked(), [randn(8, 4)]), [torch.full((8, 4), math.inf)])


def test_a_model_all_in_float_has_no_entries() -> None:
    result = sensitivity(Branches(), BATCHES, recipe=qdq.Recipe(exclude=("*",)))
    assert len(result) == 0 and result.quantized > 100 and result.worst(3) == []


class Other(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((2, 3)), x


def test_wrong_calls(branches: fx.GraphModule) -> None:
    def refused(message: str, *args: Any, error: type[Exception] = qdq.QdqError, **options: Any) -> None:
        with pytest.raises(error, match=message):
            sensitivity(*args, **options)

    data = qdq.DataError
    refused("model must be a torch.nn.Module, not str", "model", BATCHES)
    refused("quantized already: target, recipe, .* are for a float", branches, BATCHES, target="onnxruntime")
    refused("quantized already: target, recipe, .* are for a float", branches, BATCHES, recipe=PLAIN)
    refused("model holds TensorQuantizers", nn.Sequential(qdq.nn.QuantLinear(4, 3)), [randn(2, 4)])
    refused("metric must be a callable that takes a model, not float", branches, BATCHES, 0.5)
    for value in ("0.5", None, True, torch.ones(2), 1j):
        message = "metric must return a number, larger .* for the float model it returned"
        refused(message, branches, BATCHES, lambda m, value=value: value)
    for bits in (1, 17, 4.0, "4", True, [4, None]):
        refused("bits must be an integer from 2 to 16 or a list of such, not", branches, BATCHES, bits=bits)
    for kinds in ("bias", ["weight", "bias"]):
        refused("kinds must be one or more of activation, weight, layer, not 'bias'", branches, BATCHES, kinds=kinds)
    refused(r"kinds must be one or more of .*, not \[\]", branches, BATCHES, kinds=[])
    for kinds in (5, None, [3]):
        refused("kinds must be one or more of .*, not (5|None|3)", branches, BATCHES, kinds=kinds)
    for size in (0, -1, 2.0, True):
        refused("samples_at_once must be a positive integer or None", branches, BATCHES, samples_at_once=size)
    refused("float_model must be the float model .* not a quantized one", branches, BATCHES, float_model=branches)
    refused("float_model must be the float model .* not int", branches, BATCHES, float_model=1)
    refused("model is the float model itself", Branches(), BATCHES, float_model=Branches())
    refused("float_model is not the float model that model was made", branches, BATCHES, float_model=Other())
    refused("bits are tried of activations and weights, and layers", branches, BATCHES, kinds=["layer"], bits=[4])
    foreign = record_of(quantize(Other(), BATCHES)).statistics
    refused("batches are statistics of another float model", branches, foreign, error=data)
    refused("one-shot iterator, and is gone through twice", Branches(), iter(BATCHES), error=data)
    for metric in (None, lambda m: 1.0):
        refused("batches holds no batch", branches, [], metric, error=data)
        refused("has shape", branches, [randn(4, 3, 8)], metric, error=data)
        refused("ran the model not once", branches, lambda m: None, metric, error=data)
    refused("batch 1: input 'x' holds NaN", branches, [BATCHES[0], BATCHES[0] / 0 * 0], error=data)
    refused("no float output, whose SQNR .* pass a metric", NoFloats(), [randn(8, 4)])
    assert len(sensitivity(NoFloats(), [randn(8, 4)], lambda m: float(m(randn(8, 4)).sum()))) > 0


def test_an_error_of_the_model_names_the_batch() -> None:
    qmodel = quantize(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), [torch.tensor([[0, 1], [2, 3]])])
    with pytest.raises(qdq.DataError, match=r"the model fails on batch 1, \(Tensor\[2, 2\]\): IndexError: ") as caught:
        sensitivity(qmodel, [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 9], [2, 3]])])
    assert isinstance(caught.value.__cause__, IndexError)
