"""What lets runtimes compute a module-quantized model in integers: quantized outputs, int32 biases, safe weights.

Quantized modules quantize their inputs; runtimes fuse a layer whose *output* is quantized. Rounding and clipping to
codes are monotone, so quantizing commutes with clipping (ReLU) and with moving values (max pool, reshape): the
quantizer of the next layer's input can stand right behind the layer, exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from typing import Any

import torch
from torch import fx

from ..affine_quantizer import AffineQuantizer
from ..constant_quantizers import BIAS_CODE_LIMIT
from ..errors import ExportError
from ..graph.fold import evaluate
from ..graph.ops import (
    WEIGHTED,
    Kind,
    clip_bounds,
    data_inputs,
    is_constant,
    is_depthwise,
    is_split,
    kind_of,
    operation_name,
    rank_of,
)
from ..graph.targets import Target
from ..saturation import pair_safe_factor, shrink_pairs
from .coded_constants import CodedConstant, requantized
from .constants import ConstantDequantizer
from .lowering import add_module
from .module_graph import clips_codes

logger = logging.getLogger("qdq.export")
aten = torch.ops.aten

_POSITIVE = {aten.sigmoid.default, aten.hardsigmoid.default, aten.softmax.int, aten.abs.default, aten.exp.default}
_PADS = (aten.constant_pad_nd.default, aten.pad.default)


def quantize_outputs(graph_module: fx.GraphModule, coded: dict[fx.Node, Any], target: Target) -> None:
    """Moves quantizers up through clips and moves to the operation that computes their tensor, where it is allowed.

    A clip on the way becomes a limit of the codes. A signed quantizer of a tensor that is never negative (behind a
    ReLU) gets zero point 0: the values are the same, and codes of at most 127 cannot saturate in pairs.
    """
    if not clips_codes(target):
        return
    modules = dict(graph_module.named_modules())
    for call in list(graph_module.graph.nodes):
        quantizer = modules.get(str(call.target)) if call.op == "call_module" else None
        if isinstance(quantizer, AffineQuantizer):
            chain = _chain(call)
            for node in reversed(chain):
                _limit(quantizer, node)
            if _never_negative(graph_module, call.args[0], {}):
                quantizer.lo = max(quantizer.lo, int(quantizer.zero_point))
            if quantizer.lo >= int(quantizer.zero_point) > 0:
                shift = int(quantizer.zero_point)
                quantizer.lo, quantizer.hi = quantizer.lo - shift, quantizer.hi - shift
                quantizer.zero_point.fill_(0)
            if chain and _may_move(graph_module, chain, coded, target):
                _move_up(graph_module, call, chain)
    graph_module.graph.eliminate_dead_code()


def _chain(call: fx.Node) -> list[fx.Node]:
    """The clips and moves between a quantizer and the operation that computes its tensor, the nearest first."""
    chain: list[fx.Node] = []
    node = call.args[0]
    while isinstance(node, fx.Node) and kind_of(node) in (Kind.CLIP, Kind.MOVE):
        sources = data_inputs(node)
        if len(sources) != 1 or is_split(sources[0]) or is_split(node):
            break
        # A bound or an index may be computed; a clip with a tensor for a bound is not read here.
        if kind_of(node) is Kind.CLIP and not _bounds(node):
            break
        chain.append(node)
        node = sources[0]
    return chain


def _bounds(node: fx.Node) -> tuple[float, float] | None:
    low, high = clip_bounds(node)
    return (low, high) if low > -math.inf or high < math.inf else None


def _limit(quantizer: AffineQuantizer, node: fx.Node) -> None:
    """Narrows the codes to those that a clip lets through."""
    bounds = _bounds(node) if kind_of(node) is Kind.CLIP else None
    if bounds is not None:
        low, high = (_code(quantizer, bound) for bound in bounds)
        quantizer.lo, quantizer.hi = low, high
    elif node.target in _PADS:
        zero = int(quantizer.zero_point)
        quantizer.lo, quantizer.hi = min(quantizer.lo, zero), max(quantizer.hi, zero)


def _code(quantizer: AffineQuantizer, value: float) -> int:
    if math.isinf(value):
        return quantizer.lo if value < 0 else quantizer.hi
    code = round(float(torch.tensor(value) / quantizer.step_size)) + int(quantizer.zero_point)
    return min(max(code, quantizer.lo), quantizer.hi)


def _never_negative(graph_module: fx.GraphModule, node: Any, known: dict[Any, bool]) -> bool:
    """Whether a tensor's operations show that its values are 0 or more; `known` takes what was found."""
    if node not in known:
        known[node] = _is_never_negative(graph_module, node, known)
    return known[node]


