"""qdq.calibrating: the same amax as the documented loops find, everything else as before, and errors that name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdq
from qdq import CalibrationError, QdqError, QuantDescriptor, Recipe, TensorQuantizer
from qdq.calib import HistogramCalibrator, MaxCalibrator
from qdq.modules.calibration import METHODS
from qdq.nn import QuantLinear, quantize_modules


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).amax((2, 3))
        return self.fc(self.drop(x))


def net(recipe: Recipe | None = None) -> Net:
    torch.manual_seed(0)
    model = quantize_modules(Net(), recipe)
    for quantizer in (model.unused._input_quantizer, model.unused._weight_quantizer):
        quantizer.disable()
    return model.eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 2, 6, 6, generator=generator) * (1 + i) for i in range(3)]


def quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TensorQuantizer)}


def amaxes(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith("_amax")}


def flags(model: nn.Module) -> dict[str, Any]:
    stages = ("_disabled", "_if_quant", "_if_clip", "_if_calib", "_calibrator")
    found: dict[str, Any] = {n: [getattr(q, s) for s in stages] for n, q in quantizers(model).items()}
    return found | {f"{name}.training": m.training for name, m in model.named_modules()}


def documented_loop(model: nn.Module, **kwargs: Any) -> None:
    """The loop of the published toolkit's documentation."""
    for module in quantizers(model).values():
        if module._calibrator is not None:
            module.disable_quant()
            module.enable_calib()
        else:
            module.disable()
    with torch.no_grad():
        for x in batches():
            model(x)
    for name, module in quantizers(model).items():
        if name.startswith("unused"):
            continue
        if module._calibrator is not None:
            module.enable_quant()
            module.disable_calib()
            if isinstance(module._calibrator, MaxCalibrator):
                module.load_calib_amax()
            else:
                module.load_calib_amax(**kwargs)
        else:
            module.enable()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("method", "arguments"),
    [("max", {}), ("entropy", {}), ("mse", {}), ("percentile", {}), ("percentile", {"percentile": 90.0})],
)
def test_the_documented_loop_finds_the_same_amax(method: str, arguments: dict[str, float], bits: int) -> None:
    calib_method = "max" if method == "max" else "histogram"
    recipe = Recipe(activations=QuantDescriptor(bits, calib_method=calib_method), weights=QuantDescriptor(bits, axis=0))
    by_hand, model = net(recipe), net(recipe)
    documented_loop(by_hand, method=method, **arguments)
    with qdq.calibrating(model, method, **arguments):
        for x in batches():
            model(x)
    expected, found = amaxes(by_hand), amaxes(model)
    assert len(expected) == 4 and expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(model(batches()[0]), by_hand(batches()[0]))


def test_any_calibrator_of_the_model_is_replaced_by_the_fitting_one_for_the_block() -> None:
    model = net()  # MaxCalibrator everywhere
    with qdq.calibrating(model, "mse"):
        kinds = {n: type(q._calibrator._inner) for n, q in quantizers(model).items() if not q.disabled}  # type: ignore[union-attr]
        for x in batches():
            model(x)
    assert kinds == {
        "conv._input_quantizer": HistogramCalibrator,
        "conv._weight_quantizer": MaxCalibrator,  # it has an axis
        "fc._input_quantizer": HistogramCalibrator,
        "fc._weight_quantizer": MaxCalibrator,
    }
    weight = model.conv.weight.detach().abs().amax((1, 2, 3), keepdim=True)
    assert torch.equal(model.conv._weight_quantizer.amax, weight)


def test_the_block_computes_in_float_in_eval_mode_without_gradients() -> None:
    model = net().train()
    reference = Net().eval()
    reference.load_state_dict(model.state_dict())
    statistics = model.norm.running_mean.clone()
    x = batches()[0]
    with qdq.calibrating(model) as progress:
        assert not any(module.training for module in model.modules())
        y = model(x)
        assert repr(progress) == "CalibrationProgress(4 of 4 quantizers have seen data)"
    assert not y.requires_grad and torch.equal(y, reference(x))
    assert torch.equal(model.norm.running_mean, statistics)
    assert torch.is_grad_enabled() and model(x).requires_grad


def test_what_was_seen_is_told() -> None:
    model = net()
    with qdq.calibrating(model, strict=False) as progress:
        assert progress.seen == [] and progress.unseen == progress.names
        model.conv(batches()[0])
        assert progress.seen == ["conv._input_quantizer", "conv._weight_quantizer"]
        assert progress.unseen == ["fc._input_quantizer", "fc._weight_quantizer"]
        model(batches()[0])
    assert progress.unseen == []


