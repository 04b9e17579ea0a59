"""Whether the first convolution of a network gains by integers, where operations in float follow it.

    python benchmarks/first_convolution.py          # about ten minutes

Small networks of a first convolution, an activation function and a second convolution are timed with the first one in
integers and in float, in turns, in ONNX Runtime with 2 threads. Whole networks are timed likewise, and their SQNR
against the float model is taken on inputs that calibration did not see.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import cases
import contenders
import measure
import torch
from torch import nn

import qdq
from qdq import QuantDescriptor, Recipe

RESULTS = Path(__file__).parent / "results" / "first_convolution.json"
WEIGHTS = QuantDescriptor(num_bits=8, axis=0, narrow_range=True)
# Channels read, kernel, stride, channels given, what follows.
STEMS = (
    (3, 3, 2, 32, "silu"), (3, 3, 1, 32, "silu"), (3, 3, 2, 16, "hard swish"), (3, 3, 2, 64, "gelu"),
    (3, 3, 1, 32, "leaky relu"), (1, 3, 1, 16, "silu"), (1, 5, 1, 32, "silu"), (3, 4, 4, 96, "layer norm"),
    (3, 6, 2, 32, "silu"), (3, 7, 2, 64, "silu"), (3, 8, 8, 192, "gelu"), (3, 16, 16, 384, "gelu"),
    (4, 3, 1, 64, "silu"),
)  # fmt: skip
NETWORKS = {"efficientnet_b0": "features.0.0", "mobilenet_v3_large": "features.0.0"}


class _ChannelNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def _behind(name: str, channels: int) -> nn.Module:
    made = {"silu": nn.SiLU, "hard swish": nn.Hardswish, "gelu": nn.GELU, "leaky relu": nn.LeakyReLU}
    return made[name]() if name in made else _ChannelNorm(channels)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="interleaved rounds (default 31)")
    parser.add_argument("--seconds", type=float, default=0.2, help="length of one turn in a round (default 0.2)")
    parser.add_argument("--json", metavar="FILE", help="default results/first_convolution.json; - writes none")
    options = parser.parse_args(arguments)
    torch.set_num_threads(contenders.THREADS)
    report: dict[str, Any] = {"environment": measure.environment(), "stems": [], "networks": []}
    print(report["environment"], flush=True)
    print("| first convolution | products a value | time in float / in integers |\n| --- | --- | --- |", flush=True)
    for reads, kernel, stride, gives, name in STEMS:
        x = torch.randn(1, reads, 224, 224, generator=torch.Generator().manual_seed(0))
        first = nn.Conv2d(reads, gives, kernel, stride, kernel // 2 if kernel % 2 else 0)
        model = nn.Sequential(first, _behind(name, gives), nn.Conv2d(gives, 16, 1)).eval()
        ratio, _ = _compare(model, "0", [(x,)], [(x,)], (x,), options, Recipe(calibration="max", algorithms=[]))
        what = f"{reads} to {gives} channels, {kernel} x {kernel}, stride {stride}, {name}"
        report["stems"].append({"what": what, "products": reads * kernel**2, "float / integers": str(ratio)})
        print(f"| {what} | {reads * kernel**2} | {ratio} |", flush=True)
    print(
        "\n| network | time in float / in integers | SQNR in integers | in float |\n| --- | --- | --- | --- |",
        flush=True,
    )
    for name, layer in NETWORKS.items():
        case = cases.build(name)
        ratio, sqnr = _compare(case.model, layer, case.calibration, case.held_out, case.timed, options, Recipe())
        report["networks"].append({"what": name, "float / integers": str(ratio), "SQNR dB": sqnr})
        print(f"| {name} | {ratio} | {sqnr['integers']:.2f} dB | {sqnr['float']:.2f} dB |", flush=True)
    if options.json != "-":
        path = Path(options.json or RESULTS)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _compare(
    model: nn.Module,
    layer: str,
    calibration: list[cases.Inputs],
    held_out: list[cases.Inputs],
    timed: cases.Inputs,
    options: argparse.Namespace,
    recipe: Recipe,
) -> tuple[measure.Ratio, dict[str, float]]:
    placements = {
        "integers": dataclasses.replace(recipe, overrides={layer: {"weights": WEIGHTS}}),
        "float": dataclasses.replace(recipe, exclude=(layer,)),
    }
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name, of_layer in placements.items():
            path = Path(folder) / f"{name}.onnx"
            qdq.export_onnx(qdq.quantize(model, calibration, recipe=of_layer, progress=False), path)
            runs[name] = contenders.onnxruntime_contender(name, path).run
        taken = measure.interleaved(runs, timed, options.rounds, options.seconds)
        with torch.no_grad():
            reference = [[model(*batch).numpy()] for batch in held_out]
        sqnr = {name: measure.sqnr_db(reference, measure.outputs(run, held_out)) for name, run in runs.items()}
    return measure.ratio(taken["float"], taken["integers"]), sqnr


if __name__ == "__main__":
    sys.exit(main())
