"""qdq.improve_modules: what each algorithm gains in a module-quantized model, what stays as it is, and errors."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import qdq
from fixtures import fashion
from fixtures.classifiers import s1, s2
from pipeline.helpers import randn, run_file, sqnr_db
from qdq import CalibrationError, DataError, QdqError, QuantDescriptor, Recipe, RecipeError, TensorQuantizer
from qdq.graph.targets import ONNXRUNTIME
from qdq.modules.writing import write_changes
from qdq.nn import QuantConv2d, QuantLinear, quantize_modules

# Neither this machine's processor nor its kernels decide what is written.
EXACT = dataclasses.replace(ONNXRUNTIME, reduce_range=False)
FOUR = QuantDescriptor(num_bits=4, axis=0)


def quantized(model: nn.Module, batches: Any, weights: QuantDescriptor = FOUR, method: str = "max") -> nn.Module:
    """A converted and calibrated copy."""
    converted = quantize_modules(copy.deepcopy(model), Recipe(weights=weights))
    with qdq.calibrating(converted, method=method):
        for batch in batches:
            converted(batch)
    return converted.eval()


def improve(model: nn.Module, batches: Any, algorithms: Any, **options: Any) -> nn.Module:
    return qdq.improve_modules(copy.deepcopy(model), batches, algorithms, progress=False, **options)


@torch.no_grad()
def sqnr(reference: nn.Module, model: nn.Module, x: Tensor) -> float:
    return sqnr_db([reference(x).numpy()], [model(x).numpy()])


def in_float(model: nn.Module) -> nn.Module:
    """The model with its quantizers off; factors of inputs stay."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module.disable()
    return model


def fused(model: nn.Module) -> nn.Module:
    """With batch norms in the convolutions before them; for Sequentials inside of the model."""
    for module in model.modules():
        if not isinstance(module, nn.Sequential):
            continue
        for index in range(len(module) - 1):
            layer, norm = module[index], module[index + 1]
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module[index] = fuse_conv_bn_eval(layer, norm)
                module[index + 1] = nn.Identity()
    return model.eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    present = model.state_dict()
    return present.keys() == state.keys() and all(torch.equal(present[name], value) for name, value in state.items())


@pytest.fixture(scope="module")
def images() -> Tensor:
    return fashion.load("train", limit=128)[0]


@pytest.fixture(scope="module")
def trunk() -> nn.Module:
    """The stem and two blocks of S1, whose convolutions have no bias and are followed by batch norms."""
    model: Any = s1()
    return nn.Sequential(model.stem, model.blocks[0]).eval()


@pytest.fixture(scope="module")
def trunk4(trunk: nn.Module, images: Tensor) -> nn.Module:
    return quantized(trunk, images.split(32))


