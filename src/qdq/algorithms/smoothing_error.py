"""The error that factors per channel leave in what linears compute, with input and weight quantized."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx
from torch.nn import functional as F

from ..affine_quantizer import AffineQuantizer
from .channel_scaling import weight_method
from .input_values import InputValues
from .layer import Layer


@dataclass(frozen=True)
class Reading:
    """One linear that reads a tensor.

    Attributes:
        graph_module: quantized.
        source: what the linear reads; the call of a quantizer where its input is quantized.
        layer: the linear.
        weight: float64, before it is multiplied.
        values: of the tensor, before they are divided.
        factors: [input channels], what the values are divided by and the weight is multiplied by.
        trial: whether factors and range are to be tried on vectors that they were not made from.
    """

    graph_module: fx.GraphModule
    source: fx.Node
    layer: Layer
    weight: Tensor
    values: InputValues
    factors: Tensor
    trial: bool = False

    def error(self) -> float:
        """Squared error of the results over their squares."""
        rows = self.values.rows
        factors = self.factors.to(rows.device)
        expected = F.linear(rows, self.weight.to(rows.dtype))
        weight = (self.weight * factors).to(rows.dtype)
        quantizer = copy.deepcopy(self.layer.quantizer)
        quantizer.fit(weight, weight_method(self.graph_module))
        quantizer.enabled = True
        got = F.linear(self._quantized(rows / factors.to(rows.dtype)), quantizer(weight))
        total = float(expected.double().square().sum())
        return float((got - expected).double().square().sum()) / total if total else 0.0

    def _quantized(self, rows: Tensor) -> Tensor:
        module = self.graph_module.get_submodule(str(self.source.target)) if self.source.op == "call_module" else None
        if not isinstance(module, AffineQuantizer):
            return rows
        module = copy.deepcopy(module)
        low, high = self.values.others if self.trial else (self.values.low, self.values.high)
        factors = self.factors.to(low.device)
        module.set_range(float((low / factors).min()), float((high / factors).max()))
        return module(rows)


def output_error(readings: Sequence[Reading]) -> float:
    """The sum over linears."""
    return sum(reading.error() for reading in readings)
