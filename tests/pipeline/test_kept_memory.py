"""Memory that stays in the process while a model runs over data, and goes back to the system afterwards."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from qdq.kept_memory import freed_memory_kept

def resident() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) // 1024

torch.ones(1)
before = resident()
torch.ones(64 * 2**20)
outside = resident() - before
try:
    with freed_memory_kept():
        with freed_memory_kept():
            torch.ones(64 * 2**20)
        inside = resident() - before
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
after = resident() - before
torch.ones(64 * 2**20)
later = resident() - before
# As in any process whose allocator has grown its thresholds: a block of 4 MB comes from the heap, one of 256 MB not.
places = [torch.empty(size * 2**18).data_ptr() for size in (4, 256)]
with open("/proc/self/maps") as file:
    heap = next(line.split()[0] for line in file if "[heap]" in line)
low, high = (int(end, 16) for end in heap.split("-"))
print(outside, inside, after, later, *[int(low <= place < high) for place in places])
"""

glibc = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
pytestmark = pytest.mark.skipif(not glibc, reason="only glibc's allocator is told to keep memory")


def megabytes(**environment: str) -> list[int]:
    """What is held of a freed tensor of 256 MB: before the block, in it, after it, and of another one after it.

    And whether a tensor of 4 MB, and one of 256 MB, then lies on the heap.
    """
    known = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**known, **environment}, capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()]


def test_freed_memory_stays_within_the_block_alone() -> None:
    outside, inside, after, later, small, large = megabytes()
    assert inside > 200
    assert max(outside, after, later) < 100
    assert (small, large) == (1, 0)


def test_what_the_user_has_set_stays() -> None:
    assert max(megabytes(MALLOC_TRIM_THRESHOLD_="1000000")) < 100
    assert max(megabytes(GLIBC_TUNABLES="glibc.malloc.trim_threshold=1000000")) < 100
