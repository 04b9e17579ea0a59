"""Statistics: one pass keeps enough to find ranges again, in memory and in a file."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qdq
from fixtures import fashion
from fixtures.classifiers import s1
from pipeline.helpers import quantize
from qdq.atomic_file import replaced_at_once
from qdq.calib import HistogramCollector, Statistics, load, save
from qdq.calib.statistics import SampleKeeper, count_samples, evenly_spread
from qdq.errors import DataError
from qdq.fingerprint import fingerprint
from qdq.graph.record import record_of
from qdq.recipe import Recipe


class Masked(nn.Module):
    """Takes a tuple, a keyword and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, pair: tuple[Tensor, Tensor], *, mask: Tensor, power: float = 2.0) -> Tensor:
        return self.second(torch.relu(self.first(pair[0] + pair[1]) * mask) ** power)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    first, second = state(found), state(expected)
    assert list(first) == list(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def statistics_of(model: nn.Module) -> Statistics:
    found = record_of(model).statistics
    assert found is not None
    return found


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    return list(fashion.load("train", limit=64)[0].split(16))


@pytest.fixture(scope="module")
def by_default(batches) -> nn.Module:
    return quantize(s1(), batches)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(Recipe(), id="as before"),
        pytest.param(Recipe(calibration="entropy"), id="another method"),
        pytest.param(Recipe(weights=qdq.QuantDescriptor(num_bits=4, axis=0, narrow_range=True)), id="other bits"),
        pytest.param(Recipe(exclude=("blocks.1",)), id="other tensors"),
        pytest.param(Recipe(calibration="max", algorithms={}), id="no algorithms"),
    ],
)
def test_other_recipes_from_a_file_give_what_the_data_give(recipe, batches, by_default, tmp_path: Path) -> None:
    path = save(by_default, tmp_path / "s1.safetensors")
    assert_same(quantize(s1(), load(path), recipe=recipe), quantize(s1(), batches, recipe=recipe))


def small(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)).eval()


SMALL = [numbers(8, 6, seed=i) for i in range(2)]
OTHER_MODEL = "these statistics are of another float model: .* give the model that they were collected from, or batches"


def fine_tuned() -> nn.Module:
    model = small()
    with torch.no_grad():
        model.get_parameter("3.bias")[0] += 1e-3
    return model


def trained_further() -> nn.Module:
    model = small()
    model.train()(SMALL[0])
    return model.eval()


def other_activation() -> nn.Module:
    model = small()
    model[2] = nn.Sigmoid()  # type: ignore[index]
    return model


def other_eps() -> nn.Module:
    model = small()
    model[1].eps = 1e-3  # type: ignore[index]
    return model


@pytest.mark.parametrize(
    "other", [lambda: small(1), lambda: small(width=4), fine_tuned, trained_further, other_activation, other_eps]
)
def test_statistics_of_another_model_are_refused(other, tmp_path: Path) -> None:
    path = save(quantize(small(), SMALL), tmp_path / "s")
    for statistics in (load(path), statistics_of(quantize(small(), load(path)))):
        with pytest.raises(DataError, match=OTHER_MODEL):
            quantize(other(), statistics)
        with pytest.raises(DataError, match=OTHER_MODEL):
            qdq.sensitivity(other(), statistics, progress=False)
        with pytest.raises(DataError, match=OTHER_MODEL):
            qdq.recover(other(), statistics, lambda m: 1.0, progress=False)


def test_statistics_serve_the_same_model_however_it_is_quantized(tmp_path: Path) -> None:
    first = quantize(small(), SMALL, recipe=Recipe(algorithms=["equalization"]))
    again = small().train()
    statistics = load(save(first, tmp_path / "s"))
    assert statistics.model == statistics_of(first).model is not None
    for options in (
        {"target": "openvino"},
        {"target": "tensorrt"},
        {"recipe": Recipe(weights=qdq.QuantDescriptor(num_bits=3, axis=0, narrow_range=True))},
    ):
        assert statistics_of(quantize(again, statistics, **options)).model == statistics.model
    assert len(qdq.sensitivity(again, statistics, progress=False))


class Printing(nn.Module):
    """Prints of itself what a test says, if it can."""

    def __init__(self, told: str | None) -> None:
        super().__init__()
        self.told = told
        self.extra = nn.ParameterList([nn.Parameter(torch.ones(1))])

    def extra_repr(self) -> str:
        if self.told is None:
            raise RuntimeError("not now")
        return self.told