def test_everything_else_is_as_before() -> None:
    model = net().train()
    model.norm.eval()
    model.fc._input_quantizer.disable_quant()
    model.conv._weight_quantizer.enable_calib()
    before = flags(model)
    with qdq.calibrating(model, "percentile"):
        model(batches()[0])
    assert flags(model) == before


def test_data_go_on_from_nothing_at_every_block() -> None:
    model = net()
    for scale in (4.0, 0.5):
        with qdq.calibrating(model):
            model(batches()[0] * scale)
        assert float(model.conv._input_quantizer.amax) == float((batches()[0] * scale).abs().max())
    with qdq.calibrating(model, "entropy"):
        model(batches()[0])
    assert float(model.conv._input_quantizer.amax) < float(batches()[0].abs().max())


def test_an_exception_in_the_block_changes_nothing() -> None:
    model = net()
    with qdq.calibrating(model):
        model(batches()[0])
    amax, before = amaxes(model), flags(model.train())

    def stopped() -> None:
        with qdq.calibrating(model, "mse"):
            model(batches()[2])
            raise KeyError

    with pytest.raises(KeyError):
        stopped()
    assert flags(model) == before and torch.is_grad_enabled()
    assert all(torch.equal(value, amax[name]) for name, value in amaxes(model).items())
    with qdq.calibrating(model):
        model(batches()[0])  # and the model can be calibrated again


def test_quantizers_without_data_are_named() -> None:
    model = net()
    before = flags(model)
    model.conv._input_quantizer.amax = 3.0
    message = (
        "2 quantizers saw no data: fc._input_quantizer, fc._weight_quantizer. No amax was changed: calibrate with data "
        "that reach these parts of the model, disable those that are not used, or pass strict=False"
    )
    with pytest.raises(CalibrationError, match=message), qdq.calibrating(model):
        model.conv(batches()[0])
    assert float(model.conv._input_quantizer.amax) == 3.0 and flags(model) == before

    def little() -> None:
        with qdq.calibrating(model, strict=False):
            model.conv(batches()[0])

    with pytest.warns(UserWarning, match="2 quantizers saw no data: fc._.*; their amax is as before") as caught:
        little()
    assert caught[0].filename == __file__
    assert float(model.conv._input_quantizer.amax) != 3.0 and model.fc._input_quantizer.amax is None


def test_an_empty_batch_is_no_data() -> None:
    model = nn.Sequential(QuantLinear(4, 3))
    with pytest.raises(CalibrationError, match="1 quantizers saw no data: 0._input_quantizer"), qdq.calibrating(model):
        model(torch.empty(0, 4))


def test_no_run_at_all_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="4 quantizers saw no data"), qdq.calibrating(net()):
        pass


def test_disabled_quantizers_stay_disabled_and_are_not_required() -> None:
    model = net()
    model.fc._weight_quantizer.disable()
    with qdq.calibrating(model) as progress:
        model(batches()[0])
    assert "fc._weight_quantizer" not in progress.names
    assert model.fc._weight_quantizer.disabled and model.fc._weight_quantizer.amax is None


def test_learned_ranges_start_at_the_amax() -> None:
    learned = QuantDescriptor(learn_amax=True)
    model = nn.Sequential(QuantLinear(4, 4, quant_desc_input=learned), QuantLinear(4, 2))
    model[0]._input_quantizer.enable_clip()
    x = torch.randn(8, 4) * 5
    with qdq.calibrating(model):
        assert torch.equal(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias))
        model(x)
    clip = model[0]._input_quantizer.clip
    assert torch.equal(clip.clip_value_max, x.abs().max()) and torch.equal(clip.clip_value_min, -x.abs().max())
    assert model[0]._input_quantizer._if_clip
    model(x).sum().backward()
    assert clip.clip_value_max.grad is not None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_are_not_finite_are_an_error_that_names_the_first_quantizer(method: str, value: float) -> None:
    model = net()
    x = batches()[0]
    x[1, 0, 2, 3] = value
    message = "quantizer conv._input_quantizer: the data that reach it hold NaN or infinite values; no amax was changed"
    with pytest.raises(CalibrationError, match=message), qdq.calibrating(model, method):
        model(x)
    assert amaxes(model) == {}


def test_e4m3_is_calibrated_but_not_by_entropy() -> None:
    model = net(Recipe(activations=QuantDescriptor(num_bits=(4, 3))))
    message = "entropy is not defined for E4M3, choose max, mse or percentile: conv._input_quantizer, fc._inp"
    with pytest.raises(CalibrationError, match=message), qdq.calibrating(model, "entropy"):
        pass
    with qdq.calibrating(model, "mse"):
        model(batches()[0])
    assert 0 < float(model.conv._input_quantizer.amax) <= float(batches()[0].abs().max())


