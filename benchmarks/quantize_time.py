"""Seconds to quantize: qdq's default beside NNCF and ModelOpt's histogram calibration, same images, same run.

    python benchmarks/quantize_time.py                        # ResNet-50, 256 images of 224 x 224, three rounds
    python benchmarks/quantize_time.py --model resnet18 --images 64 --rounds 1

Timed is the way from the float PyTorch model to the quantized one in memory: what captures or converts the model
included, imports and the writing of files not. NNCF gets the model as OpenVINO's converter makes it from PyTorch,
ModelOpt calibrates in PyTorch. Every contender runs in a process of its own, one after the other, round by round, on
2 threads. The exit code is 1 where qdq takes longer than NNCF, or than half of ModelOpt's histogram calibration
(ratios of medians). `setup_env.sh FOLDER accuracy` makes the environment.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import contenders
import measure
import photos
import torch
from cases import Case

RESULTS = Path(__file__).parent / "results" / "quantize_time.json"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    taken: dict[str, list[float]] = {name: [] for name in options.contenders}
    torch.set_num_threads(contenders.THREADS)
    environment = measure.environment()
    print(f"{environment}\n{options.model}, {options.images} images in batches of {options.batch}", flush=True)
    # A fresh interpreter for each: nobody profits from what another has compiled, cached or allocated.
    context = multiprocessing.get_context("spawn")
    for turn in range(options.rounds):
        for name in options.contenders:
            with context.Pool(1) as pool:
                seconds = pool.apply(_seconds, (name, options.model, options.images, options.batch))
            taken[name].append(seconds)
            print(f"round {turn + 1}: {name:20} {seconds:7.1f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    print(f"\n| contender | median s | of qdq |\n| --- | --- | --- |\n{_rows(medians)}")
    lines = _bars(medians)
    print("\n".join(lines))
    if options.json != "-":
        report = {
            "environment": environment,
            "model": options.model,
            "images": options.images,
            "batch": options.batch,
            "seconds": taken,
            "bars": lines,
        }
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(line.startswith("FAIL") for line in lines))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=cases.names(), default="resnet50", metavar="NAME", help="a CNN of cases.py")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=list(_WAYS), default=list(_WAYS), metavar="NAME")
    parser.add_argument("--json", metavar="FILE", default=str(RESULTS), help="- writes none")
    options = parser.parse_args(arguments)
    if min(options.images, options.batch, options.rounds) < 1:
        parser.error("--images, --batch and --rounds must be at least 1")
    return options


def _qdq(case: Case) -> Callable[[], object]:
    import qdq

    return lambda: qdq.quantize(case.model, case.calibration, progress=False)


def _nncf(case: Case) -> Callable[[], object]:
    import nncf
    import openvino as ov

    logging.getLogger("nncf").setLevel(logging.ERROR)
    feeds = [tensor.numpy() for (tensor,) in case.calibration]

    def make() -> object:
        model: Any = ov.convert_model(case.model, example_input=case.calibration[0][0])
        return nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds), preset=nncf.QuantizationPreset.MIXED)

    return make


def _modelopt(algorithm: str) -> Callable[[Case], Callable[[], object]]:
    def way(case: Case) -> Callable[[], object]:
        import accuracy_peers
        import modelopt.torch.quantization  # noqa: F401

        return lambda: accuracy_peers.by_modelopt(case, algorithm)

    return way


_WAYS: dict[str, Callable[[Case], Callable[[], object]]] = {
    "qdq": _qdq,
    "nncf": _nncf,
    "modelopt": _modelopt("max"),
    "modelopt histogram": _modelopt("histogram"),
}


def _seconds(name: str, model: str, images: int, batch: int) -> float:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(contenders.THREADS)
    case = cases.build(model)
    size = case.timed[0].shape[-1]
    case.calibration = [(part,) for part in photos.crops(images, size, seed=1).split(batch)]
    make = _WAYS[name](case)
    start = time.perf_counter()
    make()
    return time.perf_counter() - start


def _rows(medians: dict[str, float]) -> str:
    ours = medians.get("qdq")
    return "\n".join(
        f"| {name} | {value:.1f} | {'-' if ours is None else f'{value / ours:.2f}'} |"
        for name, value in medians.items()
    )


def _bars(medians: dict[str, float]) -> list[str]:
    lines = []
    for rival, share in (("nncf", 1.0), ("modelopt histogram", 0.5)):
        if "qdq" in medians and rival in medians:
            ratio = medians["qdq"] / medians[rival]
            verdict = "PASS" if ratio <= share else "FAIL"
            lines.append(f"{verdict}  qdq takes {ratio:.2f} of the time of {rival} (<= {share:g})")
    return lines


if __name__ == "__main__":
    sys.exit(main())
