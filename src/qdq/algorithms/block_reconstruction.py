"""Block reconstruction: the rounding of all weights of a block is learned together, from the block's output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..modes import out_of_inference
from ..progress import track
from .adaround import AdaRound
from .algorithm import Algorithm
from .bias_correction import BiasCorrection
from .block_run import run_in_float, run_quantized
from .blocks import Block, blocks_of, inputs_of
from .layer import Layer, layers_of
from .option_checks import check_integer, check_real
from .rectified_sigmoid import rectified_sigmoid, rounding_penalty, variable_of
from .rounding import code_limits
from .walk import LayerVisit, Walk

# Of a choice that is made already the share starts here, on its side: sure enough to matter, free enough to change.
_START = 0.8


@dataclass(frozen=True)
class BlockReconstruction(Algorithm):
    """Chooses the codes of all layers of a block, next above or next below the weight, that serve the block's output.

    Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu, "BRECQ: Pushing the Limit of Post-Training Quantization by Block
    Reconstruction" (ICLR 2021), with the plain squared error of the block's output (not weighted by second
    derivatives): the variables of AdaRound for all weights of the block are fitted with Adam through the block, on one
    batch of the kept samples after the other, to what the float model's block gives. Activation quantizers are part of
    the block, with straight-through gradients; their ranges stay. The blocks (see `blocks_of`) are settled one after
    the other: each reads what the quantized model has made of its input.

    It starts from `AdaRound` of the block's layers, one after the other; a block with a single layer is left at that.
    A block whose output would end with a larger error on the samples keeps the codes that it started from. So does one
    whose output is no float tensor, or depends on its weights through no gradient (a comparison).

    All this comes after the walk, in place of what algorithms that choose codes have done there; step sizes stay. A
    bias that was corrected in the walk is corrected anew, as the inputs of its layer have changed.

    Attributes:
        steps: of Adam, for each block.
        learning_rate: of Adam.
        regularisation: weight of the regulariser that drives each choice to one of two, where the error of the block
            at the outset has weight 1.
        warmup: share of the steps without the regulariser, from 0 to less than 1.
        seed: of the order of the batches.
    """

    name: ClassVar[str] = "block_reconstruction"
    citation: ClassVar[str] = "Li et al. 2021, arXiv:2102.05426"

    steps: int = 300
    learning_rate: float = 0.1
    regularisation: float = 300.0
    warmup: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, least=1)
        check_integer("seed", self.seed, least=0)
        check_real("learning_rate", self.learning_rate, above=0.0)
        check_real("regularisation", self.regularisation, above=0.0)
        check_real("warmup", self.warmup, least=0.0, below=1.0)

    def finish(self, walk: Walk, progress: bool = True) -> None:
        """Sets the weights of all layers to the chosen codes times the step sizes."""
        # In inference mode nothing can be learned.
        with torch.inference_mode(False), torch.no_grad():
            first, blocks = blocks_of(walk.graph_module, layers_of(walk.graph_module))
            states = _start(walk, first)
            for index, block in enumerate(track(blocks, "reconstructing blocks", len(blocks), progress)):
                for state in states:
                    run_in_float(walk, block.nodes, state.in_float)
                self._settle(walk, block, states)
                later = [n for b in blocks[index + 1 :] for n in b.nodes]
                for state in states:
                    run_quantized(walk, block.nodes, state.quantized)
                    state.keep(inputs_of(later, list(state.quantized)))

    def _settle(self, walk: Walk, block: Block, states: Sequence[_State]) -> None:
        _round_layers(walk, block, states)
        layers = [layer for layer in block.layers.values() if walk.parameter(layer.weight).numel()]
        output = states[0].in_float[block.output]
        if len(layers) < 2 or not isinstance(output, Tensor) or not output.is_floating_point():
            return
        rounded = {layer.weight: walk.parameter(layer.weight) for layer in layers}
        before = _error(walk, block, states)
        self._learn(walk, block, layers, states, before)
        # Not "greater": an error that is no number must not stay either.
        if not _error(walk, block, states) < before:
            for path, weight in rounded.items():
                walk.replace(path, weight)

    def _learn(
        self, walk: Walk, block: Block, layers: Sequence[Layer], states: Sequence[_State], before: float
    ) -> None:
        roundings = [_Rounding(walk, layer) for layer in layers]
        count = sum(int((r.above > r.below).sum()) for r in roundings)
        size = max(before / len(states), torch.finfo(torch.float32).tiny)
        first = math.ceil(self.warmup * self.steps)
        with torch.enable_grad():
            variables = [r.start.clone().requires_grad_() for r in roundings]
            adam = torch.optim.Adam(variables, self.learning_rate)
            for step, position in enumerate(_order(len(states), self.steps, self.seed)):
                weights = {r.path: r.soft(v) for r, v in zip(roundings, variables, strict=True)}
                loss = _loss(walk, block, states[position], weights) / size
                if not loss.requires_grad:  # the output is compared or counted: no weight moves it
                    return
                if step >= first:
                    passed = (step - first) / (self.steps - first)
                    penalty = torch.stack([rounding_penalty(v, passed).sum() for v in variables]).sum()
                    loss = loss + self.regularisation * penalty / max(count, 1)
                adam.zero_grad()
                loss.backward()
                adam.step()
        for rounding, variable in zip(roundings, variables, strict=True):
            walk.replace(rounding.path, rounding.hard(variable.detach()))


@dataclass
class _State:
    """The values of one batch that are still to be read, in the quantized and in the float model."""

    quantized: dict[fx.Node, Any]
    in_float: dict[fx.Node, Any]

    def keep(self, nodes: Sequence[fx.Node]) -> None:
        for values in (self.quantized, self.in_float):
            for node in set(values) - set(nodes):
                del values[node]


class _Rounding:
    """The two codes that each value of a layer's weight may take, and the variables to start from."""

    def __init__(self, walk: Walk, layer: Layer) -> None:
        weight, quantizer, self.path = walk.original(layer.weight).float(), layer.quantizer, layer.weight
        self.step = quantizer.step_for(weight)
        least, most = code_limits(weight, quantizer)
        scaled = weight / self.step
        self.below = scaled.floor().maximum(least).minimum(most)
        self.above = (scaled.floor() + 1).maximum(least).minimum(most)
        share = (scaled - self.below).clamp(0.01, 0.99)
        present = quantizer.codes(walk.parameter(layer.weight)).float()
        up = present >= self.above
        self.start = variable_of(torch.where(up, share.clamp(min=_START), share.clamp(max=1 - _START)))

    def soft(self, variable: Tensor) -> Tensor:
        return (self.below + rectified_sigmoid(variable) * (self.above - self.below)) * self.step

    def hard(self, variable: Tensor) -> Tensor:
        return torch.where(variable >= 0, self.above, self.below) * self.step


