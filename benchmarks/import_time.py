"""What `import qdq` and `import pytorch_quantization` cost on top of `import torch`: medians over fresh interpreters.

    python benchmarks/import_time.py [--repeats 11]

The bar is 0.3 s of processor time, which other work on the machine does not lengthen; the exit code is 1 where it is
missed. Also lists packages that neither may load.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

BAR_SECONDS = 0.3
PACKAGES = ("qdq", "pytorch_quantization")
LOADED_WHEN_USED = ("typer", "rich", "onnx", "onnxscript", "onnxruntime", "openvino", "sklearn")
_PROGRAM = """
import time, sys
import torch
start, busy = time.perf_counter(), time.process_time()
import {package}
print(time.perf_counter() - start, time.process_time() - busy)
print(" ".join(name for name in {names} if name in sys.modules))
"""


def measure(package: str) -> tuple[float, float, list[str]]:
    """Seconds and processor seconds of one import in a fresh interpreter; what it loaded of `LOADED_WHEN_USED`."""
    command = [sys.executable, "-c", _PROGRAM.format(package=package, names=LOADED_WHEN_USED)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    wall, busy = map(float, lines[0].split())
    return wall, busy, lines[1].split() if len(lines) > 1 else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    return max([judge(package, options.repeats) for package in PACKAGES])


def judge(package: str, repeats: int) -> int:
    """Prints what one package costs; 1 where the bar is missed or a package is loaded too early."""
    measure(package)  # writes the byte code and warms the file cache
    results = [measure(package) for _ in range(repeats)]
    seconds = sorted(result[0] for result in results)
    median, busy = statistics.median(seconds), statistics.median(result[1] for result in results)
    loaded = results[0][2]
    spread = f"{seconds[0]:.3f} to {seconds[-1]:.3f} s of {len(seconds)} runs"
    print(f"import {package} after torch: median {median:.3f} s, {spread}; processor time {busy:.3f} s")
    print(f"{'PASS' if busy < BAR_SECONDS else 'FAIL'}  under {BAR_SECONDS} s of processor time")
    print(f"{'FAIL  loads ' + ', '.join(loaded) if loaded else 'PASS  loads none of ' + ', '.join(LOADED_WHEN_USED)}")
    return int(busy >= BAR_SECONDS or bool(loaded))


if __name__ == "__main__":
    sys.exit(main())