def _is_never_negative(graph_module: fx.GraphModule, node: Any, known: dict[Any, bool]) -> bool:
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_module"):
        return False
    quantizer = _quantizer_of(graph_module, node)
    if quantizer is not None:
        return quantizer.lo >= int(quantizer.zero_point) or _never_negative(graph_module, node.args[0], known)
    kind = kind_of(node)
    if kind is Kind.CLIP and clip_bounds(node)[0] >= 0:
        return True
    if node.target in _POSITIVE:
        return True
    if kind not in (Kind.CLIP, Kind.MOVE, Kind.AVERAGE_POOL, Kind.GLOBAL_AVERAGE, Kind.ADD, Kind.CONCAT, Kind.MUL):
        return False
    if kind is Kind.CLIP and clip_bounds(node)[1] < 0:
        return False
    sources = data_inputs(node)
    return bool(sources) and all(_never_negative(graph_module, source, known) for source in sources)


def _may_move(graph_module: fx.GraphModule, chain: list[fx.Node], coded: dict[fx.Node, Any], target: Target) -> bool:
    producer = data_inputs(chain[-1])[0]
    if any(len(node.users) != 1 for node in [*chain, producer]) or target.rule(kind_of(producer)) is None:
        return False
    if kind_of(producer) is Kind.TRANSPOSED_CONVOLUTION:
        return False
    if kind_of(producer) in WEIGHTED and producer.args[1] not in coded:
        return False
    padded = any(node.target in _PADS for node in chain)
    if padded and any((b := _bounds(n)) and not b[0] <= 0 <= b[1] for n in chain if kind_of(n) is Kind.CLIP):
        return False  # the zeros of the padding would be clipped as well
    return all(_quantizer_of(graph_module, source) is not None for source in data_inputs(producer))


def _quantizer_of(graph_module: fx.GraphModule, node: Any) -> AffineQuantizer | None:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = graph_module.get_submodule(str(node.target))
    return module if isinstance(module, AffineQuantizer) else None


def _move_up(graph_module: fx.GraphModule, call: fx.Node, chain: list[fx.Node]) -> None:
    """producer -> clips and moves -> quantizer becomes producer -> quantizer -> (move -> quantizer)..."""
    producer = data_inputs(chain[-1])[0]
    quantizer = str(call.target)

    def quantized(tensor: fx.Node, **kwargs: Any) -> fx.Node:
        with graph_module.graph.inserting_after(tensor):
            node = graph_module.graph.call_module(quantizer, (tensor,), kwargs)
        node.meta = {**tensor.meta, "qdq_constant": False}
        return node

    tensor = quantized(producer)
    chain[-1].replace_input_with(producer, tensor)
    for node in reversed(chain):
        if kind_of(node) is Kind.CLIP:
            node.replace_all_uses_with(tensor)
        else:
            tensor = quantized(node, on_grid=True)
            for user in [u for u in node.users if u is not tensor]:
                user.replace_input_with(node, tensor)
    call.replace_all_uses_with(tensor)
    graph_module.graph.erase_node(call)


@dataclasses.dataclass
class _Layer:
    """A convolution or linear with a coded weight, and the quantizer of its input."""

    node: fx.Node
    weight: CodedConstant
    source: AffineQuantizer


