"""Silence for the warnings of PyTorch about itself, which no user of qdq could act on."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def pytorch_internals() -> Iterator[None]:
    """Within the block, `torch.export` and the ONNX exporter say nothing of their own deprecations and options."""
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", module=r"torch\..*")
        # nn.LSTM and nn.GRU collect their parameters anew while they are traced.
        warnings.filterwarnings("ignore", r"The tensor attributes? .*_flat_weights\[")
        try:
            yield
        finally:
            noisy.setLevel(level)
