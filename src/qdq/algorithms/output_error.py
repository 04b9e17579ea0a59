"""The squared error of a layer's output as a function of its weight, from samples seen once."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_matrix import LayerMatrix
from .walk import LayerVisit

# Values of the patches that are held at once while a Hessian is summed up.
_CHUNK = 1 << 22


class OutputError:
    """|| y - (x (rows + change) + bias) ||**2 for every output channel.

    y is what the layer gives in the float model, x what the quantized model gives it. As a function of the change it is
    quadratic: change' H change - 2 change' r + constant, with H = X' X and r = X' (y - x rows - bias). Where a patch
    has more values than there are positions, X is kept instead of H.

    Attributes:
        matrix: the layer's.
        rows: [groups, channels of a group, values of a patch], the weight before it is quantized.
        correlation: r, of the shape of `rows`.
        constant: [groups, channels of a group].
        count: of the positions looked at.

    Args:
        visit: of the layer.
        positions: so many positions are looked at, drawn where there are more.
        seed: of the draw.
    """

    def __init__(self, visit: LayerVisit, positions: int = 16384, seed: int = 0) -> None:
        weight, bias = visit.weight.float(), visit.bias
        self.matrix = matrix = LayerMatrix(visit.layer, weight)
        self.rows = rows = matrix.rows(weight)
        groups, channels, width = rows.shape
        self.correlation = torch.zeros_like(rows)
        self.constant = rows.new_zeros(groups, channels)
        self.count = 0
        self._patches: list[Tensor] = []
        self._hessian: Tensor | None = None
        counts = [matrix.positions(x) for x in visit.inputs]
        total = sum(counts)
        if min(total, positions) >= width:
            self._hessian = rows.new_zeros(groups, width, width)
        generator = torch.Generator().manual_seed(seed)
        for x, y, count in zip(visit.inputs, visit.float_outputs, counts, strict=True):
            drawn = torch.arange(count)
            if total > positions:
                drawn = torch.randperm(count, generator=generator)[: -(-positions * count // total)].sort().values
            for part in drawn.to(x.device).split(max(1, _CHUNK // (groups * width))):
                patches = matrix.patches(x, part).float()
                left = matrix.results(y, part).float() - patches @ rows.transpose(1, 2)
                if bias is not None:
                    left = left - bias.float().reshape(groups, 1, channels)
                self.correlation += left.transpose(1, 2) @ patches
                self.constant += left.square().sum(1)
                self.count += len(part)
                if self._hessian is None:
                    self._patches.append(patches)
                else:
                    self._hessian += patches.transpose(1, 2) @ patches

    @property
    def hessian(self) -> Tensor:
        """H, [groups, values of a patch, values of a patch]: half the second derivative of every channel's error."""
        if self._hessian is not None:
            return self._hessian
        patches = torch.cat(self._patches, 1) if self._patches else self.rows.new_zeros(len(self.rows), 0, self.width)
        return patches.transpose(1, 2) @ patches

    @property
    def keeps_hessian(self) -> bool:
        """Whether the Hessian is kept; else every reading of it computes it anew."""
        return self._hessian is not None

    @property
    def width(self) -> int:
        """Values of a patch."""
        return self.rows.shape[2]

    def curvature(self, change: Tensor) -> Tensor:
        """change H, of the shape of `rows`."""
        if self._hessian is not None:
            return change @ self._hessian
        parts = [(change @ p.transpose(1, 2)) @ p for p in self._patches]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(change)

    def of(self, rows: Tensor) -> Tensor:
        """The error of other rows, [groups, channels of a group]."""
        change = rows - self.rows
        return (change * (self.curvature(change) - 2 * self.correlation)).sum(2) + self.constant