def test_recurrent_and_attention_layers() -> None:
    model = quantize_modules(nn.ModuleList([nn.LSTM(3, 4, 2), nn.MultiheadAttention(4, 2)]))
    with qdq.calibrating(model, "percentile") as progress:
        y = model[0](torch.randn(5, 2, 3))[0]
        model[1](y, y, y)
    assert len(progress.seen) == 4 + 12
    assert all(q.amax is not None for q in quantizers(model).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    for method in METHODS:
        with qdq.calibrating(model, method):
            model(batches()[0].to(dtype))
        assert {q.amax.dtype for q in quantizers(model).values() if q.amax is not None} == {torch.float32}


def test_nested_blocks_are_refused_where_they_share_quantizers() -> None:
    model = net()
    with qdq.calibrating(model):
        with pytest.raises(CalibrationError, match="in an outer block already: quantizer _input_quantizer"):
            qdq.calibrating(model.conv).__enter__()
        with qdq.calibrating(other := net()):
            other(batches()[0])
        model(batches()[0])
    assert len(amaxes(model)) == len(amaxes(other)) == 4


def test_arguments_are_checked_at_the_call() -> None:
    model = net()
    with pytest.raises(ValueError, match="unknown calibration method 'kl': choose one of max, entropy, mse, perc"):
        qdq.calibrating(model, "kl")
    wrong: Any
    for wrong in (101, 50, "99", None, True):
        with pytest.raises(ValueError, match=f"percentile must be a number above 50 and up to 100, got {wrong!r}"):
            qdq.calibrating(model, "percentile", percentile=wrong)
    for wrong in (0, 127, 200.5, "a", True):
        with pytest.raises(ValueError, match=f"num_bins must be an integer of at least 128, got {wrong!r}"):
            qdq.calibrating(model, num_bins=wrong)
    with pytest.raises(QdqError, match="model must be a torch.nn.Module, not function"):
        qdq.calibrating(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="no quantizers: convert it with qdq.nn.quantize_modules first"):
        qdq.calibrating(Net()).__enter__()


def test_num_bins_reaches_the_histograms() -> None:
    found = []
    for num_bins in (128, 2048):
        model = net()
        with qdq.calibrating(model, "percentile", num_bins=num_bins):
            model(batches()[0])
        calibrator = HistogramCalibrator(num_bins=num_bins)
        calibrator.collect(batches()[0])
        found.append(model.conv._input_quantizer.amax)
        assert torch.equal(found[-1], calibrator.compute_amax("percentile"))  # type: ignore[arg-type]
    assert not torch.equal(*found)


# PyTorch's own compiler instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_is_calibrated() -> None:
    model = quantize_modules(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    x = torch.randn(5, 4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with qdq.calibrating(model, "percentile"):
        compiled(x)
    assert all(q.amax is not None for q in model.modules() if isinstance(q, TensorQuantizer))
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("method", ["max", "percentile"])
def test_calibration_in_inference_mode_leaves_a_model_that_trains(method: str) -> None:
    model = quantize_modules(nn.Sequential(nn.Linear(4, 3)))
    x = torch.randn(5, 4)
    with torch.inference_mode(), qdq.calibrating(model, method):
        model(x)
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    with qdq.calibrating(model, method):
        model(x)
    model[0].input_quantizer.amax = 2.0


def test_negative_data_for_an_unsigned_quantizer_is_named() -> None:
    model = quantize_modules(nn.Sequential(nn.Linear(4, 3)), Recipe(activations=QuantDescriptor(unsigned=True)))
    with (
        pytest.raises(CalibrationError, match="quantizer 0._input_quantizer is unsigned, and negative values"),
        qdq.calibrating(model),
    ):
        model(-torch.ones(1, 4))


def test_load_calib_amax_inside_the_block() -> None:
    model = quantize_modules(nn.Sequential(nn.Linear(4, 3)))
    with qdq.calibrating(model, "max"):
        model(torch.ones(1, 4))
        model[0].input_quantizer.load_calib_amax()
        assert model[0].input_quantizer.amax == 1
        model(2 * torch.ones(1, 4))
    assert model[0].input_quantizer.amax == 2


def test_meta_tensors_are_refused() -> None:
    model = quantize_modules(nn.Sequential(nn.Linear(4, 3)).to("meta"))
    message = "tensors of the meta device have no values to calibrate with"
    with pytest.raises(CalibrationError, match=message), qdq.calibrating(model):
        model(torch.ones(1, 4, device="meta"))
