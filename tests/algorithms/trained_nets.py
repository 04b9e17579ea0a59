"""What low bits cost S1 and S2, and what an algorithm gets back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, fx

from algorithms.layer_cases import quantized
from fixtures import fashion
from fixtures.classifiers import s1, s2
from qdq.algorithms.algorithm import Algorithm
from qdq.algorithms.walk import Walk

NETS = {"S1": s1, "S2": s2}


class Score(NamedTuple):
    """SQNR of the output against the float model's, in dB, and the shares of test images that both classify rightly."""

    sqnr: float
    accuracy: float
    in_float: float


@cache
def _start(net: str, bits: int, images: int) -> tuple[fx.GraphModule, dict[str, Tensor], list[Tensor]]:
    """The quantized net, its state before any algorithm, and the batches."""
    batches = list(fashion.load("train", limit=images)[0].split(32))
    qmodel = quantized(NETS[net](), batches, bits=bits)
    return qmodel, {k: v.clone() for k, v in qmodel.state_dict().items()}, batches


@cache
@torch.no_grad()
def _wanted(net: str, images: int) -> Tensor:
    model = NETS[net]()
    return torch.cat([model(x) for x in fashion.load("test", limit=images)[0].split(125)])


def score(net: str, bits: int, algorithms: Sequence[Algorithm], images: int = 96, tested: int = 1000) -> Score:
    """A net with weights of so many bits per channel, improved by the algorithms."""
    return _score(net, bits, tuple(algorithms), images, tested)


@cache
@torch.no_grad()
def _score(net: str, bits: int, algorithms: tuple[Algorithm, ...], images: int, tested: int) -> Score:
    """Several tests compare with the same ones."""
    qmodel, state, batches = _start(net, bits, images)
    qmodel.load_state_dict(state)
    if algorithms:
        walk = Walk(qmodel, [[x] for x in batches])
        walk.run(algorithms, progress=False)
        for algorithm in algorithms:
            algorithm.finish(walk, progress=False)
    given, labels = fashion.load("test", limit=tested)
    wanted = _wanted(net, tested)
    outputs = torch.cat([qmodel(x) for x in given.split(125)])
    sqnr = 10 * torch.log10(wanted.square().sum() / (outputs - wanted).square().sum())
    right = [float((y.argmax(1) == labels).float().mean()) for y in (outputs, wanted)]
    return Score(float(sqnr), *right)