class Outliers(nn.Module):
    """Layer norm with a few very large channels before linears, as in large transformers; one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        with torch.no_grad():
            self.norm.weight[::9] *= 40
            self.up.weight[:, ::9] /= 40

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize(
    ("algorithms", "gain"),
    [
        (["bias_correction"], 0.3),
        (["adaround"], 4.0),
        (["gptq"], 3.0),
        (["weight_clipping"], 2.0),
        ({"block_reconstruction": {"steps": 150}}, 4.0),
    ],
)
def test_gains_with_weights_of_four_bits(
    algorithms: Any, gain: float, trunk: nn.Module, trunk4: nn.Module, images: Tensor
) -> None:
    test = fashion.load("test", limit=64)[0]
    better = improve(trunk4, images.split(32), algorithms)
    assert sqnr(trunk, better, test) > sqnr(trunk, trunk4, test) + gain
    assert better.state_dict().keys() == trunk4.state_dict().keys()


def test_a_depthwise_net_gains_in_place_and_is_saved(images: Tensor) -> None:
    net: Any = s2()
    model, test = nn.Sequential(*net.features[:4]).eval(), fashion.load("test", limit=64)[0]
    plain = quantized(model, images.split(32), QuantDescriptor(num_bits=4, axis=0, narrow_range=True))
    parameters = dict(plain.named_parameters())
    before, copied = sqnr(model, plain, test), copy.deepcopy(plain)
    plain.train()
    better = qdq.improve_modules(plain, images.split(32), ["adaround", "bias_correction"], progress=False)
    assert better is plain and all(parameters[n] is p for n, p in better.named_parameters())
    assert all(module.training for module in better.modules())
    better.eval()
    assert before + 6 < sqnr(model, better, test) < 40

    file = io.BytesIO()
    torch.save(better.state_dict(), file)
    file.seek(0)
    copied.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(copied(test), better(test))


def test_what_is_deployed_equals_the_improved_model(
    trunk: nn.Module, trunk4: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    better = improve(
        trunk4, images.split(32), {"weight_clipping": {}, "adaround": {"steps": 20}, "bias_correction": {}}
    )
    path = qdq.export_onnx(better, tmp_path / "m.onnx", example_inputs=images[:4], target=EXACT)
    test = fashion.load("test", limit=64)[0]
    assert qdq.verify(better, path, [test], progress=False).sqnr_db > 50
    deployed = sqnr_db([trunk(test).detach().numpy()], run_file(path, [test]))
    assert deployed > sqnr(trunk, trunk4, test) + 5


def test_equalization_of_fused_layers_with_one_amax_per_weight(images: Tensor) -> None:
    net: Any = s2()
    model, test = fused(nn.Sequential(*net.features[:4])), fashion.load("test", limit=64)[0]
    one = QuantDescriptor(num_bits=4)
    plain = quantized(model, images.split(32), one)
    better = improve(plain, images.split(32), ["equalization"])
    assert sqnr(model, better, test) > sqnr(model, plain, test) + 2
    assert sqnr(model, in_float(better), test[:8]) > 90
    for name, module in better.named_modules():
        if isinstance(module, QuantConv2d):
            largest, given = module.weight.abs().max(), module.weight_quantizer.amax
            assert given is not None and torch.allclose(given, largest), name


def test_equalization_does_not_pass_batch_norms(
    trunk4: nn.Module, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    same = improve(trunk4, [images[:8]], ["equalization"])
    assert same_state(same, state_of(trunk4))
    assert "equalization found nothing to change; batch norms part layers" in caplog.text


def test_smoothquant_moves_large_channels_into_norms_and_quantizers(tmp_path: Path) -> None:
    model, batches = Outliers().eval(), [randn(16, 32, seed=i) for i in range(4)]
    # Codes of 7 bits cannot saturate in pairs, on any processor.
    seven = QuantDescriptor(num_bits=7, axis=0)
    plain = quantized(model, batches, seven)
    better = improve(plain, batches, {"smoothquant": {"alpha": 0.5}})
    test = randn(64, 32, seed=9)
    assert sqnr(model, better, test) > sqnr(model, plain, test) + 6
    assert sqnr(model, in_float(better), test) > 90
    # The norm takes the factors of one linear; nothing before the other can, and its quantizer multiplies.
    assert not torch.equal(better.norm.weight, plain.norm.weight)  # type: ignore[union-attr, arg-type]
    assert better.up.input_quantizer.pre_quant_scale is None  # type: ignore[union-attr]
    assert better.down.input_quantizer.pre_quant_scale.shape == (32 * 2,)  # type: ignore[union-attr]
    with torch.no_grad():
        seen = max(float(better.norm(batch).abs().max()) for batch in batches)  # type: ignore[operator]
    assert float(better.up.input_quantizer.amax) == pytest.approx(seen, rel=1e-5)  # type: ignore[union-attr, arg-type]

    path = qdq.export_onnx(better, tmp_path / "m.onnx", example_inputs=batches[0])
    assert qdq.verify(better, path, [test], progress=False).sqnr_db > 45
    again = quantize_modules(Outliers().eval(), Recipe(weights=seven))
    again.load_state_dict(better.state_dict())
    assert torch.equal(again(test), better(test))
    # Once more: the factors are multiplied.
    twice = improve(better, batches, {"smoothquant": {"alpha": 0.9}})
    assert sqnr(model, in_float(twice), test) > 90

    kept = improve(plain, batches, {"smoothquant": {"multiply": False, "alpha": 0.5}})
    assert kept.down.input_quantizer.pre_quant_scale is None  # type: ignore[union-attr]
    assert torch.equal(kept.down.input_quantizer.amax, plain.down.input_quantizer.amax)  # type: ignore[union-attr]


def test_awq_of_weights_of_three_bits() -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16)).eval(), [randn(64, 32, seed=i) for i in (1, 2)]
    with torch.no_grad():
        model[0].weight[::7] *= 10  # type: ignore[operator]
    plain = quantized(model, batches, QuantDescriptor(num_bits=3, axis=0))
    better = improve(plain, batches, ["awq"])
    test = randn(64, 32, seed=9)
    assert sqnr(model, better, test) > sqnr(model, plain, test) + 1
    assert sqnr(model, in_float(better), test) > 90


def test_packed_projections_of_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=True, norm_first=True).eval()
    nn.init.normal_(model.self_attn.in_proj_bias)
    batches = [randn(8, 6, 32, seed=i) for i in range(3)]
    plain = quantized(model, batches)
    better = improve(plain, batches, {"adaround": {"steps": 50}})
    test = randn(16, 6, 32, seed=9)
    assert sqnr(model, better, test) > sqnr(model, plain, test) + 1
    packed = better.self_attn.in_proj_weight, plain.self_attn.in_proj_weight  # type: ignore[union-attr]
    assert all(not torch.equal(a, b) for a, b in zip(packed[0].chunk(3), packed[1].chunk(3), strict=True))  # type: ignore[operator]
    smooth = improve(plain, batches, {"smoothquant": {"alpha": 0.5}})
    assert sqnr(model, in_float(smooth), test) > 90
    assert not torch.equal(smooth.self_attn.in_proj_weight, packed[1])  # type: ignore[union-attr, arg-type]


def test_a_weight_that_was_clipped_keeps_its_method_and_lies_on_its_grid() -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)).eval(), [randn(4, 2, 8, 8)]
    plain = quantized(model, batches, QuantDescriptor(num_bits=3, axis=0), method="mse")
    better = improve(plain, batches, {"weight_clipping": {}, "gptq": {}})
    for module in (better[0], better[2]):  # type: ignore[index]
        weight, amax = module.weight.detach(), module.weight_quantizer.amax  # type: ignore[union-attr]
        codes = weight / (amax / 3)  # type: ignore[operator]
        assert torch.allclose(codes, codes.round(), atol=1e-4) and float(codes.abs().max()) < 3.001
        assert torch.allclose(module.weight_quantizer(weight), weight, atol=1e-6)  # type: ignore[operator, union-attr]
    assert sqnr(model, better, batches[0]) > sqnr(model, plain, batches[0]) + 1


class Shared(nn.Module):
    """One linear called twice, two that share their weight, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.one, self.two, self.own = (nn.Linear(8, 8) for _ in range(4))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.two(torch.relu(self.one(self.twice(torch.relu(self.twice(x)))))))


