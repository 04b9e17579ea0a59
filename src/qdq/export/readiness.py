"""`enable_onnx_export`: while `torch.onnx.export` runs in it, quantizers that are not ready for ONNX refuse."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import TracebackType

import torch
from torch import nn

from ..quantizer import TensorQuantizer

_LOCK = threading.Lock()
_depth = 0
# Modules that the exporters wrap around the model.
_EXPORTERS = ("torch.jit", "torch.onnx", "torch.export", "torch._export")


@contextlib.contextmanager
def enable_onnx_export() -> Iterator[None]:
    """Within the block every `TensorQuantizer` that runs asks first whether it could be exported to ONNX.

    Meant to surround `torch.onnx.export`, with either exporter. A quantizer without amax is refused, also where it is
    disabled, and E4M3 with more than one amax. Outside of the block `torch.onnx.export` writes the same nodes for the
    quantizers that are on, and refuses those that have no such form. The block nests, is left by an exception as well,
    and holds for all threads.

    `axis` needs opset 13. With `dynamo=True` PyTorch builds its graph for opset 18, and writes 18 where it cannot
    convert that to the lower one asked for. With `dynamo=False` it warns above opset 20, and writes what was asked.

    Raises:
        AssertionError: at the end of the block, in place of the exporter's own error, where a quantizer refused; it
            names all quantizers of the model without amax, or the one that refused.
    """
    _add(1)
    try:
        yield
    except (AssertionError, torch.onnx.OnnxExporterError) as error:
        refusal = _refusal(error)
        message = None if refusal is None else _with_names(refusal)
        if message is None:
            raise
        raise AssertionError(message) from error
    finally:
        _add(-1)


def _add(change: int) -> None:
    global _depth
    with _LOCK:
        _depth += change
        TensorQuantizer._enable_onnx_export = _depth > 0


def _refusal(error: BaseException | None) -> AssertionError | None:
    """The quantizer's own error at the root of what the exporter made of it."""
    while error is not None:
        if isinstance(error, AssertionError) and _models(error.__traceback__):
            return error
        error = error.__cause__ or error.__context__
    return None


def _models(traceback: TracebackType | None) -> list[nn.Module]:
    """The modules whose `forward` the error went through, from the model to the quantizer that raised it, or none."""
    found: list[nn.Module] = []
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and not type(module).__module__.startswith(_EXPORTERS):
            found.append(module)
        traceback = traceback.tb_next
    return found if found and isinstance(found[-1], TensorQuantizer) else []


def _with_names(refusal: AssertionError) -> str:
    """The refusal with the names of the quantizers it is about."""
    modules = _models(refusal.__traceback__)
    names = {n: q for n, q in modules[0].named_modules() if isinstance(q, TensorQuantizer)}
    concerned = [n for n, q in names.items() if q is modules[-1]]
    if modules[-1].amax is None:
        concerned = [n for n, q in names.items() if q.amax is None]
    return f"{refusal}: {', '.join(n or 'the model itself' for n in concerned)}"