def store_constants(graph_module: fx.GraphModule, coded: dict[fx.Node, Any], target: Target, reduced: bool) -> None:
    """Puts the coded constants, and int32 biases of integer layers, into the graph, in place.

    Args:
        graph_module: with quantized outputs.
        coded: the `CodedConstant` of each node.
        target: says whether it takes int32 biases.
        reduced: change weights of which products with uint8 activations could saturate (see `qdq.saturation`).
    """
    if clips_codes(target):
        _keep_float_weights(graph_module, coded)
    weights: dict[tuple[fx.Node, fx.Node], CodedConstant] = {}
    safe: dict[int, CodedConstant] = {}  # by the weight before: the time steps of a recurrent layer share theirs
    names: set[str] = set()
    for node in list(graph_module.graph.nodes):
        layer = _integer_layer(graph_module, node, coded, target)
        if layer is None:
            continue
        if reduced and layer.source.hi > 127 and not is_depthwise(node):
            before = id(layer.weight)
            if before not in safe:
                safe[before] = _without_saturation(layer.weight)
            layer.weight = safe[before]
        if target.integer_bias:
            _store_bias(graph_module, layer, names)
        weights[node, node.args[1]] = layer.weight  # type: ignore[index]
    stored: dict[int, fx.Node] = {}
    for node, constant in coded.items():
        for reader in [u for u in node.users if u not in coded and isinstance(constant, CodedConstant)]:
            chosen = weights.get((reader, node), constant)
            _check_axis(reader, node, chosen)
            if id(chosen) not in stored:
                stored[id(chosen)] = _store(graph_module, chosen, node, names)
            reader.replace_input_with(node, stored[id(chosen)])
    graph_module.graph.eliminate_dead_code()


def _integer_layer(
    graph_module: fx.GraphModule, node: fx.Node, coded: dict[fx.Node, Any], target: Target
) -> _Layer | None:
    """The layer, where runtimes compute it in integers."""
    kind = kind_of(node)
    if kind not in WEIGHTED or kind is Kind.TRANSPOSED_CONVOLUTION:
        return None
    weight, source = coded.get(node.args[1]), _quantizer_of(graph_module, node.args[0])  # type: ignore[arg-type]
    if not isinstance(weight, CodedConstant) or source is None or weight.codes.dtype.is_floating_point:
        return None
    if weight.axis not in (None, 0) or weight.block_size is not None:
        return None
    rule = target.rule(kind)
    needs_output = rule is not None and rule.output
    if needs_output and not all(_quantizer_of(graph_module, u) is not None for u in node.users):
        return None
    return _Layer(node, weight, source)


def _without_saturation(weight: CodedConstant) -> CodedConstant:
    """The weight with larger step sizes and smaller codes, where two of its products could exceed 16 bits."""
    codes = weight.codes.to(torch.int16)
    if weight.codes.dtype == torch.uint8 or torch.equal(shrink_pairs(codes, 0), codes):
        return weight
    bound = 127
    amax = (weight.steps * bound).reshape(-1)
    factor = pair_safe_factor(weight.value, amax, bound)
    new = requantized(weight, weight.step_size * factor.reshape(weight.step_size.shape))
    safe = shrink_pairs(new.codes.to(torch.int16).clamp(min=-bound), 0).to(torch.int8)
    logger.warning(
        "%s: this processor adds products of 8 bits in 16, so some codes were made smaller, and the file differs from "
        'the model; Target.reduce_range=False keeps them, for processors with VNNI',
        weight.name,
    )  # fmt: skip
    return dataclasses.replace(new, codes=safe)


def _finer(weight: CodedConstant, largest: int) -> CodedConstant:
    """The same values with codes up to `largest`: a weight of few bits would give the bias too coarse a step.

    With codes up to 64, two products of 8 bits fit in 16 (`qdq.saturation`).
    """
    most = int(weight.codes.to(torch.int16).abs().max()) if weight.codes.numel() else 0
    factor = 2 ** int(math.log2(largest / most)) if 0 < most <= largest else 1
    if factor == 1:
        return weight
    return dataclasses.replace(weight, codes=weight.codes * factor, step_size=weight.step_size / factor)


