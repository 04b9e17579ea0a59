"""Weights with an amax for every block of a row: quantizers, calibration, conversion, algorithms, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qdq
from pipeline.helpers import randn, run_file, sqnr_db
from qdq import ExportError, QuantDescriptor, Recipe, TensorQuantizer
from qdq.calib import HistogramCalibrator, calibrate_weights
from qdq.export.readiness import enable_onnx_export
from qdq.nn import QuantConv2d, QuantLinear, quantize_modules

BLOCKS = QuantDescriptor(num_bits=4, axis=0, block_size=16)


def in_float64(weight: Tensor, block_size: int, num_bits: int, narrow_range: bool) -> np.ndarray:
    """What a quantizer with blocks gives, block by block in float64."""
    bound = 2 ** (num_bits - 1) - 1
    rows = weight.double().numpy()
    out = np.zeros_like(rows)
    for row in range(rows.shape[0]):
        for start in range(0, rows.shape[1], block_size):
            part = rows[row, start : start + block_size]
            amax = np.abs(part).max()
            if amax > 2.0**-24:
                codes = np.clip(np.rint(part * (bound / amax)), -bound - (not narrow_range), bound)
                out[row, start : start + block_size] = codes * amax / bound
    return out


class Net(nn.Module):
    """A convolution, and linears whose inputs are no multiple of the block size; the last one has no bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first = nn.Conv2d(3, 8, 3), nn.Linear(8 * 4, 40)
        self.norm, self.second = nn.BatchNorm1d(40), nn.Linear(40, 24)
        self.last = nn.Linear(24, 10, bias=False)
        self.norm.weight.data.uniform_(0.5, 2)
        self.norm.bias.data.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x)).flatten(2).mean(-1).repeat(1, 4)
        y = self.norm(torch.relu(self.first(y)))
        return self.last(torch.nn.functional.gelu(self.second(y))[:, None]).squeeze(1)


def calibrated(model: nn.Module, x: Tensor, weights: QuantDescriptor = BLOCKS) -> nn.Module:
    converted = quantize_modules(copy.deepcopy(model), Recipe(weights=weights))
    with qdq.calibrating(converted):
        converted(x)
    return converted.eval()


