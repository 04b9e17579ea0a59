"""`Statistics`: all that one calibration pass keeps, from which ranges can be found again without the data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import DataError
from .collectors import HistogramCollector

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# What is kept of the inputs, unless asked otherwise.
MOST_SAMPLES = 128
MOST_BYTES = 128 * 2**20
# Samples of one batch, where a batch may be split.
BATCH_SIZE = 32


class Statistics:
    """What was seen of a model's activations, and a part of the inputs it was seen on.

    Attributes:
        histograms: name of a tensor in the captured graph -> its histogram in the float model, over all data. The
            `counts` of each are int64, of one dimension.
        samples: inputs of the model, `(args, kwargs)` per batch, evenly spread over the data: at most 128 samples and
            128 MiB, in the dtypes and on the device that they came in.
        model: `qdq.fingerprint.fingerprint` of the float model, SHA-256 as hexadecimal text; None where it is not
            known.
    """

    def __init__(
        self, histograms: dict[str, HistogramCollector], samples: Sequence[Inputs], model: str | None = None
    ) -> None:
        self.histograms = histograms
        self.samples = list(samples)
        self.model = model

    def first(self) -> Inputs:
        """The first batch of the inputs kept.

        Raises:
            DataError: none are kept.
        """
        if not self.samples:
            raise DataError("these statistics hold no inputs: pass example_inputs, to capture the model with")
        return self.samples[0]

    def check_model(self, fingerprint: str) -> None:
        """Refuses to be used for another float model than the one of this fingerprint, if their own is known.

        Raises:
            DataError: it is another one.
        """
        if self.model is not None and self.model != fingerprint:
            raise DataError(
                "these statistics are of another float model: its parameters, buffers, modules or their settings "
                "differ from those of the model given; give the model that they were collected from, or batches, to "
                "calibrate this one anew"
            )

    def to(self, device: torch.device) -> Statistics:
        """The same with the inputs on a device; histograms always are on the CPU."""
        samples = pytree.tree_map_only(Tensor, lambda x: x.to(device), self.samples)
        return Statistics(self.histograms, samples, self.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Statistics:
        # Never changed once made, and large: copies of a model share it.
        return self

    def __repr__(self) -> str:
        return f"Statistics({len(self.histograms)} histograms, {count_samples(self.samples)} samples)"


class SampleKeeper:
    """Keeps an evenly spread part of a stream of batches, whatever its length.

    Everything is kept until there is too much; then every second sample of those kept goes, and of those to come only
    every second is kept, and so on. Where batches cannot be split, the same is done with whole batches.

    Args:
        most_samples: samples (dimension 0 of the first tensor) that are kept at most.
        most_bytes: bytes of tensors that are kept at most; one batch is kept in any case.
        divisible: whether a batch may be split along dimension 0 of all its tensors.
    """

    def __init__(
        self, most_samples: int = MOST_SAMPLES, most_bytes: int = MOST_BYTES, *, divisible: bool = False
    ) -> None:
        self.most_samples, self.most_bytes, self.divisible = most_samples, most_bytes, divisible
        # With each the number that its first sample (or it itself, where it cannot be split) has among all seen.
        self._kept: list[tuple[int, Inputs]] = []
        self._every = 1
        self._seen = 0

    def add(self, inputs: Inputs) -> None:
        """Takes note of a batch; its tensors are copied if they are kept."""
        first, self._seen = self._seen, self._seen + (_size_of(inputs) if self.divisible else 1)
        thinned = self._thinned(first, 1, inputs)
        while thinned is not None and self._too_many([*self._kept, thinned]):
            self._every *= 2
            known = [self._thinned(start, self._every // 2, batch) for start, batch in self._kept]
            self._kept = [one for one in known if one is not None]
            thinned = self._thinned(first, 1, inputs)
        if thinned is not None:
            self._kept.append((thinned[0], pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), thinned[1])))

    def _thinned(self, first: int, every: int, inputs: Inputs) -> tuple[int, Inputs] | None:
        """Of a batch that begins with sample `first` and holds every `every`-th, those that are to be kept now."""
        start = -(-first // self._every) * self._every
        if not self.divisible:
            return (first, inputs) if start == first else None
        skipped, step = (start - first) // every, self._every // every
        if skipped >= _size_of(inputs):
            return None
        # Copies, as views would keep what is left out.
        return start, inputs if step == 1 else pytree.tree_map_only(Tensor, lambda x: x[skipped::step].clone(), inputs)

    def samples(self) -> list[Inputs]:
        """What is kept; where batches may be split, in batches of 32 samples however they came."""
        kept = [inputs for _, inputs in self._kept]
        if not self.divisible:
            return kept
        return [part for inputs in _joined(kept) for part in _parts(inputs, BATCH_SIZE)]

    def _too_many(self, kept: Sequence[tuple[int, Inputs]]) -> bool:
        batches = [inputs for _, inputs in kept]
        if (count_samples(batches) if self.divisible else len(batches)) <= 1:
            return False
        return (
            count_samples(batches) > self.most_samples or sum(_bytes_of(inputs) for inputs in batches) > self.most_bytes
        )


def evenly_spread(samples: Sequence[Inputs], most: int, *, divisible: bool) -> list[Inputs]:
    """At most so many of the samples, evenly spread over them; one batch in any case.

    Where batches may be split each of the new ones is spread over all samples, as far as their shapes are the same.

    Args:
        samples: inputs of a model, per batch.
        most: samples (dimension 0 of the first tensors).
        divisible: whether a batch may be split along dimension 0 of all its tensors.
    """
    if count_samples(samples) <= most:
        return list(samples)
    if not divisible:
        return [samples[i] for i in _evenly(len(samples), max(1, most * len(samples) // count_samples(samples)))]
    groups = list(_joined(samples))
    total = count_samples(groups)
    chosen = torch.tensor(_evenly(total, most))
    found, first = [], 0
    for inputs in groups:
        size = _size_of(inputs)
        own = chosen[(chosen >= first) & (chosen < first + size)] - first
        parts = -(-len(own) // BATCH_SIZE)
        found += [pytree.tree_map_only(Tensor, lambda x, own=own[i::parts]: x[own], inputs) for i in range(parts)]
        first += size
    return found


def _evenly(total: int, count: int) -> list[int]:
    """So many of the numbers below `total`, at equal distances."""
    return [i * total // count for i in range(count)] if count < total else list(range(total))


def count_samples(samples: Sequence[Inputs]) -> int:
    """Samples in all batches: the sizes of dimension 0 of the first tensors; a batch without one counts 1."""
    return sum(_size_of(inputs) for inputs in samples)


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]


def _size_of(inputs: Inputs) -> int:
    return next((int(x.shape[0]) for x in _tensors(inputs) if x.dim()), 1)


def _bytes_of(inputs: Inputs) -> int:
    return sum(x.numel() * x.element_size() for x in _tensors(inputs))


def _part(inputs: Inputs, start: int, stop: int) -> Inputs:
    return pytree.tree_map_only(Tensor, lambda x: x[start:stop], inputs)


def _joined(batches: Sequence[Inputs]) -> Iterator[Inputs]:
    """Neighbouring batches of one shape (but for dimension 0) as one."""
    for _, group in itertools.groupby(batches, key=lambda inputs: [x.shape[1:] for x in _tensors(inputs)]):
        together = list(group)
        leaves = [pytree.tree_leaves(inputs) for inputs in together]
        joined = [torch.cat(v) if isinstance(v[0], Tensor) else v[0] for v in zip(*leaves, strict=True)]
        yield pytree.tree_unflatten(joined, pytree.tree_structure(together[0]))


def _parts(inputs: Inputs, size: int) -> Iterator[Inputs]:
    for start in range(0, _size_of(inputs), size):
        yield _part(inputs, start, start + size)