def test_what_is_read_more_than_once_stays(caplog: pytest.LogCaptureFixture) -> None:
    batches = [randn(32, 8)]
    plain = quantized(Shared().eval(), batches)
    better = improve(plain, batches, ["gptq", "equalization", "bias_correction"])
    changed = {n for n, v in state_of(plain).items() if not torch.equal(v, better.state_dict()[n])}
    assert {"own.weight", "own.bias"} <= changed and not {
        n for n in changed if n.startswith(("twice.", "one.", "two."))
    }
    for name in ("twice", "one", "two"):
        assert f"{name}._weight_quantizer: it is read more than once" in caplog.text


def test_forms_that_no_algorithm_knows_stay(caplog: pytest.LogCaptureFixture) -> None:
    forms = {
        "it is E4M3": QuantDescriptor(num_bits=(4, 3)),
        "it is unsigned": QuantDescriptor(num_bits=4, unsigned=True),
        "it has 12 bits, and algorithms take 2 to 8": QuantDescriptor(num_bits=12),
        "its amax is neither one nor one per output channel": QuantDescriptor(num_bits=4, axis=1),
        "its range is learned": QuantDescriptor(num_bits=4, learn_amax=True, amax=1.0),
    }
    torch.manual_seed(0)
    layers: list[nn.Module] = [QuantLinear(6, 6, quant_desc_weight=form) for form in forms.values()]
    with torch.no_grad():
        layers[1].weight.abs_()  # type: ignore[operator]
    layers.append(QuantLinear(6, 6, quant_desc_input=QuantDescriptor(num_bits=(4, 3)), quant_desc_weight=FOUR))
    model, batches = nn.Sequential(*layers), [randn(64, 6)]
    plain = quantized(model, batches)
    better = improve(plain, batches, ["gptq"])
    changed = [n for n, v in state_of(plain).items() if not torch.equal(v, better.state_dict()[n])]
    assert changed == ["5.weight"]
    for index, reason in enumerate(forms):
        assert f"{index}._weight_quantizer: {reason}" in caplog.text
    with pytest.raises(QdqError, match=r"no weight .* can be improved: 0._weight_quantizer: it is E4M3; 1._weight"):
        improve(plain[:5], batches, ["gptq"])  # type: ignore[index]


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.full((4, 1), 2.0))
        self.quantizer = TensorQuantizer(FOUR)
        self.bias = nn.Parameter(torch.zeros(4))
        self.linear = QuantLinear(4, 4, bias=False, quant_desc_weight=FOUR)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.quantizer(self.weight * self.factor), self.bias)
        x = nn.functional.linear(x, qdq.functional.fake_tensor_quant(self.weight, torch.tensor(1.0), 4))
        return self.linear(x) + x * 0