@torch.no_grad()
def sqnr(reference: nn.Module, model: nn.Module, x: Tensor) -> float:
    return sqnr_db([reference(x).numpy()], [model(x).numpy()])


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    block_size=st.sampled_from([1, 3, 16, 64]),
    num_bits=st.integers(2, 8),
    narrow_range=st.booleans(),
)
def test_a_quantizer_computes_block_by_block(
    rows: int, columns: int, block_size: int, num_bits: int, narrow_range: bool
) -> None:
    weight = randn(rows, columns, seed=columns) * torch.logspace(-2, 2, columns)
    quantizer = TensorQuantizer(QuantDescriptor(num_bits, axis=0, block_size=block_size, narrow_range=narrow_range))
    expected = in_float64(weight, block_size, num_bits, narrow_range)
    dynamic = quantizer(weight)
    quantizer.enable_calib()
    quantizer.disable_quant()
    assert torch.equal(quantizer(weight), weight)
    quantizer.load_calib_amax()
    quantizer.disable_calib()
    quantizer.enable_quant()
    assert quantizer.amax is not None and quantizer.amax.shape == (rows, -(-columns // block_size))
    assert torch.equal(quantizer(weight), dynamic)
    steps = torch.from_numpy(expected).abs().max() / 2 ** (num_bits - 1)
    # A value in the middle between two codes may fall to either side in float32.
    away = np.abs(dynamic.double().numpy() - expected) > 1e-5 * np.abs(expected) + 1e-12
    assert away.mean() < 0.02 or float(steps) == 0


def test_amax_of_blocks_takes_the_largest_of_all_batches_and_is_loaded() -> None:
    first, second = randn(3, 20, seed=1), randn(3, 20, seed=2)
    quantizer = TensorQuantizer(BLOCKS, if_quant=False, if_calib=True)
    for batch in (first, second):
        quantizer(batch)
    quantizer.load_calib_amax()
    both = torch.stack([first, second]).abs().amax(0)
    assert quantizer.amax is not None
    assert torch.equal(quantizer.amax, torch.stack([both[:, :16].amax(1), both[:, 16:].amax(1)], 1))
    assert "axis=0 block_size=16" in repr(quantizer) and quantizer.block_size == 16
    other = TensorQuantizer(BLOCKS)
    other.load_state_dict(quantizer.state_dict())
    assert other.amax is not None and torch.equal(other.amax, quantizer.amax)


def test_codes_and_gradients() -> None:
    weight = randn(4, 32, seed=3).requires_grad_()
    codes = TensorQuantizer(QuantDescriptor(4, axis=0, block_size=16, fake_quant=False, narrow_range=True))
    found = codes(weight.detach())
    assert codes.scale is not None and codes.scale.shape == (4, 2)
    assert torch.equal(found, found.round()) and float(found.abs().max()) == 7
    TensorQuantizer(BLOCKS)(weight).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axis": None}, r"block_size=16 cuts the rows of a matrix into blocks: set axis=0, not None"),
        ({"axis": 1}, r"set axis=0, not 1"),
        ({"num_bits": (4, 3)}, r"block_size=16 is for integers: with num_bits=\(4, 3\) set block_size=None"),
        ({"calib_method": "histogram"}, r"calibrated by the maximum of each block: set calib_method='max'"),
    ],
)
def test_descriptors_that_have_no_blocks(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorQuantizer(QuantDescriptor(**{"num_bits": 4, "axis": 0, "block_size": 16, **fields}))


def test_tensors_that_are_no_matrices() -> None:
    conv = QuantConv2d(3, 4, 3, quant_desc_weight=BLOCKS)
    with pytest.raises(ValueError, match="block_size=16 is for matrices, such as the weight of a linear; the quantize"):
        conv(randn(1, 3, 8, 8))


@pytest.mark.parametrize("method", ["max", "mse", "percentile"])
def test_weights_are_calibrated_block_by_block(method: str) -> None:
    layer = QuantLinear(40, 6, quant_desc_weight=BLOCKS)
    calibrate_weights(layer, method, percentile=99)
    amax = layer.weight_quantizer.amax
    assert amax is not None and amax.shape == (6, 3)
    for row in range(6):
        for block, part in enumerate(layer.weight[row].detach().split(16)):
            if method == "max":
                assert amax[row, block] == part.abs().max()
                continue
            calibrator = HistogramCalibrator(4, None, False, 2048)
            calibrator.collect(part)
            expected = calibrator.compute_amax(method, **({"percentile": 99} if method == "percentile" else {}))
            assert expected is not None and amax[row, block] == expected.float()
    calibrate_weights(layer, "max", perchannel=False)
    assert layer.weight_quantizer.amax is not None and layer.weight_quantizer.amax.numel() == 1
    assert torch.isfinite(layer(randn(2, 40))).all()


def test_of_a_recipe_linears_alone_take_blocks() -> None:
    model: Any = calibrated(Net().eval(), randn(4, 3, 8, 8))
    assert model.first.weight_quantizer.amax.shape == (40, 2)
    assert model.second.weight_quantizer.amax.shape == (24, 3)
    assert model.conv.weight_quantizer.block_size is None and model.conv.weight_quantizer.amax.shape == (8, 1, 1, 1)
    assert sqnr(Net().eval(), model, randn(8, 3, 8, 8, seed=5)) > 10


class Wide(nn.Module):
    """Linears of which some inputs are far larger than others; a residual block around two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)
        self.head = nn.Linear(64, 16, bias=False)
        with torch.no_grad():
            self.norm.weight[::9] *= 40

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


# Algorithms, bits, and decibels that they gain at least.
ALGORITHMS: list[tuple[Any, int, float]] = [
    (["bias_correction"], 3, 0.1),
    (["equalization"], 3, -1.5),
    (["smoothquant"], 8, 1.0),
    (["adaround"], 3, 1.0),
    ({"block_reconstruction": {"steps": 100}}, 3, 0.5),
    (["gptq"], 3, 1.0),
    (["awq"], 3, 0.1),
    (["weight_clipping"], 3, 0.2),
]


@pytest.mark.parametrize(("algorithms", "num_bits", "gain"), ALGORITHMS, ids=[next(iter(row[0])) for row in ALGORITHMS])
def test_algorithms_keep_to_blocks(algorithms: Any, num_bits: int, gain: float) -> None:
    model = Wide().eval()
    # Bias correction leaves tokens alone, and of few vectors SmoothQuant takes no factors.
    tokens = [12] if algorithms == ["smoothquant"] else []
    batches = [randn(32, *tokens, 64, seed=seed) for seed in range(6)]
    plain = calibrated(model, torch.cat(batches), QuantDescriptor(num_bits, axis=0, block_size=32))
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    better: Any = qdq.improve_modules(copy.deepcopy(plain), batches, algorithms, progress=False)
    held_out = randn(256, *tokens, 64, seed=99)
    gained = sqnr(model, better, held_out) - sqnr(model, plain, held_out)
    assert gained > gain
    after = better.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items() if name in after)
    for layer, blocks in ((better.up, 2), (better.down, 3), (better.head, 2)):
        assert layer.weight_quantizer.amax.shape == (layer.out_features, blocks)


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_the_file_computes_what_the_model_does(num_bits: int, inputs: str, tmp_path: Path) -> None:
    x = randn(6, 3, 8, 8, seed=7)
    model = calibrated(Net().eval(), x, with_fields(BLOCKS, num_bits=num_bits))
    if inputs == "float":
        for name, module in model.named_modules():
            if isinstance(module, TensorQuantizer) and "input" in name:
                module.disable()
    path = qdq.export_onnx(model, tmp_path / "model.onnx", example_inputs=(x,))
    with torch.no_grad():
        expected = model(x).numpy()
    assert sqnr_db([expected], run_file(path, [x])) > (100 if inputs == "float" else 45)
    stored = onnx.load(path)
    packed = [node for node in stored.graph.node if node.op_type == "MatMulNBits"]
    assert len(packed) == 3
    for node in packed:
        found = {a.name: a.i for a in node.attribute}
        assert found["block_size"] == 16 and found["bits"] == (8 if num_bits == 8 else 4)
        assert found["accuracy_level"] == 1


def test_other_runtimes_get_dequantize_linear_with_blocks(tmp_path: Path) -> None:
    x = randn(6, 3, 8, 8, seed=7)
    model = calibrated(Net().eval(), x)
    path = qdq.export_onnx(model, tmp_path / "model.onnx", example_inputs=(x,), target="openvino")
    nodes = [n for n in onnx.load(path).graph.node if n.op_type == "DequantizeLinear"]
    sizes = [a.i for n in nodes for a in n.attribute if a.name == "block_size"]
    assert sizes == [16, 16, 16]
    assert not any(n.op_type == "MatMulNBits" for n in onnx.load(path).graph.node)


def test_files_that_blocks_do_not_fit_into(tmp_path: Path) -> None:
    odd = QuantLinear(32, 4, quant_desc_weight=QuantDescriptor(num_bits=4, axis=0, block_size=12)).eval()
    with qdq.calibrating(odd):
        odd(randn(2, 32))
    with pytest.raises(
        ExportError, match=r"_weight_quantizer' has block_size=12, and onnxruntime computes with blocks"
    ):
        qdq.export_onnx(odd, tmp_path / "model.onnx", example_inputs=(randn(2, 32),))
    product = Product().eval()
    with qdq.calibrating(product):
        product(randn(2, 32))
    with pytest.raises(ExportError, match=r"'quantizer' has block_size=16, and what it quantizes is read by \w+"):
        qdq.export_onnx(product, tmp_path / "model.onnx", example_inputs=(randn(2, 32),))
    activations = nn.Sequential(TensorQuantizer(BLOCKS), nn.Linear(16, 4)).eval()
    with qdq.calibrating(activations):
        activations(randn(2, 16))
    with pytest.raises(ExportError, match=r"'0' has block_size=16, which files have for weights alone"):
        qdq.export_onnx(activations, tmp_path / "m.onnx", example_inputs=(randn(2, 16),), dynamic_shapes="static")
    layer = QuantLinear(32, 4, quant_desc_weight=BLOCKS).eval()
    with qdq.calibrating(layer):
        layer(randn(2, 32))
    message = "with block_size cannot be exported by torch.onnx.export: qdq.export_onnx writes it"
    with enable_onnx_export(), pytest.raises(AssertionError, match=message):
        layer(randn(2, 32))
    assert not list(tmp_path.iterdir())


class Product(nn.Module):
    """A product with a quantized matrix that is no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.quantizer = nn.Parameter(randn(8, 32)), TensorQuantizer(BLOCKS)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.quantizer(self.weight).transpose(0, 1)


def with_fields(descriptor: QuantDescriptor, **fields: Any) -> QuantDescriptor:
    return QuantDescriptor(**{**descriptor.dict(), **fields})
