"""DATA of the command line: every kind of file, the options, and every refusal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qdq._cli.data import DataOptions, load_batches
from qdq._cli.errors import CommandError, UsageError


def batches(spec: object, **options: Any) -> list[Any]:
    return list(load_batches(str(spec), DataOptions(**options)))


def npy(tmp_path: Path, array: np.ndarray) -> Path:
    path = tmp_path / "data.npy"
    np.save(path, array)
    return path


def npz(tmp_path: Path, **arrays: np.ndarray) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    return path


def factory(tmp_path: Path, body: str) -> str:
    path = tmp_path / f"user_{tmp_path.name}.py"
    path.write_text(body)
    return f"{path}:make"


def test_npy_is_split_into_batches_of_float32(tmp_path: Path) -> None:
    array = np.arange(70, dtype=np.float64).reshape(10, 7)
    found = batches(npy(tmp_path, array), batch_size=4)
    assert [tuple(batch.shape) for batch in found] == [(4, 7), (4, 7), (2, 7)]
    assert {batch.dtype for batch in found} == {torch.float32}
    assert torch.equal(torch.cat(found), torch.from_numpy(array).float())


def test_batches_can_be_walked_through_again(tmp_path: Path) -> None:
    data = load_batches(str(npy(tmp_path, np.ones((3, 2), np.float32))), DataOptions(batch_size=2))
    assert len(list(data)) == len(list(data)) == len(data) == 2  # type: ignore[arg-type]


def test_integers_and_byte_order_are_kept_readable(tmp_path: Path) -> None:
    found = batches(npy(tmp_path, np.array([[1, 2], [3, 4]], dtype=">i4")))
    assert found[0].tolist() == [[1, 2], [3, 4]]
    assert found[0].dtype == torch.int32


def test_limit_counts_samples(tmp_path: Path) -> None:
    found = batches(npy(tmp_path, np.zeros((10, 2), np.float32)), batch_size=4, limit=6)
    assert [len(batch) for batch in found] == [4, 2]


def test_npz_with_several_arrays_makes_keyword_arguments(tmp_path: Path) -> None:
    found = batches(npz(tmp_path, ids=np.ones((2, 3), np.int64), mask=np.zeros((2, 3), np.int64)))
    assert set(found[0]) == {"ids", "mask"}


def test_npz_with_one_array_makes_tensors(tmp_path: Path) -> None:
    assert torch.is_tensor(batches(npz(tmp_path, images=np.ones((2, 3), np.float32)))[0])


def test_keys_choose_and_order_the_inputs(tmp_path: Path) -> None:
    path = npz(tmp_path, a=np.zeros((2, 1), np.float32), b=np.ones((2, 1), np.float32), label=np.zeros(2, np.int64))
    first, second = batches(path, keys=("b", "a"))[0]
    assert (first.item() if first.numel() == 1 else first[0].item(), second[0].item()) == (1, 0)
    assert torch.is_tensor(batches(path, keys=("a",))[0])


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "data.safetensors"
    save_file({"x": torch.arange(6.0).reshape(3, 2).to(torch.bfloat16)}, str(path))
    found = batches(path, batch_size=2)
    assert found[0].tolist() == [[0, 1], [2, 3]]
    assert found[0].dtype == torch.float32


def test_a_factory_is_called_anew_for_every_pass(tmp_path: Path) -> None:
    spec = factory(tmp_path, "import torch\ndef make():\n    for n in range(3):\n        yield torch.full((1,), n)\n")
    data = load_batches(spec, DataOptions(limit=2))
    assert [batch.item() for batch in data] == [0, 1]
    assert [batch.item() for batch in data] == [0, 1]


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("def make():\n    return 3\n", UsageError, "returned a int, not an iterable"),
        ("def make():\n    return 'text'\n", UsageError, "returned a str, not an iterable"),
        ("def make():\n    raise KeyError('x')\n", CommandError, "raised KeyError"),
        (
            "def make():\n    yield 1\n    raise OSError('disk')\n",
            CommandError,
            "raised OSError while it made a batch: disk",
        ),
    ],
)
def test_what_a_factory_may_not_do(tmp_path: Path, body: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        batches(factory(tmp_path, body))


def test_object_arrays_are_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    path = tmp_path / "data.npy"
    np.save(path, np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="holds Python objects"):
        batches(path)
    path = npz(tmp_path, x=np.array([Evil()], dtype=object))
    with pytest.raises(UsageError, match="holds Python objects"):
        batches(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.float32(3), "is a single number"),
        (np.zeros((0, 3), np.float32), "holds no samples"),
        (np.array(["a", "b"]), "give numbers"),
    ],
)
def test_arrays_that_hold_no_samples(tmp_path: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        batches(npy(tmp_path, np.asarray(array)))


def test_arrays_of_different_lengths(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"differ in their number of samples.*--keys"):
        batches(npz(tmp_path, a=np.zeros((2, 1)), b=np.zeros((3, 1))))


def test_keys_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no array 'c'; it holds a, b"):
        batches(npz(tmp_path, a=np.zeros(2), b=np.zeros(2)), keys=("c",))
    with pytest.raises(UsageError, match="one array without a name"):
        batches(npy(tmp_path, np.zeros((2, 1))), keys=("c",))


def test_empty_archive(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no arrays"):
        batches(npz(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data.npy", "is no NumPy file"),
        ("data.npz", "is no NumPy file"),
        ("data.safetensors", "cannot be read as safetensors"),
        ("data.csv", r"give \.npy, \.npz"),
    ],
)
def test_damaged_and_unknown_files(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x01\x02 nothing of the kind")
    with pytest.raises(UsageError, match=message):
        batches(path)


def test_truncated_array(tmp_path: Path) -> None:
    path = npy(tmp_path, np.zeros((4, 4), np.float32))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UsageError, match="cannot be read as NumPy data"):
        batches(path)


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data: no such file or folder"):
        batches(tmp_path / "none.npy")


def image_folder(tmp_path: Path, *sizes: tuple[int, int]) -> Path:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for number, size in enumerate(sizes):
        where = folder / "deep" if number % 2 else folder
        image.new("RGB", size, (255, 0, 51)).save(where / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_images_are_scaled_cropped_and_normalised(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, (20, 10), (8, 30), (9, 9))
    found = batches(folder, image_size=6, batch_size=2, mean=(0.5, 0.5, 0.0), std=(0.5, 0.5, 1.0))
    assert [tuple(batch.shape) for batch in found] == [(2, 3, 6, 6), (1, 3, 6, 6)]
    torch.testing.assert_close(found[0][0, :, 3, 3], torch.tensor([1.0, -1.0, 0.2]))


def test_one_mean_makes_grey_images(tmp_path: Path) -> None:
    assert batches(image_folder(tmp_path, (4, 5)), mean=(0.5,), std=(0.5,))[0].shape == (1, 1, 5, 4)


def test_images_limit(tmp_path: Path) -> None:
    assert [len(batch) for batch in batches(image_folder(tmp_path, (4, 4), (4, 4), (4, 4)), limit=2)] == [2]


def test_images_of_different_sizes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --image-size"):
        batches(image_folder(tmp_path, (4, 4), (5, 4)))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5, 0.5), (1.0, 1.0), "one value each"),
        ((0.5,), (1.0, 1.0, 1.0), "one value each"),
        ((0.5,), (0.0,), "positive"),
    ],
)
def test_means_that_fit_no_image(tmp_path: Path, mean: tuple[float, ...], std: tuple[float, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        batches(image_folder(tmp_path, (4, 4)), mean=mean, std=std)


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no images"):
        batches(tmp_path)


def test_broken_image_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, (4, 4))
    (folder / "0.png").write_bytes(b"no image")
    with pytest.raises(CommandError, match=r"0\.png cannot be read as an image"):
        batches(folder)


def test_images_without_pillow_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(CommandError, match=r"needs pillow.*pip install 'qdq\[images\]'"):
        batches(tmp_path)