def test_computed_weights_and_direct_calls_stay(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    plain, batches = quantized(Computed().eval(), [randn(16, 4)]), [randn(16, 4)]
    improve(plain, batches, ["bias_correction", "gptq"])
    assert "quantizer: it is computed from other parameters" in caplog.text
    assert "it is quantized by a direct call" in caplog.text
    assert "bias_correction leaves layers without a bias alone: linear.weight" in caplog.text


def test_ranges_that_the_user_has_set_stay() -> None:
    model, batches = Outliers().eval(), [randn(16, 32)]
    fixed = Recipe(weights=QuantDescriptor(num_bits=8, axis=0), activations=QuantDescriptor(amax=50.0))
    plain = quantize_modules(model, fixed)
    with qdq.calibrating(plain):
        plain(batches[0])
    better = improve(plain, batches, ["smoothquant", "awq"])
    assert same_state(better, state_of(plain))


def test_data_of_many_forms() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), randn(16, 4)
    plain = quantized(model, [x])
    expected = state_of(improve(plain, [x], ["gptq"]))
    assert same_state(improve(plain, ((part, 0) for part in x.split(4)), ["gptq"]), expected)
    assert same_state(improve(plain, [{"images": x}], ["gptq"], inputs_of=lambda batch: batch["images"]), expected)
    assert same_state(improve(plain, [x], ["gptq"], dynamic_shapes="static"), expected)
    with torch.inference_mode():
        made_there = quantized(model, [x])
        qdq.improve_modules(plain, [x], ["gptq"], progress=False)
    assert same_state(plain, expected) and not any(p.is_inference() for p in plain.parameters())
    assert same_state(improve(made_there, [x], ["gptq"]), expected)


def batches_with_an_error() -> Iterator[Tensor]:
    yield randn(8, 1, 28, 28)
    raise KeyError("the disk")


