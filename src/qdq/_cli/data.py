"""DATA on the command line: ``.npy``, ``.npz``, ``.safetensors``, a folder of images, or ``file.py:factory``.

Every kind becomes an iterable of batches that can be walked through as often as needed, reading as it goes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdq._cli.errors import CommandError, UsageError, require
from qdq._cli.factories import call, is_factory_spec, load_callable

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How to read DATA.

    Attributes:
        batch_size: samples per batch of arrays and images; a factory makes its own batches.
        limit: at most so many samples (of a factory: batches); None takes all.
        keys: which arrays of an ``.npz`` or ``.safetensors`` file are inputs, in ``forward``'s order.
        image_size: height and width that images are resized and cropped to.
        mean, std: per channel, of pixel values in [0, 1]; one value makes grey images, three make RGB.
    """

    batch_size: int = 32
    limit: int | None = None
    keys: tuple[str, ...] = ()
    image_size: int | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def load_batches(spec: str, options: DataOptions, *, argument: str = "--data") -> Iterable[Any]:
    """The batches that ``spec`` names; may be iterated more than once.

    Raises:
        UsageError: no such file, an unknown kind, object arrays, arrays of different lengths, no samples.
        CommandError: an extra is missing or the user's factory failed.
    """
    if is_factory_spec(spec):
        return _FactoryBatches(load_callable(spec, argument=argument), spec, options.limit, argument)
    path = Path(spec)
    if path.is_dir():
        from qdq._cli.images import ImageFolder

        require("PIL", "images", "reading images")
        return ImageFolder(path, options)
    if not path.is_file():
        raise UsageError(f"{argument}: no such file or folder: {spec}")
    readers: dict[str, Callable[[Path, tuple[str, ...]], Mapping[str, np.ndarray]]] = {
        ".npy": _read_npy,
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{argument} {spec!r}: give .npy, .npz, .safetensors, a folder of images, or file.py:factory")
    return ArrayBatches(reader(path, options.keys), path, options)


class ArrayBatches:
    """Batches of consecutive samples from arrays whose first axis counts samples.

    One array makes tensors; several make dicts by name, or tuples in the order of ``keys``.
    float64 becomes float32, NumPy's default against PyTorch's.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], path: Path, options: DataOptions) -> None:
        self._arrays = dict(arrays)
        self._positional = bool(options.keys) or len(arrays) == 1
        self._batch_size = options.batch_size
        lengths = {name: _length(array, name, path) for name, array in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            raise UsageError(f"{path}: the arrays differ in their number of samples: {lengths}; choose with --keys")
        count = next(iter(lengths.values()))
        if count == 0:
            raise UsageError(f"{path} holds no samples")
        self.samples = count if options.limit is None else min(count, options.limit)

    def __len__(self) -> int:
        return -(-self.samples // self._batch_size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self.samples, self._batch_size):
            stop = min(start + self._batch_size, self.samples)
            batch = {name: _tensor(array[start:stop]) for name, array in self._arrays.items()}
            if not self._positional:
                yield batch
            elif len(batch) == 1:
                yield next(iter(batch.values()))
            else:
                yield tuple(batch.values())


class _FactoryBatches:
    """Calls the user's factory anew for every pass, so that it may return a generator."""

    def __init__(self, factory: Callable[[], Iterable[Any]], spec: str, limit: int | None, argument: str) -> None:
        self._factory = factory
        self._spec = spec
        self._limit = limit
        self._argument = argument

    def __iter__(self) -> Iterator[Any]:
        batches = call(self._factory, self._spec, argument=self._argument)
        if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes)):
            raise UsageError(
                f"{self._argument} {self._spec!r} returned a {type(batches).__name__}, not an iterable of batches"
            )
        iterator = iter(batches)
        for _ in itertools.count() if self._limit is None else range(self._limit):
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                raise CommandError(
                    f"{self._argument} {self._spec!r} raised {type(error).__name__} while it made a batch: {error}"
                ) from error
            yield batch


def _length(array: np.ndarray, name: str, path: Path) -> int:
    if array.ndim == 0:
        raise UsageError(f"{path}: {name} is a single number; the first axis must count samples")
    return array.shape[0]


def _tensor(array: np.ndarray) -> torch.Tensor:
    import numpy as np
    import torch

    if array.dtype == np.float64:
        return torch.from_numpy(array.astype(np.float32))
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=native))  # a copy: the array may be a read-only memory map


def _refused_arrays(path: Path, error: Exception) -> UsageError:
    text = " ".join(str(error).split())
    if "allow_pickle" in text or "Python objects" in text:
        # NumPy takes whatever it does not recognise for a pickle.
        return UsageError(f"{path} is no NumPy file, or holds Python objects (a pickle), which qdq does not load")
    return UsageError(f"{path} cannot be read as NumPy data: {text}")


def _checked(array: Any, name: str, path: Path) -> np.ndarray:
    import numpy as np

    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise UsageError(f"{path}: {name} has dtype {getattr(array, 'dtype', '?')}; give numbers")
    return array


def _read_npy(path: Path, keys: tuple[str, ...]) -> Mapping[str, np.ndarray]:
    import numpy as np

    if keys:
        raise UsageError(f"--keys: {path} holds one array without a name")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise _refused_arrays(path, error) from None
    return {"the array": _checked(array, "the array", path)}


def _read_npz(path: Path, keys: tuple[str, ...]) -> Mapping[str, np.ndarray]:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: _checked(archive[name], name, path) for name in _selected(list(archive.files), keys, path)}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise _refused_arrays(path, error) from None


def _read_safetensors(path: Path, keys: tuple[str, ...]) -> Mapping[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        # Through PyTorch: NumPy has no bfloat16.
        with safe_open(str(path), framework="pt") as archive:
            names = _selected(list(archive.keys()), keys, path)
            tensors = {name: archive.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise UsageError(f"{path} cannot be read as safetensors: {error}") from None
    return {
        name: _checked((t.float() if t.is_floating_point() else t).numpy(), name, path) for name, t in tensors.items()
    }


def _selected(present: Sequence[str], keys: tuple[str, ...], path: Path) -> Sequence[str]:
    if not present:
        raise UsageError(f"{path} holds no arrays")
    missing = [key for key in keys if key not in present]
    if missing:
        raise UsageError(f"--keys: {path} has no array {missing[0]!r}; it holds {', '.join(sorted(present))}")
    return keys or present
