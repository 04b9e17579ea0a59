"""How a user's batches are bound to the signature of `forward`, rule by rule."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from qdq.batches import Batches, describe, signature_of
from qdq.errors import DataError

X, Y, Z, LABEL = torch.ones(2, 3), torch.zeros(2, 3), torch.full((2, 3), 2.0), torch.tensor([1, 0])


def one(x: Tensor) -> None: ...


def two(x: Tensor, y: Tensor) -> None: ...


def three(x: Tensor, y: Tensor, z: Tensor) -> None: ...


def optional(x: Tensor, y: Tensor | None = None) -> None: ...


def keyword_only(x: Tensor, *, scale: Tensor) -> None: ...


def anything(*args: Tensor) -> None: ...


def named(**kwargs: Tensor) -> None: ...


def named_too(x: Any = None, y: Any = None, **kwargs: Tensor) -> None: ...


def bind(forward: Any, *data: Any, inputs_of: Any = None) -> list[Any]:
    return list(Batches(list(data), signature_of(forward), inputs_of))


def same(found: Any, expected: Any) -> bool:
    """Equality by identity of the tensors: binding must not copy or convert them."""
    (args, kwargs), (want_args, want_kwargs) = found, expected
    return (
        len(args) == len(want_args)
        and all(a is b for a, b in zip(args, want_args, strict=True))
        and list(kwargs) == list(want_kwargs)
        and all(kwargs[k] is want_kwargs[k] for k in kwargs)
    )


@pytest.mark.parametrize(
    ("forward", "batch", "expected"),
    [
        (one, X, ((X,), {})),
        (one, (X,), ((X,), {})),
        (one, [X], ((X,), {})),
        (two, (X, Y), ((X, Y), {})),
        (two, [X, Y], ((X, Y), {})),
        (two, {"x": X, "y": Y}, ((X, Y), {})),
        (two, OrderedDict(y=Y, x=X), ((X, Y), {})),
        (optional, X, ((X,), {})),
        (optional, (X, Y), ((X, Y), {})),  # it fits, so it is never cut, even if y is a label to the user
        (keyword_only, {"x": X, "scale": Y}, ((X,), {"scale": Y})),
        (anything, (X, Y, LABEL), ((X, Y, LABEL), {})),
        (named, {"a": X, "b": Y}, ((), {"a": X, "b": Y})),
    ],
)
def test_batches_that_fit_are_bound_as_they_are(forward, batch, expected, caplog):
    (found,) = bind(forward, batch)
    assert same(found, expected)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("forward", "batch", "expected"),
    [
        (one, (X, LABEL), ((X,), {})),
        (one, (X, LABEL, LABEL), ((X,), {})),
        (two, (X, Y, LABEL), ((X, Y), {})),
        (optional, (X, Y, LABEL), ((X, Y), {})),
        (three, ((X, Y, Z), LABEL), ((X, Y, Z), {})),
        (three, [[X, Y, Z], LABEL], ((X, Y, Z), {})),
        (two, ((X, Y), LABEL, LABEL), ((X, Y), {})),
        (three, ({"x": X, "y": Y, "z": Z}, LABEL), ((X, Y, Z), {})),
        (one, ({"x": X}, LABEL), ((X,), {})),
        (optional, ({"x": X}, LABEL), ((X,), {})),
        (keyword_only, ({"x": X, "scale": Y}, LABEL), ((X,), {"scale": Y})),
    ],
)
def test_labels_are_dropped_and_this_is_logged_once(forward, batch, expected, caplog):
    with caplog.at_level(logging.WARNING, logger="qdq"):
        found = bind(forward, batch, batch, batch)
    assert len(found) == 3 and all(same(f, expected) for f in found)
    assert len(caplog.records) == 1
    assert "label" in caplog.text


def test_how_many_items_are_dropped_is_logged(caplog):
    bind(one, (X, LABEL, LABEL))
    assert "batches hold 3 items and forward takes 1: the last 2 of each are dropped" in caplog.text


@pytest.mark.parametrize(
    ("forward", "batch"),
    [
        (optional, ((X, Y), LABEL)),  # x=(X, Y) and y=LABEL, or x=X and y=Y
        (named_too, ({"a": X}, LABEL)),  # an argument, or keywords that **kwargs takes
        (anything, ((X, Y), LABEL)),
    ],
)
def test_what_fits_two_ways_is_an_error_that_names_inputs_of(forward, batch):
    with pytest.raises(DataError, match=r"fits forward\(.*in two ways.*inputs_of=callable"):
        bind(forward, batch)


def test_inputs_of_decides():
    batch = ((X, Y), LABEL)
    assert same(bind(optional, batch, inputs_of=lambda b: b[0])[0], ((X, Y), {}))
    assert same(bind(optional, batch, inputs_of=lambda b: b[0][0])[0], ((X,), {}))
    assert same(bind(optional, batch, inputs_of=lambda b: {"x": b[0][1]})[0], ((Y,), {}))


def test_what_inputs_of_gives_must_fit_exactly():
    with pytest.raises(DataError, match=r"batch 0 \(\(Tensor\[2, 3\], Tensor\[2\]\)\) does not fit forward\(x\)"):
        bind(one, (X, LABEL), inputs_of=lambda b: b)
    with pytest.raises(DataError, match="inputs_of must be a callable that takes a batch, not int"):
        bind(one, X, inputs_of=3)


def test_other_arguments_of_a_sequence_type_are_not_taken_for_labels():
    with pytest.raises(DataError, match="does not fit"):
        bind(one, ((X, Y, X), LABEL))


@pytest.mark.parametrize(
    ("forward", "batch", "message"),
    [
        (two, X, r"batch 0 \(Tensor\[2, 3\]\) does not fit forward\(x, y\): missing a required argument: 'y'"),
        (two, (X,), r"missing a required argument: 'y'; pass inputs_of=callable"),
        (one, {"z": X}, r"batch 0 \(\{'z': Tensor\[2, 3\]\}\) does not fit forward\(x\).*'x'"),
        (keyword_only, (X,), "missing a required.*'scale'"),
        (one, (), "missing a required argument"),
    ],
)
def test_batches_that_do_not_fit_are_named(forward, batch, message):
    with pytest.raises(DataError, match=message):
        bind(forward, batch)


def test_the_batch_that_does_not_fit_is_named_by_its_index():
    with pytest.raises(DataError, match="batch 2 "):
        bind(two, (X, Y), (X, Y), X)


def test_numpy_arrays_become_tensors():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    ((args, _),) = bind(two, (array, [array, {"deep": array}]))
    assert isinstance(args[0], Tensor) and args[0].dtype == torch.float32 and args[0].shape == (2, 3)
    assert isinstance(args[1][0], Tensor) and isinstance(args[1][1]["deep"], Tensor)
    ((args, _),) = bind(one, array)
    assert isinstance(args[0], Tensor)


def test_numpy_arrays_run_backwards_or_hold_the_other_byte_order():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    field = np.zeros((2, 3), dtype=[("value", "<f4"), ("mark", "u1")])
    field["value"] = array
    for given in (array[::-1, ::-1], array.astype(">f4"), array.astype("<f4"), field["value"], np.float32(2) * array.T):
        ((args, _),) = bind(one, given)
        assert args[0].dtype == torch.float32 and np.array_equal(args[0].numpy(), given)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array(["a", None], dtype=object), "numpy array of objects: convert it to numbers"),
        (np.array(["a", "b"]), "numpy array of dtype <U1: convert it to numbers"),
        (np.zeros(2, dtype="datetime64[D]"), r"numpy array of dtype datetime64\[D\]: convert it to numbers"),
        (np.zeros(2, dtype=np.longdouble), "which PyTorch does not have: convert it, as with .astype"),
    ],
)
def test_numpy_arrays_that_hold_no_numbers_are_refused(array, message):
    with pytest.raises(DataError, match=f"^batch 1: it holds a {message}" if "convert it to" in message else message):
        bind(one, X, array)


@pytest.mark.parametrize("array", [X, X.numpy()])
def test_one_array_in_place_of_a_list_is_refused(array):
    with pytest.raises(
        DataError, match=r"batches is one array of shape \(2, 3\): pass a list of batches, such as \[x\]"
    ):
        Batches(array, signature_of(one))


@pytest.mark.parametrize("data", [{"x": X}, "folder", b"bytes", 3, None])
def test_what_is_no_iterable_of_batches_is_refused(data):
    with pytest.raises(DataError, match=f"not {type(data).__name__}; one dict of inputs is passed as .inputs."):
        Batches(data, signature_of(one))


@pytest.mark.parametrize("empty", [[], (), DataLoader(TensorDataset(X[:0]))])
def test_empty_data_are_refused(empty):
    with pytest.raises(DataError, match="batches holds no batch$"):
        list(Batches(empty, signature_of(one)))


def test_an_empty_generator_is_told_that_it_may_have_been_consumed():
    with pytest.raises(DataError, match="no batch; it is a one-shot iterator.*may have been consumed before"):
        Batches(iter([]), signature_of(one)).first()


def test_a_generator_is_consumed_once_and_its_first_batch_is_not_lost():
    asked: list[int] = []

    def generate() -> Iterator[Tensor]:
        for index in range(3):
            asked.append(index)
            yield torch.full((1,), float(index))

    batches = Batches(generate(), signature_of(one))
    assert batches.total is None
    assert batches.first()[0][0].item() == 0 and batches.first()[0][0].item() == 0
    assert asked == [0]
    assert [args[0].item() for args, _ in batches] == [0, 1, 2]
    assert asked == [0, 1, 2]
    with pytest.raises(DataError, match="one-shot iterator.*has been consumed; a second pass needs.*a list or a DataL"):
        list(batches)


def test_a_list_is_gone_through_as_often_as_asked():
    batches = Batches([X, Y], signature_of(one))
    assert batches.total == 2
    for _ in range(3):
        assert [args[0] for args, _ in batches][1] is Y
    batches.first()
    assert len(list(batches)) == 2


def test_a_data_loader_and_a_sequence_without_iter_serve():
    loader = DataLoader(TensorDataset(torch.arange(6.0).reshape(6, 1), torch.arange(6)), batch_size=2)
    batches = Batches(loader, signature_of(one))
    assert batches.total == 3
    assert torch.cat([args[0] for args, _ in batches]).flatten().tolist() == [0, 1, 2, 3, 4, 5]

    class Indexed:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Tensor:
            if index > 1:
                raise IndexError
            return X

    assert len(list(Batches(Indexed(), signature_of(one)))) == 2


def test_a_shuffling_source_is_not_cut_by_the_first_batch():
    """Each pass over a re-iterable source is whole: the batch that capture looked at is not seen twice."""

    class Shuffled:
        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(0)

        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.randperm(50, generator=self.generator).float().split(1))

    batches = Batches(Shuffled(), signature_of(one))
    batches.first()
    for _ in range(2):
        seen = sorted(args[0].item() for args, _ in batches)
        assert seen == list(range(50))


def test_signatures_hold_no_annotations_so_that_they_can_be_stored():
    assert str(signature_of(optional)) == "(x, y=None)"


def test_descriptions_hold_shapes_and_no_values():
    assert describe(((X, {"k": X.numpy()}), 3, "text")) == "((Tensor[2, 3], {'k': ndarray[2, 3]}), int, str)"
