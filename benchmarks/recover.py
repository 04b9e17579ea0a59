"""`qdq.recover` from a per-tensor 8-bit start that loses more than 5 %, on P1 and S2: the path that it takes.

    python benchmarks/recover.py
    python benchmarks/recover.py --models s2 --target 1.0 --budget 1h --json -

P1 is MobileNetV2 with ImageNet weights (`mobilenet_imagenet.py`), calibrated on 128 training images, S2 the small
MobileNet of the test fixtures. The metric is the share of the 1000 committed test images that are classified. P1 starts
from min-max ranges; S2 loses nothing with those, and starts from entropy ranges. The exit code is 1 where the target
was missed, or the start lost no more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from torch import nn

import qdq
from fixtures import classifiers, fashion

RESULTS = common.REPOSITORY / "benchmarks" / "results" / "recover.json"


@dataclass
class Start:
    """A model, what it is calibrated and scored on, and how its ranges are found at first."""

    model: nn.Module
    calibration: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    method: str


def _p1() -> Start:
    import mobilenet_imagenet as p1

    train, _ = fashion.load_uint8("train")
    images, labels = fashion.load_uint8("test")
    return Start(p1.load(), p1.prepare(train[:128]), p1.prepare(images), torch.from_numpy(labels), "max")


def _s2() -> Start:
    images, labels = fashion.load("test")
    return Start(classifiers.s2(), fashion.load("train", limit=128)[0], images, labels, "entropy")


MODELS: dict[str, Callable[[], Start]] = {"p1": _p1, "s2": _s2}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--target", type=float, default=0.99, help="share of the float accuracy (default 0.99)")
    parser.add_argument("--budget", default="30min", help="for each model (default 30min)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default 1)")
    parser.add_argument("--json", metavar="FILE", help="default results/recover.json; - writes none")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().handlers[0].addFilter(lambda record: record.name.startswith("qdq"))
    torch.set_num_threads(options.threads)
    report, failed = {}, False
    for name in options.models:
        start = MODELS[name]()
        begun = time.perf_counter()
        found = _recover(start, options)
        seconds = time.perf_counter() - begun
        first = found.rungs[0].metric
        assert first is not None
        lost = 1 - first / found.baseline
        failed |= not found.reached or lost <= 0.05
        print(f"\n### {name}: the start loses {100 * lost:.1f} %, {seconds:.0f} s in all\n\n{found}\n", flush=True)
        report[name] = {"lost_at_start": lost, "seconds": seconds, **found.to_dict()}
    if options.json != "-":
        Path(options.json or RESULTS).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("FAILED" if failed else "every target was reached")
    return int(failed)


def _recover(start: Start, options: argparse.Namespace) -> qdq.Recovery:
    def evaluate(model: nn.Module) -> float:
        return classifiers.accuracy(model, start.images, start.labels, batch=100)

    per_tensor = qdq.QuantDescriptor(num_bits=8, narrow_range=True)
    recipe = qdq.Recipe(weights=per_tensor, calibration=start.method, algorithms=[])
    batches = list(start.calibration.split(32))
    return qdq.recover(start.model, batches, evaluate, options.target, options.budget, recipe=recipe)


if __name__ == "__main__":
    sys.exit(main())
