"""Which engine computes an operation, and why.

Every engine is a module with the functions of :mod:`qdq.kernels.reference`, which is the definition and runs anywhere.
``QDQ_ENGINE`` forces one: "reference" everywhere; "cpu", the compiled kernels for tensors on the CPU, an error where
they are missing; "cuda", Triton for tensors on a GPU, likewise.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import native, reference

VARIABLE = "QDQ_ENGINE"
NAMES = ("reference", "cpu", "cuda")

_PLAIN = (Tensor, Parameter)
_STRIDED = torch.strided


@dataclass(frozen=True)
class EngineStatus:
    """Which engine runs on each device.

    Attributes:
        requested: the value of QDQ_ENGINE, None where it is not set.
        cpu: "native" or "reference".
        cpu_reason: one sentence.
        library: path of the compiled kernels, None without.
        level: their instruction set, "x86-64-v3" for example; None without.
        openmp: whether they use several threads.
        cuda: "triton", "reference", or "none" without a GPU.
        cuda_reason: one sentence.
    """

    requested: str | None
    cpu: str
    cpu_reason: str
    library: str | None
    level: str | None
    openmp: bool
    cuda: str
    cuda_reason: str


def _never(*_: Any) -> bool:
    return False


# What torch.autograd.Function asks as well. Inside such a transform, or under a mode that sees every operation, a
# tensor may stand for others, and memory is not what to compute on.
_transforming = getattr(torch._C, "_are_functorch_transforms_active", _never)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", _never)
_tracing = getattr(torch._C, "_is_tracing", _never)
# The older form of batching, which `torch.autograd.grad(..., is_grads_batched=True)` still uses.
_batched = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", _never)


class _Choice:
    """The engines of this process; decided at the first use, so that importing qdq never fails."""

    def __init__(self) -> None:
        self.forced: str | None = None
        self._decided = False
        self._cpu: ModuleType = reference
        self._cuda: ModuleType = reference

    def requested(self) -> str | None:
        """The forced engine.

        Raises:
            ValueError: QDQ_ENGINE names none.
        """
        name = self.forced if self.forced is not None else os.environ.get(VARIABLE) or None
        if name is not None and name not in NAMES:
            raise ValueError(f"{VARIABLE}={name!r} is no engine: choose one of {', '.join(NAMES)}")
        return name

    def forget(self) -> None:
        """Decide again at the next use."""
        self._decided = False

    def cpu(self) -> ModuleType:
        """The engine of tensors on the CPU."""
        if not self._decided:
            self._decide()
        return self._cpu

    def cuda(self) -> ModuleType:
        """The engine of tensors on a GPU."""
        if not self._decided:
            self._decide()
        return self._cuda

    def _decide(self) -> None:
        name = self.requested()
        library = native.library()
        self._cpu = self._cuda = reference
        if name == "cpu" and library.functions is None:
            raise RuntimeError(f"{VARIABLE}=cpu, but {library.reason}. Check with: qdq doctor")
        if name != "reference" and library.functions is not None:
            self._cpu = importlib.import_module(f"{__package__}.cpu")
        if name in (None, "cuda"):
            available, reason = _triton()
            if name == "cuda" and not available:
                raise RuntimeError(f"{VARIABLE}=cuda, but {reason}. Check with: qdq doctor")
            if available:
                self._cuda = importlib.import_module(f"{__package__}.cuda")
        self._decided = True


def _triton() -> tuple[bool, str]:
    if not torch.cuda.is_available():
        return False, "PyTorch finds no GPU"
    return importlib.import_module(f"{__package__}.cuda").available()


_choice = _Choice()


def is_plain(x: Any) -> bool:
    """True for a tensor whose memory can be computed on: no subclass, not sparse, no transform or mode around it."""
    return (
        type(x) in _PLAIN
        and x.layout is _STRIDED
        and not _transforming()
        and not _modes()
        and not x.is_nested
        and not x._is_zerotensor()
        and not _batched(x)
    )


def of_eager_call(x: Any, parameter: Any) -> ModuleType | None:
    """The engine of a plain eager call with these two, or None: something traces or transforms, or is no plain tensor.

    What `for_tensor` and `is_plain` say together, in a fraction of the time: small tensors are quantized in less.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or type(parameter) not in _PLAIN
        or x.layout is not _STRIDED
        or parameter.layout is not _STRIDED
        or x.is_nested
        or parameter.is_nested
        or x._is_zerotensor()
        or parameter._is_zerotensor()
        or _transforming()
        or _modes()
        or _tracing()
        or forward_ad._current_level >= 0
    ):
        return None
    if x.is_cpu:
        run = _choice._cpu if _choice._decided else _choice.cpu()
    else:
        run = for_tensor(x)
    return None if run is reference else run


def for_tensor(x: Tensor) -> ModuleType:
    """The engine that computes operations on ``x``.

    Raises:
        ValueError: QDQ_ENGINE names no engine.
        RuntimeError: it names one that cannot run here.
    """
    if x.is_cpu:
        engine = _choice._cpu if _choice._decided else _choice.cpu()
    elif x.is_cuda:
        engine = _choice.cuda()
    else:
        return reference
    return engine if engine is reference or is_plain(x) else reference


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Compute with one engine inside the block, as ``QDQ_ENGINE`` does for the whole process.

    Raises:
        ValueError: ``name`` is no engine.
        RuntimeError: it cannot run here.
    """
    before = _choice.forced
    _choice.forced = name
    _choice.forget()
    try:
        _choice.cpu()
        yield
    finally:
        _choice.forced = before
        _choice.forget()


def status() -> EngineStatus:
    """Which engine runs, and why.

    Raises:
        ValueError: QDQ_ENGINE names no engine.
        RuntimeError: it names one that cannot run here.
    """
    requested = _choice.requested()
    library = native.library()
    on_cpu, on_cuda = _choice.cpu(), _choice.cuda()
    forced_out = f"{VARIABLE}={requested} forces it"
    cpu_reason = forced_out if requested == "reference" else library.reason
    has_gpu, reason = _triton()
    if not torch.cuda.is_available():
        cuda = "none"
    else:
        cuda = "reference" if on_cuda is reference else "triton"
        if has_gpu and on_cuda is reference:
            reason = forced_out
    return EngineStatus(
        requested=requested,
        cpu="reference" if on_cpu is reference else "native",
        cpu_reason=cpu_reason,
        library=None if library.path is None else str(library.path),
        level=library.level,
        openmp=library.openmp,
        cuda=cuda,
        cuda_reason=reason,
    )
