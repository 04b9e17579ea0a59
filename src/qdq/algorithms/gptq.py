"""GPTQ: codes are chosen one input after the other, and what each leaves over is taken up by those that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..calib.statistics import MOST_SAMPLES
from ..errors import CalibrationError
from .algorithm import FEW_SAMPLES, Algorithm
from .layer_matrix import LayerMatrix
from .option_checks import check_integer, check_real
from .output_error import OutputError
from .rounding import keep_better, limit_rows, step_rows
from .walk import LayerVisit

# What a Hessian's diagonal must have: squares below are no longer exact in float32.
_NOTHING = 1e-35
# For each product of a layer of few. With 8 the error on other inputs grows by 5 % where inputs are independent, and
# falls to half where they are correlated, as the taps of a kernel are; with 1 it can triple.
_LEAST_POSITIONS = 8


@dataclass(frozen=True)
class GPTQ(Algorithm):
    """Chooses the codes of every layer so that together they give the output of the unquantized weight.

    Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers" (ICLR 2023), algorithm 1, with the Hessian of the quantized inputs. A value that every sample
    multiplies by zero is rounded to nearest. An output channel that would end with a larger error than it has, counted
    against the float model's output, keeps its codes.

    Memory: three float64 matrices of the square of a patch's values (kernel size x input channels of a group), for
    every group.

    Attributes:
        damping: added to the diagonal of the Hessian, as a share of the diagonal's mean.
        block_size: columns whose updates are kept back and made at once; it changes speed, not the result.
        order: "descending" takes the columns of the largest inputs first, "given" takes them as they are.
        positions: so many positions of a layer's output are looked at, drawn where there are more.
        seed: of the draw.
        most_products: layers that add up more products for a value of their result (kernel size x input channels of a
            group) are left alone, and so are those of which fewer than 8 positions for each product are looked at
            (`positions`, or fewer in the samples): codes chosen from fewer lose as often as they gain. None, the
            default, takes all layers.
    """

    name: ClassVar[str] = "gptq"
    citation: ClassVar[str] = "Frantar et al. 2022, arXiv:2210.17323"

    damping: float = 0.01
    block_size: int = 128
    order: str = "descending"
    positions: int = 16384
    seed: int = 0
    most_products: int | None = None

    def __post_init__(self) -> None:
        check_real("damping", self.damping, above=0.0)
        check_integer("block_size", self.block_size, least=1)
        if self.order not in ("descending", "given"):
            raise ValueError(f"order must be 'descending' or 'given', not {self.order!r}")
        check_integer("positions", self.positions, least=1)
        check_integer("seed", self.seed, least=0)
        if self.most_products is not None:
            check_integer("most_products", self.most_products, least=1)

    @property
    def walk_samples(self) -> int:
        """Layers of few products have few codes to choose, and many positions in each sample."""
        return MOST_SAMPLES if self.most_products is None else FEW_SAMPLES

    def visit_layer(self, visit: LayerVisit) -> None:
        """Sets the layer's weight to the chosen codes times the step sizes, which stay.

        Inputs that are not finite leave the layer as it is.

        Raises:
            CalibrationError: the damping is too small for the layer's inputs.
        """
        if self.most_products is not None and not self._is_chosen(visit, self.most_products):
            return
        error = OutputError(visit, self.positions, self.seed)
        if not error.constant.numel() or not error.count:
            return
        hessian = error.hessian
        if torch.isfinite(hessian).all():
            least, most = limit_rows(visit, error)
            try:
                codes = self.codes(error.rows, hessian, step_rows(visit, error), least, most)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                change = "lower" if self.damping > 1 else "raise"
                raise CalibrationError(
                    f"gptq: the inputs of layer {visit.layer.name!r} leave its Hessian singular with damping="
                    f"{self.damping:g}: {change} it (0.01 is the default), or calibrate with more samples"
                ) from None
            keep_better(visit, error, codes)

    def codes(self, rows: Tensor, hessian: Tensor, step: Tensor, least: Tensor, most: Tensor) -> Tensor:
        """The chosen codes.

        Args:
            rows: the weight, [groups, channels of a group, values of a patch].
            hessian: [groups, values of a patch, values of a patch].
            step: step sizes, of the shape of `rows`.
            least, most: limits of the codes, of the same shape.

        Returns:
            Codes of the same shape, float32.
        """
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        order = torch.arange(rows.shape[2], device=rows.device).expand(len(rows), -1)
        if self.order == "descending":
            order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
        columns = order[:, None].expand_as(rows)
        step, least, most = (t.double().gather(2, columns) for t in (step, least, most))
        left = rows.double().gather(2, columns)
        codes = torch.zeros_like(left)
        inverse = self._inverse_root(hessian.double(), order)
        width = rows.shape[2]
        for start in range(0, width, self.block_size):
            stop = min(start + self.block_size, width)
            errors = torch.zeros_like(left[..., start:stop])
            for j in range(start, stop):
                column = left[..., j]
                codes[..., j] = torch.round(column / step[..., j]).maximum(least[..., j]).minimum(most[..., j])
                errors[..., j - start] = (column - codes[..., j] * step[..., j]) / inverse[:, j, j, None]
                left[..., j:stop] -= errors[..., j - start, None] * inverse[:, None, j, j:stop]
            left[..., stop:] -= errors @ inverse[:, start:stop, stop:]
        return torch.empty_like(codes).scatter_(2, columns, codes).float()

    def _is_chosen(self, visit: LayerVisit, most: int) -> bool:
        """Whether a layer adds up at most so many products, and there are enough positions to choose its codes by."""
        matrix = LayerMatrix(visit.layer, visit.weight)
        width = matrix.rows(visit.weight).shape[2]
        count = sum(matrix.positions(x) for x in visit.inputs)
        return width <= most and min(count, self.positions) >= _LEAST_POSITIONS * width

    def _inverse_root(self, hessian: Tensor, order: Tensor) -> Tensor:
        """The upper Cholesky factor of the inverse of the damped Hessian, its columns in the given order."""
        hessian = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None].expand_as(hessian))
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        dead = diagonal < _NOTHING
        diagonal += self.damping * diagonal.mean(1, keepdim=True)
        # Rows and columns of dead values are zero but for this: nothing moves to or from them.
        diagonal.masked_fill_(dead, 1.0)
        lower = torch.linalg.cholesky(hessian)
        return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