def _start(walk: Walk, first: Sequence[fx.Node]) -> list[_State]:
    """The values of all batches where the first block begins."""
    placeholders = [n for n in first if n.op == "placeholder"]
    others = [n for n in first if n.op != "placeholder"]
    states = []
    for batch in walk.batches:
        given = dict(zip(placeholders, out_of_inference(batch), strict=True))
        state = _State(dict(given), dict(given))
        run_quantized(walk, others, state.quantized)
        run_in_float(walk, others, state.in_float)
        states.append(state)
    return states


def _round_layers(walk: Walk, block: Block, states: Sequence[_State]) -> None:
    """AdaRound of each layer of the block, and the correction of its bias if it was corrected before.

    What the walk settled counted on inputs that the blocks before this one have changed since.
    """
    values = [dict(state.quantized) for state in states]
    done = 0
    for node, layer in block.layers.items():
        at = block.nodes.index(node)
        for of_batch in values:
            run_quantized(walk, block.nodes[done:at], of_batch)
        done = at
        source = node.args[0]
        assert isinstance(source, fx.Node)
        inputs, in_float = [v[source] for v in values], [state.in_float[source] for state in states]
        visit = LayerVisit(walk, layer, node, inputs, in_float)
        walk.replace(layer.weight, walk.original(layer.weight))
        corrected = layer.bias is not None and not torch.equal(walk.parameter(layer.bias), walk.original(layer.bias))
        if layer.bias is not None and corrected:
            walk.replace(layer.bias, walk.original(layer.bias))
        AdaRound().visit_layer(visit)
        if corrected:
            BiasCorrection().visit_layer(visit)


def _order(count: int, steps: int, seed: int) -> list[int]:
    """All of `count` in a drawn order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(count, generator=generator) for _ in range(-(-steps // count))]
    return torch.cat(epochs)[:steps].tolist()


def _loss(walk: Walk, block: Block, state: _State, weights: dict[str, Tensor]) -> Tensor:
    """The squared error of the block's output on one batch, with other weights."""
    values: dict[fx.Node, Any] = dict(state.quantized)
    run_quantized(walk, block.nodes, values, weights)
    return (values[block.output] - state.in_float[block.output]).square().sum()


def _error(walk: Walk, block: Block, states: Sequence[_State]) -> float:
    """The squared error of the block's output with the weights as they are."""
    return sum(float(_loss(walk, block, state, {})) for state in states)
