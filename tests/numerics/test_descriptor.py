"""QuantDescriptor: every rule of its table, equality, hash, and round trips of every field."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qdq.descriptor as module
from qdq.descriptor import QuantDescriptor, ScaledQuantDescriptor

FIELDS = {
    "num_bits": (4, (4, 3), 16),
    "name": ("layer.weight",),
    "fake_quant": (False,),
    "axis": (0, -1, (0,), (0, 2)),
    "amax": (1.5, [1.0, 2.0], np.array([[1.0], [2.0]]), [0.1], float("nan")),
    "learn_amax": (True,),
    "scale_amax": (0.9,),
    "calib_method": ("histogram",),
    "unsigned": (True,),
    "narrow_range": (True,),
}


def test_defaults() -> None:
    d = QuantDescriptor()
    assert (d.num_bits, d.name, d.fake_quant, d.axis, d.amax) == (8, None, True, None, None)
    assert (d.learn_amax, d.scale_amax, d.calib_method, d.unsigned, d.narrow_range) == (
        False,
        None,
        "max",
        False,
        False,
    )
    assert d.dict() == {"num_bits": 8, "name": None}
    assert QuantDescriptor(4, "x") == QuantDescriptor(name="x", num_bits=4)


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in FIELDS.items() for v in values])
def test_every_field_survives_every_round_trip(field: str, value: Any) -> None:
    d = QuantDescriptor(**{field: value})
    assert d != QuantDescriptor()
    for again in (
        QuantDescriptor(**d.dict()),
        QuantDescriptor.from_yaml(d.to_yaml()),
        copy.deepcopy(d),
        pickle.loads(pickle.dumps(d)),
    ):
        assert again == d
        assert hash(again) == hash(d)
        np.testing.assert_array_equal(getattr(again, field), getattr(d, field))
        assert type(getattr(again, field)) is type(getattr(d, field))
    assert "\n" not in str(d)
    assert field in str(d)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "num_bits": st.one_of(st.integers(1, 32), st.just((4, 3))),
            "name": st.text(st.characters(codec="utf-8"), max_size=5),
            "fake_quant": st.booleans(),
            "axis": st.one_of(st.none(), st.integers(-4, 3), st.lists(st.integers(0, 3)).map(tuple)),
            "amax": st.one_of(
                st.none(), st.floats(0, 2.0**99, width=32), st.lists(st.floats(0, 9, width=32), min_size=1)
            ),
            "scale_amax": st.floats(0.1, 2),
            "calib_method": st.sampled_from(["max", "histogram"]),
            "unsigned": st.booleans(),
            "narrow_range": st.booleans(),
        },
    )
)
def test_any_combination_survives_yaml(fields: dict[str, Any]) -> None:
    d = QuantDescriptor(**fields)
    assert QuantDescriptor.from_yaml(d.to_yaml()) == d
    assert QuantDescriptor(**d.dict()) == d


def test_equality_is_by_value() -> None:
    assert QuantDescriptor(amax=[1.0, 2.0]) == QuantDescriptor(amax=np.array([1, 2]))
    assert QuantDescriptor(amax=[1.0]) != QuantDescriptor(amax=1.0)
    assert QuantDescriptor() != 8
    assert QuantDescriptor().__eq__(object()) is NotImplemented
    assert len({QuantDescriptor(), QuantDescriptor(8), QuantDescriptor(amax=1.0)}) == 2


def test_fields_are_read_only() -> None:
    d = QuantDescriptor(amax=[1.0, 2.0])
    for field in FIELDS:
        with pytest.raises(AttributeError):
            setattr(d, field, 1)
    assert d.amax is not None
    assert d.amax.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        d.amax[0] = 5


def test_amax_is_copied() -> None:
    mine = np.array([1.0, 2.0], dtype=np.float32)
    d = QuantDescriptor(amax=mine)
    mine[0] = 9
    assert d.amax is not None
    assert d.amax.tolist() == [1, 2]


@pytest.mark.parametrize("bits", [(5, 2), (7, 3), [4, 3], "8", 8.0, None])
def test_num_bits_of_another_type_is_refused(bits: Any) -> None:
    with pytest.raises(TypeError, match="num_bits must be an integer, or"):
        QuantDescriptor(bits)


def test_num_bits_limits(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="num_bits must not be negative, got -1"):
        QuantDescriptor(-1)
    assert not caplog.records
    with caplog.at_level(logging.ERROR, logger="qdq"):
        assert QuantDescriptor(0).num_bits == 0
    assert "num_bits=0" in caplog.text
    assert QuantDescriptor(True).num_bits == 1


@pytest.mark.parametrize("amax", [1, True, "1", torch.tensor(1.0), (1.0,)])
def test_amax_of_another_type_is_refused(amax: Any) -> None:
    with pytest.raises(TypeError, match="amax must be float, list or ndarray"):
        QuantDescriptor(amax=amax)


@pytest.mark.parametrize("amax", [[[1.0], [1.0, 2.0]], ["a"]])
def test_amax_that_is_no_array_is_refused(amax: Any) -> None:
    with pytest.raises(ValueError, match="amax must hold numbers in a regular array"):
        QuantDescriptor(amax=amax)


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="name must be a string or None, got int"):
        QuantDescriptor(name=5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="axis is ignored and must be None"):
        QuantDescriptor(learn_amax=True, axis=0)
    with pytest.raises(TypeError, match="axis must be None, an integer or a tuple"):
        QuantDescriptor(axis="0")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="axis must be None, an integer or a tuple"):
        QuantDescriptor(axis=(0, "1"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="calib_method must be one of max, histogram, got 'entropie'"):
        QuantDescriptor(calib_method="entropie")
    with pytest.raises(TypeError, match="Unused keys: bits, width"):
        QuantDescriptor(width=3, bits=4)
    with pytest.raises(TypeError, match="must be a mapping, got list"):
        QuantDescriptor.from_yaml("[1, 2]")
    with pytest.raises(TypeError, match="Unused keys: bits"):
        QuantDescriptor.from_yaml("bits: 4")


def test_predefined() -> None:
    assert ScaledQuantDescriptor is QuantDescriptor
    assert QuantDescriptor(num_bits=8) == module.QUANT_DESC_8BIT_PER_TENSOR
    assert QuantDescriptor(unsigned=True) == module.QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR
    per_channel = [name for name in module.__all__ if name.endswith(("_PER_CHANNEL", "_PER_ROW"))]
    assert len(per_channel) == 7
    for name in per_channel:
        d = getattr(module, name)
        assert d == QuantDescriptor(axis=0)
        assert QuantDescriptor.from_yaml(d.to_yaml()) == d
