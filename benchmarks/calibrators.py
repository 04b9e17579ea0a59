"""Time of the searches for an amax over one histogram: 8 bits, stride 1, one thread.

    python benchmarks/calibrators.py [--bins 2048] [--repeats 21]

The bar is 100 ms of processor time for 2048 bins; the exit code is 1 where a search is slower. Processor time is
that of the one thread that searches, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch

from qdq.calib import HistogramCalibrator

METHODS = ("entropy", "mse", "percentile")
BAR_MS = 100.0


def collected(bins: int, kind: str) -> HistogramCalibrator:
    """A calibrator that has seen a million values of one distribution, in four batches."""
    generator = torch.Generator().manual_seed(0)
    calibrator = HistogramCalibrator(8, None, kind == "relu", num_bins=bins)
    for _ in range(4):
        values = torch.randn(250_000, generator=generator)
        if kind == "relu":
            values = values.relu()
        elif kind == "heavy tails":
            values = values.pow(3)
        calibrator.collect(values)
    return calibrator


def search_ms(calibrator: HistogramCalibrator, method: str, repeats: int) -> tuple[list[float], float]:
    """Milliseconds of processor time of each repeat after one that is not counted, and the amax that was found."""
    found = calibrator.compute_amax(method)
    samples = []
    for _ in range(repeats):
        start = time.thread_time()
        found = calibrator.compute_amax(method)
        samples.append(1e3 * (time.thread_time() - start))
    assert found is not None
    return samples, float(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bins", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(1)
    slow = False
    print("| values | method | bins | median ms | p10..p90 ms | amax |\n| --- | --- | --- | --- | --- | --- |")
    for kind in ("normal", "relu", "heavy tails"):
        calibrator = collected(options.bins, kind)
        for method in METHODS:
            samples, amax = search_ms(calibrator, method, options.repeats)
            low, median, high = np.percentile(samples, (10, 50, 90))
            assert calibrator._calib_hist is not None
            bins = len(calibrator._calib_hist)
            print(f"| {kind} | {method} | {bins} | {median:.2f} | {low:.2f}..{high:.2f} | {amax:.4f} |")
            slow |= bool(median > BAR_MS and bins <= 2048)
    print(f"{'FAIL' if slow else 'PASS'}  every search of 2048 bins under {BAR_MS:.0f} ms")
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
