"""Weights of few bits in files: what is stored, what ONNX Runtime makes of it, and that it computes the simulation."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import fx, nn

import qdq
from fixtures.transformers import MaskedEncoder, masked_sequences
from pipeline.helpers import deploy, operations, optimized_graph, quantize, randn, run_file, run_model, sqnr_db
from qdq import QuantDescriptor, Recipe
from qdq.constant_quantizers import WeightQuantizer
from qdq.graph.targets import ONNXRUNTIME

# Float rounding is all that may differ.
EXACT_DB = 100.0
# As DequantizeLinear and MatMul, which ONNX Runtime makes MatMulNBits of where nothing else reads their constants.
STANDARD = dataclasses.replace(ONNXRUNTIME, matmul_nbits=False)


def weights(bits: int, block_size: int | None = None, axis: int | None = 0) -> QuantDescriptor:
    return QuantDescriptor(bits, axis=axis, narrow_range=True, block_size=block_size)


def weight_only(bits: int, block_size: int | None = None) -> Recipe:
    return Recipe(weights=weights(bits, block_size), activations="float", algorithms={})


def seeded(model: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 1) ** 0.5)
    return model.eval()


def stored(path: Path) -> dict[str, tuple[onnx.TensorProto, onnx.NodeProto, onnx.TensorProto]]:
    """By the name of their quantizer: codes, DequantizeLinear and step sizes."""
    graph = onnx.load(path).graph
    constants = {t.name: t for t in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            (name,) = (p.value for p in node.metadata_props if p.key == "qdq.quantizer")
            found[name] = constants[node.input[0]], node, constants[node.input[1]]
    return found


def check_stored(qmodel: fx.GraphModule, path: Path, transposed: tuple[str, ...]) -> None:
    """That codes and step sizes in a file are those of the quantizers."""
    file = stored(path)
    quantizers = {m.name: m for m in qmodel.modules() if isinstance(m, WeightQuantizer)}
    assert set(file) >= set(quantizers)
    for name, quantizer in quantizers.items():
        codes, node, steps = file[name]
        attributes = {a.name: a.i for a in node.attribute}
        weight = qmodel.get_parameter(name.removesuffix("_quantizer"))
        expected = quantizer.codes(weight)
        turned = name in transposed
        want = expected.t() if turned else expected
        four = quantizer.num_bits <= 4
        assert codes.data_type == (TensorProto.INT4 if four else TensorProto.INT8)
        assert len(codes.raw_data) == (-(-want.numel() // 2) if four else want.numel())
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(codes).astype(np.int8), want.numpy())
        step = onnx.numpy_helper.to_array(steps)
        if quantizer.block_size is None:
            assert attributes == {"axis": int(turned)}
            np.testing.assert_array_equal(step, quantizer.step_size.numpy())
        else:
            assert attributes == {"axis": 1 - int(turned), "block_size": quantizer.block_size}
            np.testing.assert_array_equal(step.T if turned else step, quantizer.step_size.numpy())


class ManyBits(nn.Module):
    """Linears of odd sizes, of 2 to 8 bits, some without bias; one has one output."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [100, 33, 17, 40, 129, 7, 64, 1]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=i % 2 == 0) for i, (a, b) in enumerate(pairwise(sizes)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(2 * layer(x))
        return self.layers[-1](x)


@pytest.mark.parametrize(("block_size", "shape"), [(None, (2, 3, 100)), (32, (5, 100))], ids=["channels", "blocks"])
def test_linears_of_2_to_8_bits_run_as_simulated(
    block_size: int | None, shape: tuple[int, ...], tmp_path: Path
) -> None:
    recipe = dataclasses.replace(
        weight_only(8, block_size),
        overrides={f"layers.{i}": qdq.Override(weights=weights(i + 2, block_size)) for i in range(7)},
    )
    model, data = seeded(ManyBits()), [randn(*shape)]
    qmodel, path, fidelity = deploy(model, data, tmp_path / "m.onnx", recipe=recipe, target=STANDARD)
    assert [m.num_bits for m in qmodel.modules() if isinstance(m, WeightQuantizer)] == [2, 3, 4, 5, 6, 7, 8]
    check_stored(qmodel, path, tuple(f"layers.{i}.weight_quantizer" for i in range(7)))
    # What a linear reads is rounded after a tanh, whose last bit PyTorch and the runtime may round otherwise: a value
    # beside the middle of two codes then gets the other one.
    others = [qdq.verify(qmodel, path, [randn(*shape, seed=seed)], progress=False) for seed in range(1, 5)]
    exact = sorted(found.sqnr_db for found in (fidelity, *others))
    assert exact[2] > EXACT_DB and exact[0] > 40
    executed = operations(optimized_graph(path))
    assert executed["MatMulNBits"] == 7 and executed["DequantizeLinear"] == 0
    # The runtime rounds what these linears read: a simulation without it is far from the file.
    in_float = quantize(model, data, recipe=recipe, target=dataclasses.replace(ONNXRUNTIME, rounds_inputs=None))
    assert 15 < sqnr_db(run_file(path, data), run_model(in_float, data)) < 60


