"""Fine-tuning: the quantized model is trained for a short while to give what the float model gives."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..affine_quantizer import AffineQuantizer
from ..constant_quantizers import BiasQuantizer, WeightQuantizer
from ..modes import out_of_inference
from ..passing import passing
from ..progress import track
from .algorithm import Algorithm
from .float_values import observe_float_values
from .layer import Layer, layers_of
from .option_checks import check_integer, check_real
from .walk import Walk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FineTuning(Algorithm):
    """Trains weights and biases of all layers together, by distillation from the float model; labels are not needed.

    The loss is the squared error of the float outputs over their energy (Hinton, Vinyals, Dean, "Distilling the
    Knowledge in a Neural Network", 2015, section 2.1: in the limit the squared error of the logits), the optimizer Adam
    on straight-through gradients, with a learning rate that falls to zero along a cosine. Step sizes and ranges stay.

    Variables are in units in which layers are alike: a weight in its step size, so that `learning_rate` is about the
    share of a code by which one step moves it; a bias in the step size of its channel's weights times the root mean
    square of what the layer reads.

    All samples kept by the calibration but every fourth batch are trained on. Those, or with fewer than four batches
    all, say whether the trained model is better; the weights stay as they were where it is not.

    Attributes:
        steps: of Adam, each on one batch of samples.
        learning_rate: of Adam at the outset.
        seed: of the order of the batches.
    """

    name: ClassVar[str] = "fine_tuning"
    citation: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"

    steps: int = 200
    learning_rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, least=1)
        check_integer("seed", self.seed, least=0)
        check_real("learning_rate", self.learning_rate, above=0.0)

    def finish(self, walk: Walk, progress: bool = True) -> None:
        """Replaces the weights and biases by the trained ones."""
        layers = list(layers_of(walk.graph_module).items())
        if layers:
            # In inference mode nothing can be trained.
            with torch.inference_mode(False), torch.no_grad():
                self._train(walk, layers, progress)

    def _train(self, walk: Walk, layers: Sequence[tuple[fx.Node, Layer]], progress: bool) -> None:
        wanted = [_float_outputs(walk, batch) for batch in walk.batches]
        if not all(wanted):
            logger.warning("fine_tuning leaves the weights as they are: the model gives no float tensor")
            return
        held_out = [i for i in range(len(walk.batches)) if i % 4 == 3] or list(range(len(walk.batches)))
        trained_on = [i for i in range(len(walk.batches)) if i not in held_out] or held_out
        variables = _variables(walk, layers, progress)
        before = _loss(walk, wanted, held_out)
        old = {path: walk.parameter(path) for path, _, _ in variables}
        order = _order(len(trained_on), self.steps, self.seed)
        with torch.enable_grad():
            values = [torch.zeros_like(start, requires_grad=True) for _, start, _ in variables]
            adam = torch.optim.Adam(values, self.learning_rate)
            for step, position in enumerate(track(order, "fine-tuning", self.steps, progress)):
                adam.param_groups[0]["lr"] = self.learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2
                parameters = {
                    path: start + unit * value for (path, start, unit), value in zip(variables, values, strict=True)
                }
                index = trained_on[position]
                loss = _relative_error(_outputs(walk, walk.batches[index], parameters), wanted[index])
                if not loss.requires_grad:
                    logger.warning("fine_tuning leaves the weights as they are: no float output depends on them")
                    return
                adam.zero_grad()
                loss.backward()
                adam.step()
        for (path, start, unit), value in zip(variables, values, strict=True):
            walk.replace(path, start + unit * value.detach())
        # Not "greater": an error that is no number must not stay either.
        if not _loss(walk, wanted, held_out) < before:
            for path, value in old.items():
                walk.replace(path, value)


def _variables(walk: Walk, layers: Sequence[tuple[fx.Node, Layer]], progress: bool) -> list[tuple[str, Tensor, Tensor]]:
    """Path, value and unit of all that is trained."""
    sums = {node: [0.0, 0] for node, _ in layers}
    observers = [(node.args[0], _adds_squares(sums[node])) for node, _ in layers if isinstance(node.args[0], fx.Node)]
    observe_float_values(walk.graph_module, walk.batches, observers, progress=progress)
    found: dict[str, tuple[str, Tensor, Tensor]] = {}
    for node, layer in layers:
        weight = walk.parameter(layer.weight).clone()
        found[layer.weight] = layer.weight, weight, layer.quantizer.step_for(weight).expand_as(weight).clone()
        if layer.bias is not None:
            bias, step = walk.parameter(layer.bias).clone(), layer.quantizer.step_size
            steps = step.flatten(1).mean(1) if step.dim() > 1 else step
            if steps.numel() != bias.numel():  # one for all, or one for the same channel of all groups
                steps = steps.mean().expand_as(bias)
            total, count = sums[node]
            found[layer.bias] = layer.bias, bias, steps * math.sqrt(total / max(count, 1))
    return list(found.values())


def _adds_squares(total: list[Any]) -> Callable[[Any], None]:
    def add(x: Tensor) -> None:
        total[0] += float(x.double().square().sum())
        total[1] += x.numel()

    return add


def _order(count: int, steps: int, seed: int) -> list[int]:
    """All of `count` in a drawn order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(count, generator=generator) for _ in range(-(-steps // count))]
    return torch.cat(epochs)[:steps].tolist()


class _Flat(nn.Module):
    """A graph that takes the values of its placeholders, however the model nests them."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module

    def forward(self, *values: Any) -> Any:
        return fx.Interpreter(self.graph_module).run(*values)


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _outputs(walk: Walk, batch: Sequence[Any], parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """The float outputs, computed with other parameters."""
    module = _Flat(walk.graph_module)
    # A tensor that was made in inference mode takes part in no gradient; its copy does.
    others = {path: x.clone() for path, x in _state(module) if x.is_inference()}
    others |= {f"graph_module.{path}": value for path, value in parameters.items()}
    outputs = functional_call(module, others, tuple(out_of_inference(batch)))
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


def _relative_error(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The mean over the outputs of the squared error over the energy of what is wanted."""
    tiny = torch.finfo(torch.float32).tiny
    pairs = zip(outputs, wanted, strict=True)
    return torch.stack([(x - y).square().sum() / y.square().sum().clamp(min=tiny) for x, y in pairs]).mean()


def _loss(walk: Walk, wanted: Sequence[Sequence[Tensor]], batches: Sequence[int]) -> float:
    with torch.no_grad():
        losses = [_relative_error(_outputs(walk, walk.batches[i], {}), wanted[i]) for i in batches]
    return float(torch.stack(losses).mean())


def _float_outputs(walk: Walk, batch: Sequence[Any]) -> list[Tensor]:
    """The float model's outputs."""
    originals = {path: walk.original(path) for path in walk.replaced}
    with torch.no_grad(), passing(walk.graph_module, (AffineQuantizer, WeightQuantizer, BiasQuantizer)):
        return _outputs(walk, batch, originals)
