"""What fake quantization costs a whole model: ResNet-50 in simulation, a training step of ResNet-18.

    python -m benchmarks.qat                        # both, with the peers that can be imported
    python -m benchmarks.qat --cases training --rounds 41
    python -m benchmarks.qat --quick                # does it run? small inputs, few rounds, nothing is judged

*simulation*: forward without gradient, eager, in eval mode, all quantizers on: float, `qdq.nn.quantize_modules` with
calibrated ranges, the graph of `qdq.quantize`. *training*: forward, backward and SGD step of a module-quantized model
beside float and the fake quantizers of ModelOpt, Brevitas and torchao (`setup_env.sh FOLDER qat`; those that cannot be
imported are left out with the reason). Contenders take turns in random order; ratios to float are made round by round.
Weights are random. The exit code is 1 where a bar was missed or qdq failed, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import io
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import common  # noqa: F401
import kernel_report
import numpy as np
import qat_peers
import torch
from kernel_harness import Contender, Measured, Plan, describe, measure
from kernel_report import progress, shown_time
from measure import ratio
from qat_peers import DISTRIBUTIONS, PEERS, Trainable
from torch import Tensor, nn

from fixtures.seeding import images, seeded

RESULTS = Path(__file__).resolve().parent / "results" / "qat.json"
BATCH = 8
CLASSES = 1000
# Time over that of the float model, for the contenders named.
BARS = {
    "simulation": (1.25, ("qdq modules", "qdq graph")),
    "training": (1.35, ("qdq modules",)),
}
_COLUMNS = (
    *(("case", 10), ("contender", 22), ("quantizers", 10), ("median", 9), ("quartiles", 22)),
    *(("x float (p10..p90)", 20), ("bar", 14)),
)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    found = kernel_report.machine()
    print(kernel_report.machine_lines(found) + f"\n{options.threads} threads, batch {BATCH}\n", flush=True)
    recorded = {name: value for name, value in vars(options).items() if name != "json"}
    report: dict[str, Any] = {"machine": found, "options": recorded, "peers": _versions(), "rows": []}
    table = kernel_report.Table(_COLUMNS)
    cases: dict[str, Callable[[argparse.Namespace, dict[str, int], dict[str, str]], list[Contender]]] = {
        "simulation": _simulation,
        "training": _training,
    }
    passed = True
    for case in options.cases:
        quantizers: dict[str, int] = {}
        left_out: dict[str, str] = {}
        contenders = cases[case](options, quantizers, left_out)
        progress(f"{case}: {len(contenders)} contenders, {options.rounds} rounds")
        plan = Plan(0.0, options.rounds, options.rounds, sample_seconds=0.0)
        measured = measure(contenders, plan)
        left_out |= measured.skipped
        passed &= _report(case, contenders, measured, quantizers, left_out, table, report["rows"])
        if options.json is not None:
            kernel_report.write_json(options.json, report)
    if options.json is not None:
        progress(f"wrote {options.json}")
    return int(not passed and not options.quick)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(BARS), default=list(BARS))
    parser.add_argument("--rounds", type=int, help="default 21")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-peers", action="store_true", help="qdq and float only")
    parser.add_argument("--quick", action="store_true", help="images of 64 and 32 pixels, 2 rounds, nothing is judged")
    parser.add_argument("--json", type=Path, help=f"default: results/{RESULTS.name} for a whole run, else nothing")
    options = parser.parse_args(arguments)
    if options.json is None and not (options.quick or options.skip_peers) and set(options.cases) == set(BARS):
        options.json = RESULTS
    options.rounds = options.rounds or (2 if options.quick else 21)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    return options


def _versions() -> dict[str, str]:
    found = {}
    for name in (*DISTRIBUTIONS.values(), "torchvision"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _resnet(name: str, size: int) -> nn.Module:
    def build() -> nn.Module:
        import torchvision_shim  # noqa: F401
        from torchvision import models

        return models.get_model(name, weights=None, num_classes=CLASSES)

    return seeded(build, images(3, size, size))


def _batch(size: int) -> Tensor:
    return images(3, size, size)(batch=BATCH, seed=1)[0]


def _simulation(options: argparse.Namespace, quantizers: dict[str, int], left_out: dict[str, str]) -> list[Contender]:
    size = 64 if options.quick else 224
    progress(f"simulation: ResNet-50, {BATCH} x 3 x {size} x {size}")
    model, batch = _resnet("resnet50", size), _batch(size)
    contenders = [Contender("float", "floor", _forward(model, batch))]
    quantizers["float"] = 0
    makers: dict[str, Callable[[nn.Module, Tensor], Trainable]] = {"qdq modules": _modules, "qdq graph": _graph}
    for label, make in makers.items():
        progress(f"simulation: {label}")
        try:
            made = make(copy.deepcopy(model), batch)
        except Exception as error:
            left_out[label] = describe(error)
            continue
        quantizers[label] = quantizers[f"{label}, reference"] = made.quantizers
        run = _forward(made.model, batch)
        contenders.append(Contender(label, label, run))
        contenders.append(Contender(f"{label}, reference", "reference", run, "reference"))
    return contenders


def _modules(model: nn.Module, batch: Tensor) -> Trainable:
    made = qat_peers.by_qdq(model, batch)
    made.model.eval()
    return made


def _graph(model: nn.Module, batch: Tensor) -> Trainable:
    import qdq
    from qdq.affine_quantizer import AffineQuantizer
    from qdq.constant_quantizers import BiasQuantizer, WeightQuantizer

    qmodel = qdq.quantize(model, [batch], progress=False)
    kinds = (AffineQuantizer, WeightQuantizer, BiasQuantizer)
    return Trainable(qmodel, sum(isinstance(m, kinds) for m in qmodel.modules()))


def _forward(model: nn.Module, batch: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return model(batch)

    return run


def _training(options: argparse.Namespace, quantizers: dict[str, int], left_out: dict[str, str]) -> list[Contender]:
    size = 32 if options.quick else 64
    progress(f"training: ResNet-18, {BATCH} x 3 x {size} x {size}")
    model, batch = _resnet("resnet18", size), _batch(size)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=torch.Generator().manual_seed(0))
    makers: dict[str, Callable[[nn.Module, Tensor], Trainable]] = {
        "float": qat_peers.by_float,
        "qdq modules": qat_peers.by_qdq,
        **({} if options.skip_peers else PEERS),
    }
    contenders = []
    for label, make in makers.items():
        progress(f"training: {label}")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some say what they insert
                made = make(copy.deepcopy(model), batch)
        except ImportError as error:
            left_out[label] = f"not importable: {error}"
            continue
        except Exception as error:
            left_out[label] = describe(error)
            continue
        quantizers[label] = made.quantizers
        run = _training_step(made.model, batch, labels)
        contenders.append(Contender(label, "floor" if label == "float" else label, run))
        if label == "qdq modules":
            quantizers[f"{label}, reference"] = made.quantizers
            contenders.append(Contender(f"{label}, reference", "reference", run, "reference"))
    return contenders


def _training_step(model: nn.Module, batch: Tensor, labels: Tensor) -> Callable[[], Any]:
    # So small a rate that the weights of all contenders stay alike.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(batch), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def _report(
    case: str,
    contenders: list[Contender],
    measured: Measured,
    quantizers: dict[str, int],
    left_out: dict[str, str],
    table: kernel_report.Table,
    rows: list[dict[str, Any]],
) -> bool:
    """Prints and records one case; whether qdq ran and met its bar."""
    most, judged = BARS[case]
    passed = all(label in measured.samples for label in judged)
    base = measured.samples.get("float")
    for contender in (c for c in contenders if c.label in measured.samples):
        label, taken = contender.label, measured.samples[contender.label]
        low, median, high = (float(v) for v in np.percentile(taken, (25, 50, 75)))
        against = None if base is None else ratio(taken.tolist(), base.tolist())
        met = None if against is None or label not in judged else against.median <= most
        passed &= met is not False
        bar = "" if met is None else f"{'PASS' if met else 'FAIL'} <= {most}"
        quartiles = f"{shown_time(low)}..{shown_time(high)}"
        table.row([case, label, str(quantizers[label]), shown_time(median), quartiles, str(against or ""), bar])
        row: dict[str, Any] = {"case": case, "contender": label, "quantizers": quantizers[label], "ms": median}
        row |= {"quartiles_ms": [low, high], "rounds": len(taken)}
        if against is not None:
            row |= {"times_float": against.median, "p10_p90": [against.low, against.high]}
        rows.append(row | ({} if met is None else {"bar": most, "passed": met}))
    for label, reason in left_out.items():
        table.row([case, label, "", "left out", reason, "", ""])
        rows.append({"case": case, "contender": label, "left_out": reason})
    return passed


if __name__ == "__main__":
    sys.exit(main())