@pytest.mark.parametrize("target", [ONNXRUNTIME, STANDARD], ids=["packed", "standard"])
@pytest.mark.parametrize(("bits", "inputs", "block_size"), [(4, 64, 128), (8, 50, 256), (3, 300, 256)])
def test_blocks_may_be_longer_than_the_weight(
    bits: int, inputs: int, block_size: int, target: Any, tmp_path: Path
) -> None:
    model, data = seeded(nn.Sequential(nn.Linear(inputs, 24))), [randn(8, inputs)]
    recipe = weight_only(bits, block_size)
    _, path, fidelity = deploy(model, data, tmp_path / "m.onnx", recipe=recipe, target=target)
    assert fidelity.sqnr_db > EXACT_DB and operations(optimized_graph(path))["MatMulNBits"] == 1


@pytest.mark.parametrize(
    ("level", "bits", "block_size"),
    [(4, 2, None), (4, 3, 32), (4, 5, 16), (4, 6, None), (4, 7, 64), (4, 8, None), (1, 4, None)],
)
def test_linears_are_stored_packed_where_the_target_says_so(
    level: int, bits: int, block_size: int | None, tmp_path: Path
) -> None:
    target = dataclasses.replace(ONNXRUNTIME, matmul_nbits=True, rounds_inputs=32 if level == 4 else None)
    model = seeded(nn.Sequential(nn.Linear(70, 9), nn.ReLU(), nn.Linear(9, 4, bias=False)))
    recipe = weight_only(bits, block_size)
    qmodel, path, fidelity = deploy(model, [randn(2, 5, 70)], tmp_path / "m.onnx", recipe=recipe, target=target)
    assert fidelity.sqnr_db > EXACT_DB
    graph = onnx.load(path).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    nodes = [n for n in graph.node if n.op_type == "MatMulNBits"]
    assert len(nodes) == 2 and not any(n.op_type == "DequantizeLinear" for n in graph.node)
    linear: Any
    quantizer: Any
    for node, index in zip(nodes, (0, 2), strict=True):
        given = {a.name: a.i for a in node.attribute}
        linear, quantizer = qmodel.get_submodule(str(index)), qmodel.get_submodule(f"{index}.weight_quantizer")
        outputs, inputs = linear.weight.shape
        width = 4 if bits <= 4 else 8
        assert given == {
            "K": inputs, "N": outputs, "bits": width, "block_size": block_size or 32, "accuracy_level": level
        }  # fmt: skip
        packed = constants[node.input[1]].reshape(outputs, -1).astype(np.int16)
        if width == 4:
            packed = np.stack([packed & 15, packed >> 4], -1).reshape(outputs, -1)
        codes = packed[:, :inputs] - 2 ** (width - 1)
        np.testing.assert_array_equal(codes, quantizer.codes(linear.weight).numpy())


