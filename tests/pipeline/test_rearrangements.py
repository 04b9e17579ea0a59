"""Operations that only move values: what the table of them promises, and what its members become in a deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pipeline.helpers import deploy, operations, optimized_graph, randn
from qdq.graph.ops import REARRANGEMENTS, SPLITS, Kind, kind_of

aten = torch.ops.aten

# Arguments behind a tensor of the shape.
CALLS: dict[Any, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    aten.view.default: ((2, 6), ([3, 4],)),
    aten._unsafe_view.default: ((2, 6), ([3, 4],)),
    aten.reshape.default: ((2, 6), ([3, 4],)),
    aten.flatten.using_ints: ((2, 3, 2), (1,)),
    aten.unflatten.int: ((2, 6), (1, [2, 3])),
    aten.permute.default: ((2, 3, 2), ([2, 0, 1],)),
    aten.transpose.int: ((2, 6), (0, 1)),
    aten.t.default: ((2, 6), ()),
    aten.squeeze.default: ((2, 1, 6), ()),
    aten.squeeze.dim: ((2, 1, 6), (1,)),
    aten.squeeze.dims: ((2, 1, 6), ([1],)),
    aten.unsqueeze.default: ((2, 6), (1,)),
    aten.expand.default: ((2, 1, 6), ([2, 3, 6],)),
    aten.repeat.default: ((2, 6), ([2, 1],)),
    aten.repeat_interleave.self_int: ((2, 6), (2, 1)),
    aten.select.int: ((2, 6), (1, 3)),
    aten.slice.Tensor: ((2, 6), (1, 1, 6, 2)),
    aten.flip.default: ((2, 6), ([1],)),
    aten.roll.default: ((2, 6), ([2], [1])),
    aten.movedim.int: ((2, 3, 2), (0, 2)),
    aten.pixel_shuffle.default: ((1, 4, 2, 2), (2,)),
    aten.pixel_unshuffle.default: ((1, 1, 4, 4), (2,)),
    aten.channel_shuffle.default: ((1, 6, 2), (2,)),
    aten.split.Tensor: ((2, 6), (4, 1)),
    aten.split_with_sizes.default: ((2, 6), ([1, 5], 1)),
    aten.chunk.default: ((2, 6), (4, 1)),
    aten.unbind.int: ((2, 6), (0,)),
    aten.tensor_split.sections: ((2, 6), (4, 1)),
}


def test_the_table_is_tested_as_a_whole() -> None:
    assert set(CALLS) == REARRANGEMENTS | SPLITS


@pytest.mark.parametrize("operation", CALLS, ids=str)
def test_values_of_any_dtype_are_moved_to_the_same_places(operation: Any) -> None:
    shape, arguments = CALLS[operation]
    places = torch.arange(torch.Size(shape).numel()).reshape(shape)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(50)
    moved = operation(places, *arguments)
    assert isinstance(moved, (list, tuple)) == (operation in SPLITS)
    for dtype in (torch.float32, torch.int8):
        given = values.to(dtype)
        found = operation(given, *arguments)
        for one, where in zip(pytree.tree_leaves(found), pytree.tree_leaves(moved), strict=True):
            assert torch.equal(one, given.flatten()[where])


class Repeated(nn.Module):
    """Heads repeated one by one, as attention with fewer heads of keys than of queries has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.repeat_interleave(self.first(x), 2, 1))


def test_repeated_values_are_quantized_as_other_moved_ones_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = deploy(Repeated().eval(), [randn(16, 8, seed=1)], tmp_path / "m.onnx")
    assert made.fidelity.sqnr_db > 55, made.fidelity
    (node,) = [n for n in made.qmodel.graph.nodes if n.target is aten.repeat_interleave.self_int]
    assert kind_of(node) is Kind.MOVE
    assert operations(optimized_graph(made.path))["QGemm"] == 2
