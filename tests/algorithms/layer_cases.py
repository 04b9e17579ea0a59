"""One layer of every kind, quantized, and what algorithms that choose its codes are measured by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

import qdq
from qdq import QuantDescriptor, Recipe
from qdq.algorithms.algorithm import Algorithm
from qdq.algorithms.walk import LayerVisit, TensorVisit, Walk
from qdq.constant_quantizers import WeightQuantizer

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 6), (64, 24)),
    "linear, more dimensions": (lambda: nn.Linear(24, 6, bias=False), (4, 5, 6, 24)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (8, 4, 21)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0)), (4, 4, 9, 8)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=2), (4, 4, 11, 9)),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid", stride=2, bias=False), (4, 4, 11, 9)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (4, 6, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (4, 6, 8, 8)),
    "depthwise, two each": (lambda: nn.Conv2d(4, 8, 3, stride=(2, 1), groups=4), (4, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 3), padding=(0, 1, 1)), (4, 2, 5, 6, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (8, 4, 9)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(2, 1)),
        (4, 4, 5, 5),
    ),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 4, 6, 6)),
}


class Measured:
    """An algorithm, and the squared error per sample set of each layer's output before and after it.

    Attributes:
        before, after: by the layer's weight: error of each output channel.
        weights: what the layers compute with, as stored.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}

    def visit_tensor(self, visit: TensorVisit) -> None:
        self.algorithm.visit_tensor(visit)

    def visit_layer(self, visit: LayerVisit) -> None:
        self.before[visit.layer.name] = channel_errors(visit)
        self.algorithm.visit_layer(visit)
        self.after[visit.layer.name] = channel_errors(visit)


def channel_errors(visit: LayerVisit) -> Tensor:
    """The squared error of each channel of the layer's output over all samples, float64."""
    total: Tensor | float = 0.0
    visit.forget_outputs()  # step sizes may have changed
    for wanted, given in zip(visit.float_outputs, visit.outputs, strict=True):
        total = total + (wanted - given).double().movedim(visit.layer.output_axis, 0).flatten(1).square().sum(1)
    assert isinstance(total, Tensor)
    return total


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(*shape: int, seed: int = 0) -> Tensor:
    """Inputs with what makes rounding to nearest a poor choice: the channels of a position are alike, and of a channel
    the positions, as in the inputs of real layers. (Of white noise no error of one weight makes up for another's.)"""
    x = randn(*shape, seed=seed)
    if len(shape) == 2 or shape[-1] == 24:
        return x + 2 * x.mean(-1, keepdim=True) * shape[-1] ** 0.5
    positions = list(range(2, len(shape)))
    return (
        x + 2 * x.mean(1, keepdim=True) * shape[1] ** 0.5 + 2 * x.mean(positions, keepdim=True) * x[0, 0].numel() ** 0.5
    )


def layer_model(name: str, scale: float = 1.0) -> tuple[nn.Module, list[Tensor]]:
    """A model with one layer, and two batches."""
    make, shape = LAYERS[name]
    layer = make()
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(scale * randn(*parameter.shape, seed=7 + index))
    return nn.Sequential(layer).eval(), [correlated(*shape, seed=s) for s in (0, 1)]


def quantized(
    model: nn.Module, batches: Sequence[Tensor], bits: int = 4, axis: int | None = 0, **options: object
) -> fx.GraphModule:
    """Weights of so many bits over their whole range, no algorithm applied."""
    options.setdefault("weight_calibration", "max")
    weights = QuantDescriptor(num_bits=bits, axis=axis, narrow_range=True, **options.pop("weights", {}))  # type: ignore[arg-type]
    recipe = Recipe(weights=weights, algorithms=[], calibration="max", **options)  # type: ignore[arg-type]
    return qdq.quantize(model, list(batches), recipe=recipe, progress=False)


def measured(qmodel: fx.GraphModule, batches: Sequence[Tensor], algorithm: Algorithm) -> Measured:
    """Walks, and checks that some layer was visited."""
    visitor = Measured(algorithm)
    Walk(qmodel, [[x] for x in batches]).run([visitor], progress=False)
    assert visitor.before
    return visitor


def weight_and_quantizer(qmodel: fx.GraphModule, name: str = "0") -> tuple[Tensor, WeightQuantizer]:
    """The parameter of a layer, and its quantizer."""
    quantizer = qmodel.get_submodule(f"{name}.weight_quantizer")
    assert isinstance(quantizer, WeightQuantizer)
    return qmodel.get_parameter(f"{name}.weight").detach(), quantizer


def assert_on_grid(qmodel: fx.GraphModule, name: str = "0") -> None:
    """The weight is codes times step sizes, and quantizing it again gives the very codes and the very values."""
    weight, quantizer = weight_and_quantizer(qmodel, name)
    step = quantizer.step_for(weight)
    codes = quantizer.codes(weight)
    assert int(codes.abs().max()) <= quantizer.bound
    torch.testing.assert_close(codes * step, weight, rtol=0, atol=0)
    torch.testing.assert_close(quantizer(weight), weight, rtol=0, atol=0)