class Mixed(nn.Module):
    """An embedding tied to the last linear, one linear used twice, a matrix product, and layers of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 48)
        self.twice = nn.Linear(48, 48)
        self.matrix = nn.Parameter(torch.zeros(48, 48))
        self.narrow, self.wide = nn.Linear(48, 1), nn.Linear(1, 48)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.twice(self.twice(self.words(ids))))
        x = torch.tanh(x @ self.matrix)
        return nn.functional.linear(x + self.wide(self.narrow(x)), self.words.weight)


@pytest.mark.parametrize("block_size", [None, 32], ids=["channels", "blocks"])
def test_shared_weights_matrix_products_and_single_channels(block_size: int | None, tmp_path: Path) -> None:
    ids = torch.arange(10).reshape(2, 5) * 4
    qmodel, path, fidelity = deploy(
        seeded(Mixed()), [ids], tmp_path / "m.onnx", recipe=weight_only(4, block_size), target=STANDARD
    )
    assert fidelity.sqnr_db > EXACT_DB
    quantizers = {m.name: m for m in qmodel.modules() if isinstance(m, WeightQuantizer)}
    # Rows of a table have one step size each; a linear on the same weight with blocks needs codes of its own.
    assert len(quantizers) == (5 if block_size is None else 6)
    table = [q for n, q in quantizers.items() if n.startswith("words") and q.block_size is None]
    assert len(table) == 1 and table[0].stored_bits == 8
    (matrix,) = (n for n in quantizers if n.startswith("matrix"))
    codes, _, steps = stored(path)[matrix]
    expected = quantizers[matrix].codes(qmodel.get_parameter(matrix.removesuffix("_quantizer")))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(codes).astype(np.int8), expected.t().numpy())
    assert list(steps.dims) == ([48] if block_size is None else [2, 48])
    assert operations(optimized_graph(path))["MatMulNBits"] == 6
    # What two linears share is stored once, in the form that ONNX Runtime would otherwise not make of it.
    packed = [n for n in onnx.load(path).graph.node if n.op_type == "MatMulNBits"]
    assert len(packed) == (3 if block_size is None else 2) and packed[0].input[1] == packed[1].input[1]


def test_convolutions_of_4_bits(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 1, 1),
        nn.ConvTranspose2d(1, 5, 3),
        nn.Conv2d(5, 3, 1),
    )
    qmodel, path, fidelity = deploy(seeded(model), [randn(2, 3, 9, 9)], tmp_path / "m.onnx", recipe=weight_only(4, 32))
    assert fidelity.sqnr_db > EXACT_DB
    file = stored(path)
    quantizers = {m.name: m for m in qmodel.modules() if isinstance(m, WeightQuantizer)}
    assert set(file) == set(quantizers) == {f"{i}.weight_quantizer" for i in (0, 2, 3, 4, 5)}
    for name, quantizer in quantizers.items():
        codes, node, steps = file[name]
        expected = quantizer.codes(qmodel.get_parameter(name.removesuffix("_quantizer")))
        assert codes.data_type == TensorProto.INT4 and quantizer.block_size is None
        assert {a.name: a.i for a in node.attribute} == {"axis": 1 if name.startswith("4") else 0}
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(codes).astype(np.int8), expected.numpy())
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(steps), quantizer.step_size.numpy())


@pytest.mark.parametrize("head", [weights(4), weights(8, 32)], ids=["4 bits", "8 bits in blocks"])
def test_float_linear_behind_integer_convolutions(head: QuantDescriptor, tmp_path: Path) -> None:
    """With DequantizeLinear on both operands ONNX Runtime 1.32 would make MatMulIntegerToFloat, and fail in blocks."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10, bias=False))
    recipe = Recipe(overrides={"3": qdq.Override(weights=head, activations="float")})
    qmodel, path, fidelity = deploy(
        seeded(model), [randn(4, 4, 8, 8)], tmp_path / "m.onnx", recipe=recipe, target=STANDARD
    )
    executed = operations(optimized_graph(path))
    assert executed["QLinearConv"] == executed["MatMulNBits"] == 1 and executed["MatMul"] == executed["Gemm"] == 0
    assert fidelity.sqnr_db > EXACT_DB
    entry = qdq.explain(qmodel).find("3.weight")
    assert entry.quantized and f"{head.num_bits} bits" in entry.reason and "weight only" in entry.reason


def test_targets_without_rounding_store_dequantize_linear_alone(tmp_path: Path) -> None:
    model = seeded(nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 4)))
    recipe = weight_only(4, 16)
    qmodel, path, fidelity = deploy(model, [randn(3, 40)], tmp_path / "m.onnx", recipe=recipe, target="tensorrt")
    check_stored(qmodel, path, ("0.weight_quantizer", "2.weight_quantizer"))
    assert fidelity.sqnr_db > EXACT_DB
    assert operations(onnx.load(path))["MatMulNBits"] == 0


def test_a_file_of_4_bits_is_a_seventh_of_float(tmp_path: Path) -> None:
    model, data = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)), [randn(2, 512)]
    whole = qdq.export_onnx(model, tmp_path / "f.onnx", example_inputs=data[0]).stat().st_size
    small = qdq.export_onnx(quantize(model, data, recipe=weight_only(4, 128)), tmp_path / "q.onnx").stat().st_size
    assert whole / 8 < small < whole / 7


def test_layers_that_are_alike(tmp_path: Path) -> None:
    """Equal constants are stored once, and DequantizeLinear of shared ones would not become MatMulNBits."""
    model = seeded(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)))
    model[2].load_state_dict(model[0].state_dict())
    _, path, fidelity = deploy(model, [randn(2, 3, 64)], tmp_path / "m.onnx", recipe=weight_only(8))
    assert operations(onnx.load(path))["MatMulNBits"] == 2
    assert fidelity.sqnr_db > 60  # a difference in the last bit may give another code, here and there


def test_encoder_in_blocks(tmp_path: Path) -> None:
    model, data = MaskedEncoder().eval(), masked_sequences(3)
    recipe = Recipe(weights=weights(4, 32))
    _, path, fidelity = deploy(model, [data], tmp_path / "m.onnx", recipe=recipe)
    assert operations(onnx.load(path))["MatMulNBits"] == 9 and fidelity.sqnr_db > 45  # as above