@pytest.mark.parametrize(
    ("batches", "algorithms", "error", "message"),
    [
        ([], ["gptq"], DataError, "batches holds no batch"),
        ([randn(2, 1, 28, 28), randn(2, 1, 28, 30)], ["gptq"], DataError, r"batch 1: input .* has shape"),
        ([randn(2, 1, 28, 28) * torch.nan], ["gptq"], DataError, "batch 0: input .* holds NaN"),
        (batches_with_an_error(), ["gptq"], KeyError, "the disk"),
        ([randn(2, 1, 28, 28)], ["gptqq"], RecipeError, "unknown algorithm 'gptqq'; known are"),
        ([randn(2, 1, 28, 28)], "gptq", RecipeError, "algorithms must be a list of names"),
        ([randn(2, 1, 28, 28)], {"gptq": {"speed": 1}}, RecipeError, "unknown option 'speed'"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(
    batches: Any, algorithms: Any, error: type[Exception], message: str, trunk4: nn.Module
) -> None:
    before = state_of(trunk4)
    with pytest.raises(error, match=message):
        qdq.improve_modules(trunk4, batches, algorithms, progress=False)
    assert same_state(trunk4, before)


def test_models_that_are_refused() -> None:
    x = randn(8, 4)
    linear = nn.Sequential(nn.Linear(4, 4)).eval()
    with pytest.raises(QdqError, match="model must be a torch.nn.Module, not str"):
        improve("model", [x], ["gptq"])  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="no quantizers: convert it with qdq.nn.quantize_modules"):
        improve(linear, [x], ["gptq"])
    with pytest.raises(QdqError, match=r"returned by qdq.quantize, .* name them in its recipe"):
        improve(qdq.quantize(linear, [x], progress=False), [x], ["gptq"])
    raw = quantize_modules(copy.deepcopy(linear))
    with pytest.raises(CalibrationError, match=r"without amax: 0._input_quantizer. Calibrate the model"):
        improve(raw, [x], ["gptq"])
    broken = quantized(linear, [x])
    broken[0].input_quantizer._amax.fill_(torch.nan)  # type: ignore[index, union-attr, operator]
    with pytest.raises(CalibrationError, match="with NaN or infinity as amax: 0._input_quantizer"):
        improve(broken, [x], ["gptq"])
    collecting = quantized(linear, [x])
    collecting[0].input_quantizer.enable_calib()  # type: ignore[index, union-attr, operator]
    with pytest.raises(CalibrationError, match="still collect calibration data"):
        improve(collecting, [x], ["gptq"])
    off = quantized(linear, [x])
    off[0].weight_quantizer.disable()  # type: ignore[index, union-attr, operator]
    with pytest.raises(QdqError, match="no weight of a convolution or linear is quantized"):
        improve(off, [x], ["gptq"])


def test_a_weight_whose_range_follows_it_gets_one() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3)).eval(), randn(8, 2, 6, 6)
    plain = quantized(model, [x])
    del plain[0].weight_quantizer._amax  # type: ignore[index, union-attr]
    better = improve(plain, [x], ["adaround"])
    assert better[0].weight_quantizer.amax.shape == (4, 1, 1, 1)  # type: ignore[index, union-attr]
    largest = plain[0].weight.detach().abs().amax((1, 2, 3), keepdim=True)  # type: ignore[index, union-attr, operator]
    assert torch.allclose(better[0].weight_quantizer.amax, largest)  # type: ignore[index, union-attr]
    assert sqnr(model, better, x) > sqnr(model, plain, x)


def test_writing_is_undone_after_an_error() -> None:
    quantizer = TensorQuantizer(QuantDescriptor(amax=3.0, scale_amax=0.5))
    tensor, other = torch.zeros(3), torch.zeros(2)
    quantizers, one = {"q": quantizer}, torch.ones(3)
    with pytest.raises(QdqError, match="gave 'q' a range that is not finite"):
        write_changes([(tensor, one)], quantizers, {"q": torch.tensor(torch.inf)}, {})
    with pytest.raises(RuntimeError, match="shape"):
        write_changes([(tensor, one), (other, one)], quantizers, {}, {})
    with pytest.raises(KeyError):
        write_changes([(tensor, one)], quantizers, {"q": torch.tensor(2.0)}, {"q": one, "unknown": one})
    assert torch.equal(tensor, torch.zeros(3)) and quantizer.pre_quant_scale is None
    assert quantizer.amax is not None and float(quantizer.amax) == 3.0
    write_changes([(tensor, one)], quantizers, {"q": torch.tensor(2.0)}, {"q": one * 2})
    write_changes([], quantizers, {}, {"q": one * 3})
    assert torch.equal(tensor, one) and float(quantizer.amax) == 4.0
    assert torch.equal(quantizer.pre_quant_scale, one * 6)  # type: ignore[arg-type]


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    section = text.split("## Models of quantized modules")[1].split("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    exec(section.split("```python")[1].split("```")[0], {})
    assert (tmp_path / "model.onnx").stat().st_size > 1000
