"""TensorQuantizer: state dicts, copies, its printed form, tracing, and readiness for ONNX."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdq.descriptor import QuantDescriptor
from qdq.quantizer import TensorQuantizer


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(5))


def make(**fields: Any) -> TensorQuantizer:
    return TensorQuantizer(QuantDescriptor(**fields))


def model(**fields: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), make(**fields), make(axis=0))


def test_state_dict_creates_what_is_missing() -> None:
    source = model(amax=2.0)
    source[2].amax = [[1.0], [2.0]]
    source[2].pre_quant_scale = 3.0
    target = model()
    target.load_state_dict(source.state_dict())
    assert target.state_dict().keys() == source.state_dict().keys()
    assert target[1].amax == 2
    assert target[2].amax.tolist() == [[1], [2]]
    assert target[2].pre_quant_scale == 3
    assert target[2].amax.data_ptr() != source[2].amax.data_ptr()
    missing = target.load_state_dict(model().state_dict(), strict=False)
    assert missing.missing_keys == ["1._amax", "2._amax", "2._pre_quant_scale"]


# PyTorch warns that loading into a meta tensor does nothing.
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")
def test_state_dict_is_loaded_onto_the_modules_own_device() -> None:
    state = model(amax=2.0).state_dict()
    on_meta = model().to("meta")
    on_meta.load_state_dict(state, strict=False, assign=False)
    assert on_meta[1].amax.device.type == "meta"
    with torch.device("meta"):
        born_there = model()
    born_there.load_state_dict({"1._amax": torch.tensor(1.0)}, strict=False)
    assert born_there[1]._amax.device.type == "meta"
    born_there[1].amax = 3.0
    assert born_there[1]._amax.device.type == "meta"
    back = born_there.to_empty(device="cpu")
    assert back[2]._device.type == "cpu"


def test_a_state_dict_with_bad_amax() -> None:
    q = model()
    for bad in (-1.0, float("inf")):
        with pytest.raises(ValueError, match="negative or infinite amax for the quantizer '1'"):
            q.load_state_dict({"1._amax": torch.tensor(bad)}, strict=False)
    assert q[1].amax is None
    with pytest.warns(UserWarning, match="quantizers that were never calibrated.*: 1$"):
        q.load_state_dict({"1._amax": torch.tensor(float("nan"))}, strict=False)
    assert q[1].amax.isnan()


@pytest.mark.parametrize(
    "fields", [{}, {"amax": 1.0}, {"axis": 0}, {"learn_amax": True}, {"calib_method": "histogram"}]
)
def test_copies_and_pickles(fields: dict[str, Any], x: Tensor) -> None:
    q = make(**fields)
    expected = q(x)
    q.enable_calib()
    q(x)
    for again in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(again(x), expected)
        assert repr(again) == repr(q)
    codes = make(fake_quant=False)
    codes(x.requires_grad_())
    assert copy.deepcopy(codes).scale == codes.scale


def test_repr_is_one_line() -> None:
    assert repr(TensorQuantizer()) == (
        "TensorQuantizer(8bit fake per-tensor amax=dynamic calibrator=MaxCalibrator quant)"
    )
    q = TensorQuantizer(QuantDescriptor(num_bits=4, axis=(0,), narrow_range=True, unsigned=True, scale_amax=0.5))
    q.amax = [[1.0], [2.5]]
    q.enable_calib()
    assert repr(q) == (
        "TensorQuantizer(unsigned narrow 4bit fake axis=(0,) amax=[1, 2.5](2)*0.5 calibrator=MaxCalibrator quant+calib)"
    )
    assert repr(make(amax=1.5, fake_quant=False)).startswith("TensorQuantizer(8bit codes per-tensor amax=1.5 ")
    assert "learned[-1, 1]" in repr(make(learn_amax=True))
    assert "amax=[](0)" in repr(make(amax=[]))
    assert "amax=meta" in repr(make(amax=1.0).to("meta"))
    assert repr(TensorQuantizer(disabled=True)) == "TensorQuantizer(disabled)"
    q.disable_quant()
    q.disable_calib()
    q._calibrator = None
    assert repr(q).endswith("calibrator=none off)")


TRACED = [{}, {"axis": 0}, {"amax": 1.0}, {"num_bits": (4, 3)}, {"learn_amax": True}, {"fake_quant": False}]


@pytest.mark.parametrize("fields", TRACED, ids=str)
# PyTorch's own compiler instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_and_exports(fields: dict[str, Any], x: Tensor) -> None:
    q = make(**fields)
    torch.compiler.reset()
    compiled = torch.compile(q, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), q(x))
    sizes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(q, (x,), dynamic_shapes=sizes)
    longer = torch.cat([x, x * 2])
    assert torch.equal(program.module()(longer), q(longer))


def test_meta_tensors() -> None:
    out = make(axis=1).to("meta")(torch.empty(4, 3, device="meta"))
    assert (out.shape, out.device.type) == ((4, 3), "meta")


def test_vmap(x: Tensor) -> None:
    q = TensorQuantizer()
    assert torch.equal(torch.func.vmap(q)(x), torch.stack([q(row) for row in x]))


def test_readiness_is_checked_while_the_flag_is_set(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorQuantizer, "_enable_onnx_export", True)
    for q in (TensorQuantizer(), TensorQuantizer(disabled=True)):
        with pytest.raises(AssertionError, match="a quantizer without amax cannot be exported to ONNX"):
            q(x)
    q = make(num_bits=(4, 3), amax=[[[1.0], [1.0], [2.0]]])
    with pytest.raises(AssertionError, match="E4M3 can only be exported to ONNX with one amax per tensor"):
        q(x)
    assert make(amax=1.0)(x).shape == x.shape
