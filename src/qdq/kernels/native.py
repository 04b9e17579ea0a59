"""The shared library of the CPU kernels: found, checked and opened with ctypes.

It has a C interface (``native/include/qdq_kernels.h``) and knows neither Python nor PyTorch, so one file serves every
version of them. Its threads are those of PyTorch, where both use the same OpenMP library.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import checks

_log = logging.getLogger(__name__)

# QDQ_INTERFACE of the header.
INTERFACE = 2

NEGATIVE_PARAMETER, NEGATIVE_INPUT, UNORDERED_RANGE, NO_MEMORY = 1, 2, 4, 8

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

_NAME = "libqdq_kernels.dylib" if sys.platform == "darwin" else "libqdq_kernels.so"

# The arguments of the two functions that take them in one block: QdqFakeTensor, QdqTensorGradient.
FAKE_TENSOR, TENSOR_GRADIENT = struct.Struct("@PPPqqqdd"), struct.Struct("@PPPPqqq")

_int, _long, _double, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_LAYOUT = [_long] * 4
_SIGNATURES: dict[str, list[Any]] = {
    "qdq_symmetric": [_int, _int, _pointer, _pointer, *_LAYOUT, _pointer, _double, _double, _int],
    "qdq_fake_tensor": [ctypes.c_char_p],
    "qdq_affine": [_int, _int, _pointer, _pointer, *_LAYOUT, _pointer, _pointer, _double, _double, _int],
    "qdq_range": [_int, _pointer, _pointer, *_LAYOUT, _pointer, _pointer, _int, _int],
    "qdq_float_format": [_int, _pointer, _pointer, *_LAYOUT, _pointer, _int, _int, _int, _double, _int],
    "qdq_e8m0": [_int, _pointer, _pointer, _long, _int],
    "qdq_requantize": [*[_pointer] * 3, *_LAYOUT, *[_pointer] * 3, ctypes.c_float, _int],
    "qdq_add_codes": [_pointer, _pointer, _pointer, _long, _pointer, _int],
    "qdq_symmetric_gradient": [_int, _pointer, _pointer, _pointer, *_LAYOUT, _pointer, _int],
    "qdq_tensor_gradient": [ctypes.c_char_p],
    "qdq_affine_gradient": [
        *[_int, _pointer, _pointer, _pointer, *_LAYOUT, _pointer, _pointer, _double, _double, _int]
    ],
    "qdq_range_gradient": [_int, _int, _pointer, _pointer, _pointer, _long, _pointer, _pointer, _pointer, _int],
    "qdq_absmax": [_int, _pointer, *_LAYOUT, _pointer, _int],
    "qdq_minmax": [_int, _pointer, *_LAYOUT, _pointer, _pointer, _int],
    "qdq_histogram": [_int, _int, _pointer, _long, _double, _long, _long, _pointer, _pointer, _int],
}


@dataclass(frozen=True)
class Library:
    """The opened library, or the reason why there is none.

    Attributes:
        path: of the file; None where none was opened.
        reason: one sentence for people.
        functions: by name; None where there is no library.
        openmp: whether it uses several threads.
    """

    path: Path | None
    reason: str
    functions: Any = None
    openmp: bool = False

    @property
    def level(self) -> str | None:
        """The instruction set in use, "x86-64-v3" for example."""
        return None if self.functions is None else self.functions.qdq_level().decode()


def _candidates() -> list[Path]:
    """Beside this file, and where an editable install puts what it compiled."""
    beside = Path(__file__).with_name(_NAME)
    installed = [Path(entry, "qdq", "kernels", _NAME) for entry in sys.path if isinstance(entry, str) and entry]
    return [beside, *(path for path in installed if path != beside)]


@cache
def library() -> Library:
    """The library of this process, looked for once. ``QDQ_LIBRARY`` names another file; "" hides it."""
    wanted = os.environ.get("QDQ_LIBRARY")
    if wanted == "":
        return Library(None, "the variable QDQ_LIBRARY is empty, which hides the compiled kernels")
    paths = [Path(wanted)] if wanted is not None else [path for path in _candidates() if path.is_file()]
    if not paths:
        return Library(
            None,
            "the compiled kernels are not installed: install qdq where a C++ compiler (GCC or Clang) is found, "
            "or from a wheel for this platform",
        )
    problems = []
    for path in paths:
        try:
            functions = ctypes.CDLL(str(path))
            interface = functions.qdq_interface()
            if interface != INTERFACE:
                problems.append(
                    f"{path} is of another version of qdq (interface {interface}, needed {INTERFACE}): reinstall qdq"
                )
                continue
            for name, arguments in _SIGNATURES.items():
                getattr(functions, name).argtypes = arguments
            functions.qdq_level.restype = ctypes.c_char_p
            functions.qdq_set_level.argtypes = [ctypes.c_char_p]
            openmp = bool(functions.qdq_openmp())
        except (OSError, AttributeError) as error:
            problems.append(f"{path} cannot be loaded: {error}: reinstall qdq")
            continue
        return Library(path, "the compiled kernels are installed", functions, openmp)
    for problem in problems:
        _log.warning("%s; the slower reference runs", problem)
    return Library(None, "; ".join(problems))


def refuse(status: int, parameter: str = "amax") -> None:
    """Raise what a status of the library stands for; 0 is none.

    Raises:
        ValueError: a parameter out of its range; ``parameter`` says which it is, "amax" or "step_size".
        TypeError: a negative input of unsigned quantization.
        MemoryError: no memory, or a tensor without any.
    """
    if status & NEGATIVE_PARAMETER:
        raise ValueError(checks.NEGATIVE_AMAX if parameter == "amax" else checks.STEP_SIZE_NOT_POSITIVE)
    if status & NEGATIVE_INPUT:
        raise TypeError(checks.NEGATIVE_INPUT)
    if status & UNORDERED_RANGE:
        raise ValueError(checks.UNORDERED_RANGE)
    if status:
        raise MemoryError("the compiled kernels found no memory for the parameters, or a tensor that has none")
