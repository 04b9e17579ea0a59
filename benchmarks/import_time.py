"""What `import qdq` costs on top of `import torch`: the median over fresh interpreters.

    python benchmarks/import_time.py [--repeats 11]

The bar is 0.3 s of processor time, which other work on the machine does not lengthen; the exit code is 1 where it is
missed. Also lists packages that `import qdq` must not load.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

BAR_SECONDS = 0.3
LOADED_WHEN_USED = ("typer", "rich", "onnx", "onnxscript", "onnxruntime", "openvino", "sklearn")
_PROGRAM = """
import time, sys
import torch
start, busy = time.perf_counter(), time.process_time()
import qdq
print(time.perf_counter() - start, time.process_time() - busy)
print(" ".join(name for name in {names} if name in sys.modules))
"""


def measure() -> tuple[float, float, list[str]]:
    """Seconds and processor seconds of one import in a fresh interpreter; what it loaded of `LOADED_WHEN_USED`."""
    command = [sys.executable, "-c", _PROGRAM.format(names=LOADED_WHEN_USED)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    wall, busy = map(float, lines[0].split())
    return wall, busy, lines[1].split() if len(lines) > 1 else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    measure()  # writes the byte code and warms the file cache
    results = [measure() for _ in range(options.repeats)]
    seconds = sorted(result[0] for result in results)
    median, busy = statistics.median(seconds), statistics.median(result[1] for result in results)
    loaded = results[0][2]
    spread = f"{seconds[0]:.3f} to {seconds[-1]:.3f} s of {len(seconds)} runs"
    print(f"import qdq after torch: median {median:.3f} s, {spread}; processor time {busy:.3f} s")
    print(f"{'PASS' if busy < BAR_SECONDS else 'FAIL'}  under {BAR_SECONDS} s of processor time")
    print(f"{'FAIL  loads ' + ', '.join(loaded) if loaded else 'PASS  loads none of ' + ', '.join(LOADED_WHEN_USED)}")
    return int(busy >= BAR_SECONDS or bool(loaded))


if __name__ == "__main__":
    sys.exit(main())