def test_what_a_module_prints_counts_where_every_process_prints_it() -> None:
    def mark(told: str | None) -> str:
        return fingerprint(Printing(told))

    assert mark("slope=0.1") != mark("slope=0.2")
    for other in ("<object at 0x7f3a>", "device=cuda:0", "device=cpu", "names={'b', 'a'}", None):
        assert mark(other) == mark("")


def test_modes_and_the_process_do_not_tell_models_apart() -> None:
    program = (
        "import torch; from torch import nn; from qdq.fingerprint import fingerprint; torch.manual_seed(0)\n"
        "print(fingerprint(nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.BatchNorm1d(8))))"
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.BatchNorm1d(8))
    assert fingerprint(model.train()) == fingerprint(model.eval()) == fingerprint(model.requires_grad_(False))
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == fingerprint(model)


def test_buffers_that_are_not_saved_do_not_tell_models_apart() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = small()
            self.register_buffer("cache", torch.zeros(1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model = Cached().eval()
    statistics = statistics_of(quantize(model, SMALL))
    model.cache = torch.ones(7)
    quantize(model, statistics)


def test_a_file_that_names_no_model_is_read_and_told(
    stored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(quantize(small(), SMALL), tmp_path / "s")
    old = _changed(path, tmp_path / "old", lambda header, tensors: header.pop("model") and None)
    assert load(path).model and "does not say" not in caplog.text
    statistics = load(old)
    assert statistics.model is None and "does not say which float model it is of" in caplog.text
    # Nothing is known of it, so nothing is claimed later.
    assert statistics_of(quantize(small(1), statistics)).model is None


def test_inputs_that_the_graph_does_not_take_are_told() -> None:
    qmodel = quantize(small(), SMALL)
    with pytest.raises(DataError, match="batch 0 of the inputs that the statistics hold: input .* has shape"):
        quantize(small(), statistics_of(qmodel), example_inputs=SMALL[0][:4], dynamic_shapes="static")
    wrong = Statistics({}, [((SMALL[0],), {}), ((SMALL[0][:, :5],), {})])
    with pytest.raises(DataError, match="batch 1 of the .*; give dynamic_shapes and example_inputs as they were"):
        quantize(small(), wrong)


def test_tensors_that_were_not_quantized_before_are_collected_from_the_inputs(batches, by_default) -> None:
    partial = quantize(s1(), batches, recipe=Recipe(exclude=("blocks", "fc")))
    known = len(statistics_of(partial).histograms)
    whole = quantize(s1(), statistics_of(partial))
    assert_same(whole, by_default)
    assert len(statistics_of(whole).histograms) > known


def test_an_algorithm_forgets_what_it_changed_and_no_more() -> None:
    """200 samples are seen and at most 128 kept: ranges of tensors that equalization left alone come from all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    data = [torch.randn(50, 4) for _ in range(4)]
    data[1][7] *= 40  # in the second batch, which is not kept
    recipe = Recipe(calibration="max", algorithms=["equalization"])
    qmodel = quantize(model, data, recipe=recipe)
    record = record_of(qmodel)
    assert record.seen is not None and record.statistics is not None
    kept = count_samples(record.statistics.samples)
    assert kept <= 128
    totals = {name: (h.total, record.statistics.histograms[name].total) for name, h in record.seen.histograms.items()}
    assert totals == {"input_1": (800, 800), "relu": (8 * kept, 1600), "tanh": (800, 800)}
    plain = quantize(model, data, recipe=Recipe(calibration="max", algorithms=()))
    steps = [float(m.get_submodule("input_quantizer").step_size) for m in (qmodel, plain)]
    assert steps[0] == steps[1]


def test_all_kinds_of_inputs_come_back(tmp_path: Path) -> None:
    data = [
        {"pair": (numbers(4, 6, seed=i), numbers(4, 6, seed=i + 9)), "mask": torch.ones(4, 8), "power": 2.0}
        for i in range(3)
    ]
    qmodel = quantize(Masked().eval(), data)
    found = load(save(qmodel, tmp_path / "m.safetensors"))
    expected = statistics_of(qmodel)
    assert repr(found) == repr(expected) == f"Statistics({len(expected.histograms)} histograms, 12 samples)"
    for name, histogram in expected.histograms.items():
        other = found.histograms[name]
        assert torch.equal(other.counts, histogram.counts) and torch.equal(other.edges, histogram.edges)
        fields = ("min", "max", "total", "zeros", "nonfinite", "num_bins", "first", "exponent")
        assert [getattr(other, f) for f in fields] == [getattr(histogram, f) for f in fields]
    for one, other in zip(found.samples, expected.samples, strict=True):
        flat = [pytree.tree_flatten(inputs) for inputs in (one, other)]
        assert flat[0][1] == flat[1][1]
        for a, b in zip(flat[0][0], flat[1][0], strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else (type(a), a) == (type(b), b)


def test_a_restored_histogram_goes_on_collecting() -> None:
    whole, part = HistogramCollector(64), HistogramCollector(64)
    x, y = numbers(100), numbers(100, seed=1) * 5
    part.collect(x)
    statistics = Statistics({"a": part}, [])
    assert statistics.histograms["a"] is part
    fields = {key: getattr(part, key) for key in ("num_bins", "counts", "first", "exponent", "zeros", "total")}
    restored = HistogramCollector.restored(**fields, nonfinite=0, low=part.min, high=part.max)
    for collector, data in ((restored, [y]), (whole, [x, y])):
        for value in data:
            collector.collect(value)
    assert torch.equal(restored.counts, whole.counts) and torch.equal(restored.edges, whole.edges)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 50), st.booleans())
@settings(deadline=None, max_examples=100)
def test_what_is_kept_is_bounded_and_spread(sizes: list[int], most: int, divisible: bool) -> None:
    keeper = SampleKeeper(most, divisible=divisible)
    place = 0
    for size in sizes:
        keeper.add(((torch.arange(place, place + size).float()[:, None],), {}))
        place += size
    samples = keeper.samples()
    count = count_samples(samples)
    assert count <= max(most, 0 if divisible else sizes[0]) and count >= 1
    values = torch.cat([args[0] for args, _ in samples]).flatten()
    assert torch.equal(values, values.unique()), "in their order, each once"
    if sum(sizes) <= most:
        assert count == sum(sizes)
    if divisible:
        assert all(args[0].shape[0] <= 32 for args, _ in samples)
        assert len(set(values.diff().tolist())) <= 1, "at equal distances, however large the batches"
        assert sum(sizes) <= most or count > most // 2


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 200), st.booleans())
@settings(deadline=None, max_examples=100)
def test_fewer_samples_are_spread_over_all(sizes: list[int], most: int, divisible: bool) -> None:
    total = sum(sizes)
    batches = [((part[:, None],), {}) for part in torch.arange(total).float().split(sizes)]
    found = evenly_spread(batches, most, divisible=divisible)
    assert count_samples(found) == min(total, most) if divisible else len(found) >= 1
    values = [args[0].flatten() for args, _ in found]
    together = torch.cat(values).sort().values
    assert torch.equal(together, together.unique())
    if divisible:
        assert together.diff().max() <= -(-total // most) if len(together) > 1 else True
        if total > most:
            assert all(len(v) <= 32 for v in values)
            # Each batch is spread over all of them.
            assert all(v.min() < total / 2 <= v.max() for v in values if len(v) >= 16)


def test_a_large_batch_is_thinned_and_not_cut() -> None:
    """Data that are sorted by class come in one batch."""
    keeper = SampleKeeper(128, divisible=True)
    keeper.add(((torch.arange(1000.0)[:, None],), {}))
    kept = torch.cat([args[0] for args, _ in keeper.samples()]).flatten()
    assert kept.tolist() == list(range(0, 1000, 8))
    for batch in torch.arange(1000.0, 3000.0)[:, None].split(500):
        keeper.add(((batch,), {}))
    kept = torch.cat([args[0] for args, _ in keeper.samples()]).flatten()
    assert kept.tolist() == list(range(0, 3000, 32))


class Prototypes(nn.Module):
    """The nearest of a set: two inputs whose leading sizes have nothing to do with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 4)

    def forward(self, x: Tensor, prototypes: Tensor) -> Tensor:
        return self.embed(x) @ self.embed(prototypes).t()


class Windows(nn.Module):
    """Takes frames of videos, three to a video."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 6), nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.embed(x)).view(-1, 18))


def test_inputs_of_unrelated_sizes_are_kept_whole() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(n, 8), torch.randn(5 + n, 8)) for n in (40, 30, 40)]
    qmodel = quantize(Prototypes().eval(), data)
    contract = record_of(qmodel).contract
    assert not contract.divisible
    assert [tuple(a.shape[0] for a in args) for args, _ in statistics_of(qmodel).samples] == [
        (40, 45),
        (30, 35),
        (40, 45),
    ]


def test_batches_of_a_multiple_are_kept_whole() -> None:
    torch.manual_seed(0)
    qmodel = quantize(Windows().eval(), [torch.randn(33, 8), torch.randn(12, 8)])
    assert not record_of(qmodel).contract.divisible
    assert [args[0].shape[0] for args, _ in statistics_of(qmodel).samples] == [33, 12]


def test_a_model_without_a_batch_dimension_is_quantized() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    data = [torch.randn(32) for _ in range(8)]
    qmodel = qdq.quantize(model, data, dynamic_shapes="static", progress=False)
    assert len(statistics_of(qmodel).samples) == 4  # at most 128 rows, as which the 32 values of each count
    for x in data:
        assert (qmodel(x) - model(x)).abs().max() < 0.02


def test_statistics_without_inputs_leave_algorithms_out(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    data = [torch.randn(64, 8)]
    bare = Statistics(statistics_of(quantize(model, data)).histograms, [])
    with caplog.at_level("WARNING", "qdq"):
        quantize(model, bare, example_inputs=data[0])
    told = "the statistics hold no inputs: ranges are found, and smoothquant, gptq, bias_correction left out"
    assert told in caplog.text


def test_bytes_are_bounded_too_and_what_is_kept_is_a_copy() -> None:
    keeper = SampleKeeper(1000, most_bytes=40, divisible=True)
    x = torch.zeros(20, 1)
    keeper.add(((x,), {}))
    x.fill_(7)
    (args, _), *rest = keeper.samples()
    assert not rest and args[0].shape == (10, 1) and bool((args[0] == 0).all())
    assert args[0].untyped_storage().nbytes() <= 80


def test_batches_of_other_shapes_stay_apart() -> None:
    keeper = SampleKeeper(divisible=True)
    for length in (3, 3, 5, 3):
        keeper.add(((torch.zeros(4, length),), {}))
    assert [tuple(args[0].shape) for args, _ in keeper.samples()] == [(8, 3), (4, 5), (4, 3)]


def test_statistics_without_inputs_need_an_example(batches, by_default) -> None:
    bare = Statistics(statistics_of(by_default).histograms, [])
    with pytest.raises(DataError, match="these statistics hold no inputs: pass example_inputs"):
        quantize(s1(), bare)
    # Without inputs there are ranges, by the usual rule of each tensor, and no algorithms.
    found = quantize(s1(), bare, example_inputs=batches[0])
    assert_same(found, quantize(s1(), batches, recipe=Recipe(calibration="mse", algorithms={})))


def test_saving_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected Statistics or a model that qdq.quantize returned, not Linear"):
        save(nn.Linear(1, 1), tmp_path / "m")
    with pytest.raises(DataError, match="expected Statistics .* not str"):
        save("statistics", tmp_path / "m")
    with pytest.raises(DataError, match="the folder .* does not exist"):
        save(Statistics({}, []), tmp_path / "none" / "m")
    with pytest.raises(DataError, match="cannot be written: it is a folder; give the path of a file"):
        save(Statistics({}, []), "")
    with pytest.raises(DataError, match="batch 0 holds a complex, which cannot be saved"):
        save(Statistics({}, [((1j,), {})]), tmp_path / "m")
    with pytest.raises(DataError, match="batch 1 holds a dict with keys that are no strings"):
        save(Statistics({}, [((), {}), (({1: 2},), {})]), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(DataError, match="it is a device or a pipe, which a file would replace"):
        save(Statistics({}, []), path)
    assert path.is_fifo()


def test_an_unwritable_place_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        save(Statistics({}, []), target)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_file_has_the_usual_permissions(tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(umask)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")  # it holds for all threads: nobody may change it for a moment
            path = save(Statistics({}, []), tmp_path / "m")
        plain = tmp_path / "plain"
        plain.touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == stat.S_IMODE(os.stat(plain).st_mode)


def test_a_disk_that_is_full_is_told(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    statistics = Statistics({}, [((torch.zeros(100_000),), {})])
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(DataError, match="cannot be written: .*[Ff]ile too large"):
            save(statistics, tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_the_first_error_is_told_where_the_temporary_file_is_gone(tmp_path: Path) -> None:
    def write() -> None:
        with replaced_at_once(tmp_path / "m") as temporary:
            temporary.unlink()
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    histogram = HistogramCollector()
    histogram.collect(torch.tensor([-1.0, 0.0, 0.5, 3.0]))
    samples = [((torch.zeros(2, 3), 1, 2.5, None, "a", [True]), {"mask": torch.ones(2)})]
    folder = tmp_path_factory.mktemp("statistics")
    return save(Statistics({"a": histogram, "b": HistogramCollector()}, samples), folder / "s.safetensors")


def _changed(stored: Path, path: Path, change) -> Path:
    from safetensors import safe_open

    with safe_open(stored, framework="pt") as file:
        header = json.loads(file.metadata()["qdq"])
    tensors = load_file(stored)
    header = change(header, tensors) or header
    save_file(tensors, path, metadata={"qdq": header if isinstance(header, str) else json.dumps(header)})
    return path


def _set(*keys: str | int, value: object):
    def change(header, tensors) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_set("format", value="other"), "its header is not that of a statistics file"),
        (lambda h, t: "[1]", "its header is not that of a statistics file"),
        (lambda h, t: "{", "has a damaged header"),
        (lambda h, t: "[" * 100_000, "has a damaged header"),
        (_set("version", value=2), "version 2 is not known here; this qdq reads version 1"),
        (_set("model", value="0" * 63), "its model is '0.*', which is no SHA-256"),
        (_set("model", value=7), "its model is 7, which is no SHA-256"),
        (_set("histograms", value=[]), "lacks histograms or samples"),
        (_set("histograms", "a", value=3), "the histogram of 'a' is damaged"),
        (_set("histograms", "a", "counts", value="sample/0"), "lacks counts"),
        (_set("histograms", "a", "total", value="4"), "lacks a whole number"),
        (_set("histograms", "a", "total", value=5), "has counts that are not 5 in all"),
        (_set("histograms", "a", "zeros", value=9), "has an impossible number"),
        (_set("histograms", "a", "exponent", value=2000), "has an impossible number"),
        (_set("histograms", "a", "num_bins", value=1), "impossible number of bins"),
        (_set("histograms", "a", "first", value=-9), "a range that its bins do not cover"),
        (_set("histograms", "a", "min", value="nan"), "has no finite range"),
        (_set("histograms", "a", "min", value=None), "has the number None"),
        (_set("histograms", "a", "num_bins", value=8192), "impossible number of bins"),
        (_set("histograms", "a", "exponent", value=1024), "has an impossible number"),
        (_set("histograms", "a", "exponent", value=1000), "a range that its bins do not cover"),
        (_set("histograms", "a", "max", value=(2.0**10).hex()), "a range that its bins do not cover"),
        (_set("histograms", "a", "zeros", value=3), "has more zeros than the bin of zero holds"),
        (_set("histograms", "a", "nonfinite", value=7), "counts 7 NaN or infinite values"),
        (_set("histograms", "b", "min", value="nan"), "has no finite range"),
        (_set("histograms", "b", "max", value=(1.0).hex()), "has no finite range"),
        (_set("histograms", "b", "zeros", value=1), "has an impossible number"),
        (_set("histograms", "b", "first", value=-1), "a range that its bins do not cover"),
        (_set("samples", 0, value={"tuple": []}), "batch 0 does not hold arguments and keyword arguments"),
        (_set("samples", 0, value=7), "batch 0 is damaged"),
        (_set("samples", 0, value={"tensor": "none"}), "batch 0 lacks its tensor 'none'"),
        (_set("samples", 0, value={"value": [1]}), "batch 0 is damaged"),
        (_set("samples", 0, value={"tuple": 1}), "batch 0 is damaged"),
        (_set("samples", 0, value={"dict": 1}), "batch 0 is damaged"),
        (_set("samples", 0, value={"float": "x"}), "has the number 'x'"),
    ],
)
def test_reading_says_what_is_damaged(change, told: str, stored: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told):
        load(_changed(stored, tmp_path / "changed.safetensors", change))


def test_reading_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        load(tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        load(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(DataError, match="its metadata have no entry 'qdq'"):
        load(tmp_path / "other")


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_file_damaged_anywhere_is_refused_or_read(stored: Path, data: st.DataObject) -> None:
    content = bytearray(stored.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = stored.with_name("fuzzed")
    path.write_bytes(bytes(content))
    try:
        found = load(path)
    except DataError:
        return
    for histogram in found.histograms.values():
        assert math.isfinite(float(histogram.edges.sum()))
