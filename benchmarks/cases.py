"""What deploy.py and accuracy.py measure: models with data and, where the weights are real, a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import common  # noqa: F401
import numpy as np
import photos
import torch
from torch import nn

from fixtures import classifiers, fashion
from fixtures.seeding import seeded

Inputs = tuple[torch.Tensor, ...]
Run = Callable[..., list[np.ndarray]]


@dataclass
class Case:
    """One model.

    `dynamic` holds, per input, the names of its dynamic dimensions. `tasks` maps the name of a score to a function of
    a runner, `run(*arrays) -> outputs`.
    """

    name: str
    model: nn.Module
    calibration: list[Inputs]
    held_out: list[Inputs]
    timed: Inputs
    kind: Literal["cnn", "transformer"] = "cnn"
    input_names: tuple[str, ...] = ("x",)
    dynamic: tuple[dict[int, str], ...] = ({0: "batch"},)
    tasks: dict[str, Callable[[Run], float]] = field(default_factory=dict)


def build(name: str, batch: int = 1, init: str = "measured", subset: int = 0) -> Case:
    """The case of that name; `batch` is the batch size that latency is measured at.

    Calibration data of other `subset` numbers (from 0) are others of the same kind, as many, and none of the same.

    `init` says how models without trained weights are drawn: `"measured"` (batch norms with measured statistics, random
    scales and shifts: `fixtures.seeding`) or `"torchvision"`, its own initialisation, where batch norms do nothing.

    Raises:
        KeyError: no case has that name.
    """
    if name in _REAL:
        return _REAL[name](batch, subset)
    if name in _TORCHVISION:
        return _torchvision_case(name, batch, init, subset)
    raise KeyError(f"no model {name!r}; known: {', '.join(names())}")


def names() -> list[str]:
    """Every case."""
    return [*_REAL, *_TORCHVISION]


def _batches(x: torch.Tensor, size: int) -> list[Inputs]:
    return [(part,) for part in x.split(size)]


def _top1(images: torch.Tensor, labels: torch.Tensor, batch: int = 100) -> Callable[[Run], float]:
    def score(run: Run) -> float:
        hits = 0
        for start in range(0, len(labels), batch):
            answer = run(images[start : start + batch].numpy())[0].argmax(1)
            hits += int((answer == labels[start : start + batch].numpy()).sum())
        return 100 * hits / len(labels)

    return score


def _fashion(name: str, model: Callable[[], nn.Module], batch: int, subset: int) -> Case:
    full = fashion.full_folder() is not None
    train, _ = fashion.load("train", full=subset > 0)
    images, labels = fashion.load("test", full=full)
    task = {f"top-1 % of {len(labels)}": _top1(images, labels)}
    held_out = _batches(images[:3000], 100)
    return Case(name, model(), _batches(_part(train, 256, subset), 32), held_out, (images[:batch],), tasks=task)


def _s1(batch: int, subset: int) -> Case:
    return _fashion("s1", classifiers.s1, batch, subset)


def _s2(batch: int, subset: int) -> Case:
    return _fashion("s2", classifiers.s2, batch, subset)


def _p1(batch: int, subset: int) -> Case:
    images, labels = fashion.load_uint8("test")
    return _p1_case("p1", images, labels, batch, subset)


def _p1_rest(batch: int, subset: int) -> Case:
    """P1 on the other 9000 test images, on which nothing was developed."""
    images, labels = fashion.load_uint8("test", full=True)
    return _p1_case("p1_rest", images[1000:], labels[1000:], batch, subset)


def _p1_case(name: str, images: np.ndarray, labels: np.ndarray, batch: int, subset: int) -> Case:
    import mobilenet_imagenet as p1

    train, _ = fashion.load_uint8("train", full=subset > 0)
    x = p1.prepare(images)
    task = {f"top-1 % of {len(labels)}": _top1(x, torch.from_numpy(labels))}
    calibration = _batches(p1.prepare(_part(train, 128, subset)), 32)
    return Case(name, p1.load(), calibration, _batches(x[:1000], 100), (x[:batch],), tasks=task)


def _part(data: Any, size: int, subset: int) -> Any:
    part = data[size * subset : size * (subset + 1)]
    if len(part) < size:
        raise ValueError(f"there is no subset {subset} of {size} of {len(data)}: fetch the whole data (setup_env.sh)")
    return part


def _minilm(batch: int, subset: int) -> Case:
    import minilm

    model, tokenizer = minilm.load()
    texts = minilm.calibration_texts(128, 64 * subset)
    calibration = [minilm.tokenize(tokenizer, texts[i : i + 8]) for i in range(0, len(texts), 8)]
    unseen = minilm.background(300)[200:248]
    held_out = [minilm.tokenize(tokenizer, unseen[i : i + 8]) for i in range(0, len(unseen), 8)]
    timed = minilm.tokenize(tokenizer, unseen[:batch], length=128)

    def encoder(run: Run) -> minilm.Encode:
        return lambda ids, mask: run(ids, mask)[0]

    tasks = {
        "Lee50 Pearson": lambda run: minilm.lee50(encoder(run), tokenizer),
        "WordSim Spearman": lambda run: minilm.wordsim(encoder(run), tokenizer),
    }
    dynamic = ({0: "batch", 1: "length"},) * 2
    return Case("minilm", model, calibration, held_out, timed, "transformer", ("ids", "mask"), dynamic, tasks)


def _torchvision_case(name: str, batch: int, init: str, subset: int) -> Case:
    size, options = _TORCHVISION[name]
    transformer = name.startswith("vit")

    def make_model() -> nn.Module:
        import torchvision_shim  # noqa: F401
        from torchvision import models

        return models.get_model(name, weights=None, **options)

    def make_inputs(batch: int = 4, seed: int = 0) -> Inputs:
        return (photos.crops(batch, size, seed),)

    if init == "torchvision":
        torch.manual_seed(0)
        model = make_model().eval()
    else:
        model = seeded(make_model, make_inputs)
    if transformer:
        _randomise_head(model)
    calibration = _batches(photos.crops(32, size, seed=1 + 10 * subset), 8)
    held_out = _batches(photos.crops(32, size, seed=2), 8)
    timed = (photos.crops(batch, size, seed=3),)
    return Case(name, model, calibration, held_out, timed, "transformer" if transformer else "cnn")


def _randomise_head(model: Any) -> None:
    # torchvision starts a ViT's head at zero: every output would be equal.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.heads.head.weight.normal_(0, 0.05)


_GOOGLENET = {"aux_logits": False, "init_weights": False}
# Input size and the options of torchvision's builder.
_TORCHVISION: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (224, {}),
    "resnet50": (224, {}),
    "mobilenet_v2": (224, {}),
    "vit_b_16": (224, {}),
    "vit_b_32": (224, {}),
    "mobilenet_v3_large": (224, {}),
    "efficientnet_b0": (224, {}),
    "densenet121": (224, {}),
    "googlenet": (224, _GOOGLENET),
    "inception_v3": (299, _GOOGLENET),
    "shufflenet_v2_x1_0": (224, {}),
    "regnet_y_400mf": (224, {}),
}
_REAL: dict[str, Callable[[int, int], Case]] = {
    "s1": _s1,
    "s2": _s2,
    "p1": _p1,
    "p1_rest": _p1_rest,
    "minilm": _minilm,
}

DEFAULT = ("s1", "p1", "mobilenet_v2", "resnet18", "resnet50", "vit_b_32", "minilm")
EXTRA = ("mobilenet_v3_large", "efficientnet_b0", "densenet121", "googlenet", "inception_v3")
