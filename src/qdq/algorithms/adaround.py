"""AdaRound: whether each weight is rounded up or down is learned from what it does to the layer's output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..errors import RecipeError
from ..recipe import matches
from .algorithm import Algorithm
from .local_search import local_search
from .option_checks import check_integer, check_patterns, check_real
from .output_error import OutputError
from .rectified_sigmoid import HIGH, LOW, exponent_at, variable_of
from .rounding import keep_better, limit_rows, step_rows
from .walk import LayerVisit


@dataclass(frozen=True)
class AdaRound(Algorithm):
    """Chooses the codes of every layer next above or next below the weight, whichever serves its output.

    Nagel, Amjad, van Baalen, Louizos, Blankevoort, "Up or Down? Adaptive Rounding for Post-Training Quantization"
    (ICML 2020): the share of the way up, a rectified sigmoid of a free variable, is fitted with Adam to the float
    model's output given the quantized model's input (asymmetric reconstruction, without the activation function), and
    a regulariser drives it to 0 or 1.

    The error is quadratic in the weight, so each step takes its exact gradient over all positions from sums made once,
    where the paper draws batches. Both terms are divided by their size at the outset, which makes one weight of the
    regulariser suit all layers: the error of an output channel by that of rounding to nearest, the regulariser by the
    count of values. A local search then turns the choices that Adam has left worse than they could be, which saves most
    of its steps (not where a patch has more values than there are positions). An output channel that would end with a
    larger error than it has keeps its codes.

    Attributes:
        steps: of Adam.
        learning_rate: of Adam.
        regularisation: weight of the regulariser.
        warmup: share of the steps without the regulariser, from 0 to less than 1.
        positions: so many positions of a layer's output are looked at, drawn where there are more.
        seed: of the draw.
        layers: patterns of modules or parameters, as in recipes: whose weights alone are chosen so; None for all.
    """

    name: ClassVar[str] = "adaround"
    citation: ClassVar[str] = "Nagel et al. 2020, arXiv:2004.10568"

    steps: int = 200
    learning_rate: float = 0.1
    regularisation: float = 10.0
    warmup: float = 0.2
    positions: int = 16384
    seed: int = 0
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, least=1)
        check_integer("positions", self.positions, least=1)
        check_integer("seed", self.seed, least=0)
        check_real("learning_rate", self.learning_rate, above=0.0)
        check_real("regularisation", self.regularisation, above=0.0)
        check_real("warmup", self.warmup, least=0.0, below=1.0)
        check_patterns("layers", self.layers)

    def check(self, graph: fx.Graph) -> None:
        """Raises:
        RecipeError: a pattern of `layers` names no layer.
        """
        # Those of layers that stay in float, too: the same recipe may exclude what it named before.
        names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
        for pattern in self.layers or ():
            if not any(matches(pattern, name) for name in names):
                raise RecipeError(f"algorithms['adaround']: the pattern {pattern!r} of layers names no layer")

    def visit_layer(self, visit: LayerVisit) -> None:
        """Sets the layer's weight to the chosen codes times the step sizes, which stay."""
        if self.layers is not None and not any(matches(pattern, visit.layer.name) for pattern in self.layers):
            return
        error = OutputError(visit, self.positions, self.seed)
        if error.constant.numel() and error.count:
            least, most = limit_rows(visit, error)
            keep_better(visit, error, self.codes(error, step_rows(visit, error), least, most))

    def codes(self, error: OutputError, step: Tensor, least: Tensor, most: Tensor) -> Tensor:
        """The chosen codes.

        Args:
            error: of the layer's output.
            step: step sizes, of the shape of `error.rows`.
            least, most: limits of the codes, of the same shape.

        Returns:
            Codes of the same shape, float32.
        """
        scaled = error.rows / step
        below = scaled.floor().maximum(least).minimum(most)
        above = (scaled.floor() + 1).maximum(least).minimum(most)
        free = above - below
        nearest = torch.round(scaled).maximum(least).minimum(most) * step - error.rows
        size = (error.curvature(nearest) * nearest).sum(2, keepdim=True)
        size = size.clamp(min=torch.finfo(size.dtype).tiny * 1e6)
        share = (scaled - below).clamp(0.01, 0.99)
        variable = variable_of(share)
        adam = torch.optim.Adam([variable], self.learning_rate)
        first = math.ceil(self.warmup * self.steps)
        for index in range(self.steps):
            sigmoid = torch.sigmoid(variable)
            share = sigmoid * (HIGH - LOW) + LOW
            inside = (share > 0) & (share < 1)
            change = (below + share.clamp(0, 1) * free) * step - error.rows
            slope = 2 * (error.curvature(change) - error.correlation) / size * step * free
            if index >= first:
                passed = (index - first) / (self.steps - first)
                exponent = exponent_at(passed)
                # The derivative of 1 - |2 share - 1| ** exponent.
                off = 2 * share - 1
                pull = -2 * exponent * off.sign() * off.abs().pow(exponent - 1)
                slope += self.regularisation / error.width * pull
            variable.grad = slope * inside * sigmoid * (1 - sigmoid) * (HIGH - LOW)
            adam.step()
        codes, other = torch.where(variable >= 0, above, below), torch.where(variable >= 0, below, above)
        return local_search(error, codes, other, step) if error.keeps_hessian else codes
