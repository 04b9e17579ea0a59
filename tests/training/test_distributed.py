"""DistributedDataParallel over two processes on a CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import qdq.nn
from qdq.descriptor import QuantDescriptor

WORLD = 2

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)


def model() -> nn.Module:
    torch.manual_seed(0)
    learned = QuantDescriptor(learn_amax=True, amax=0.5)
    return nn.Sequential(
        qdq.nn.QuantConv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), qdq.nn.QuantLinear(9, 2, quant_desc_input=learned)
    )


def batches() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(WORLD, 4, 2, 5, generator=generator), torch.randint(2, (WORLD, 4), generator=generator)


def calibrate(model: nn.Module, factor: float = 1.0) -> None:
    model[0].input_quantizer.amax = 2.0 * factor
    model[0].weight_quantizer.amax = [[[0.2 * factor]], [[0.3 * factor]], [[0.4 * factor]]]


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD)
    try:
        net = model()
        # Rank 1 was calibrated otherwise: what rank 0 holds must win.
        calibrate(net, factor=1.0 + rank)
        parallel = DistributedDataParallel(net)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        x, y = batches()
        F.cross_entropy(parallel(x[rank]), y[rank]).backward()
        gradients = {n: p.grad for n, p in net.named_parameters()}
        optimizer.step()
        torch.save((gradients, net.state_dict()), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_one_step_is_that_of_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(Path(__file__).parents[1]), str(Path(qdq.nn.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    mp.spawn(one_process, args=(str(tmp_path),), nprocs=WORLD)
    (first, state), (second, other) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    whole = model()
    calibrate(whole)
    x, y = batches()
    torch.stack([F.cross_entropy(whole(x[rank]), y[rank]) for rank in range(WORLD)]).mean().backward()
    assert any("clip_value" in name for name in first)
    for name, parameter in whole.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter.grad)
    assert state.keys() == other.keys()
    assert {"0._input_quantizer._amax", "0._weight_quantizer._amax"} <= state.keys()
    for name in state:
        assert torch.equal(state[name], other[name])
    assert torch.equal(state["0._weight_quantizer._amax"], whole[0].weight_quantizer.amax)