def _store_bias(graph_module: fx.GraphModule, layer: _Layer, names: set[str]) -> None:
    """An int32 bias of step input step x weight step, the form in which runtimes add it to the sums."""
    node = layer.node
    bias = node.args[2] if len(node.args) > 2 else None
    if not isinstance(bias, fx.Node) or not is_constant(bias) or (kind_of(node) is Kind.LINEAR and rank_of(node) != 2):
        return
    layer.weight = _finer(layer.weight, 64 if layer.source.hi > 127 else 127)
    value = evaluate(graph_module, bias).double()
    input_step = layer.source.step_size.double()
    # A channel with tiny weights would need bias codes beyond int32: it gets a larger weight step.
    least = (value.abs() / (input_step * BIAS_CODE_LIMIT)).float()
    least = least.max().reshape(()) if layer.weight.axis is None else least
    shape = layer.weight.step_size.shape
    steps = torch.maximum(layer.weight.step_size, least.reshape(shape))
    if not torch.equal(steps, layer.weight.step_size):
        layer.weight = requantized(layer.weight, steps)
    step = (input_step * layer.weight.steps.double()).float()
    codes = torch.round(value / step.double()).to(torch.int32)
    name = layer.weight.name.rpartition(".")[0]
    name = _free(f"{name}.bias" if name else "bias", names)
    constant = ConstantDequantizer(name, codes, step, 0 if step.dim() else None)
    with graph_module.graph.inserting_before(node):
        call = graph_module.graph.call_module(add_module(graph_module, constant), ())
    call.meta = {**bias.meta, "qdq_constant": True}
    node.update_arg(2, call)


def _check_axis(reader: fx.Node, node: fx.Node, weight: CodedConstant) -> None:
    """Raises:
    ExportError: a layer's weight has its step sizes along another axis than the outputs, where runtimes fail or
        compute something else; or blocks, and no linear reads it.
    """
    kind, axis = kind_of(reader), weight.axis
    if weight.block_size is not None and not (kind is Kind.LINEAR and reader.args[1] is node):
        raise ExportError(
            f"the quantizer {weight.origin!r} has block_size={weight.block_size}, and what it quantizes is read by "
            f"{operation_name(reader)}: files have blocks in weights of linears alone; set block_size=None"
        )
    if axis is None or len(reader.args) < 2 or reader.args[1] is not node:
        return
    outputs = {Kind.CONVOLUTION: 0, Kind.LINEAR: 0, Kind.MATMUL: rank_of(node) - 1}.get(kind, axis)
    if axis != outputs:
        raise ExportError(
            f"the quantizer {weight.origin!r} has one amax per channel along axis {axis} of the weight of a "
            f"{kind.value}, and runtimes take the axis of its outputs: set axis={outputs}, or None"
        )


def _keep_float_weights(graph_module: fx.GraphModule, coded: dict[fx.Node, Any]) -> None:
    """ONNX Runtime quantizes a float weight by itself, unseen, where input and output of its layer are quantized.

    A clip that clips nothing, in front of the layer, stops it.
    """
    for node in list(graph_module.graph.nodes):
        if kind_of(node) not in WEIGHTED or isinstance(coded.get(node.args[1]), CodedConstant):  # type: ignore[arg-type]
            continue
        if not any(_quantizer_of(graph_module, user) is not None for user in node.users):
            continue
        limit = torch.finfo(torch.float32).max
        with graph_module.graph.inserting_before(node):
            clip = graph_module.graph.call_function(aten.clamp.default, (node.args[0], -limit, limit))
        clip.meta = dict(node.args[0].meta)  # type: ignore[union-attr]
        node.update_arg(0, clip)


def _free(name: str, names: set[str]) -> str:
    """A name that no constant has yet: lowering takes constants of one name for one."""
    candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    free = next(candidate for candidate in candidates if candidate not in names)
    names.add(free)
    return free


def _store(graph_module: fx.GraphModule, constant: CodedConstant, node: fx.Node, names: set[str]) -> fx.Node:
    dequantizer = ConstantDequantizer(
        _free(constant.name, names),
        constant.codes,
        constant.steps,
        constant.axis,
        constant.block_size,
        constant.stored_bits,
    )
    with graph_module.graph.inserting_before(node):
        call = graph_module.graph.call_module(add_module(graph_module, dequantizer), ())
    call.meta = {**node.meta, "qdq_constant": True}
    return call
