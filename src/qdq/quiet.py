"""Silence for the warnings of PyTorch about itself, which no user of qdq could act on."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

# torch.export, the ONNX exporter and catch_warnings keep state of the process: two threads in them fail, or worse.
_ONE_AT_A_TIME = threading.RLock()

_NOISY = ("torch.onnx", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def pytorch_internals() -> Iterator[None]:
    """Within the block, `torch.export` and the ONNX exporter say nothing of their own deprecations and options.

    One thread at a time is in it.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        loggers = [logging.getLogger(name) for name in _NOISY]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", module=r"torch\..*")
        # nn.LSTM and nn.GRU collect their parameters anew while they are traced.
        warnings.filterwarnings("ignore", r"The tensor attributes? .*_flat_weights\[")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
