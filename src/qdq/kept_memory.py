"""Memory that is kept for the next tensor, while a model runs over data."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
# What glibc starts with, and what its thresholds grow to by themselves as large blocks are freed. They stop growing
# once one of them was set, so that all must be.
_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = 65536, 32 * 2**20, 64 * 2**20

_lock = threading.Lock()
_inside = 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the block, memory that tensors on the CPU free stays in the process for those after them.

    glibc asks the system for every block of 32 MiB or more and gives it back when it is freed; the system clears each
    page of it at first touch. A convolutional network spends up to half of its time on that. Within the block such
    memory comes from the heap and stays there; at the end of the last block what is free goes back to the system. See
    mallopt(3). With other allocators, and where environment variables set glibc's, nothing is changed.
    """
    library = _glibc()
    if library is None:
        yield
        return
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            library.mallopt(_M_MMAP_MAX, 0)
            library.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                library.mallopt(_M_MMAP_MAX, _MMAP_MAX)
                library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
                library.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
                library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return None
    library = ctypes.CDLL(None)
    # musl has neither; an allocator that was preloaded may lack one.
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "malloc_trim") else None
