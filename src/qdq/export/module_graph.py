"""Module-quantized models on the one way to ONNX: captured quantizers become those that `qdq.quantize` inserts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..affine_quantizer import AffineQuantizer
from ..errors import CalibrationError, ExportError
from ..formats import E4M3, IntFormat
from ..graph.fold import evaluate
from ..graph.names import free_name, has_path
from ..graph.ops import Kind, is_constant, is_float, module_path, operation_name, rank_of, value_of
from ..graph.targets import Target
from ..kernels.operations import FAKE_TENSOR_QUANT, SCALED_E4M3
from ..kernels.reference import TINY_AMAX
from ..onnx_nodes import quantize_dequantize
from ..quantizer import TensorQuantizer
from ..recipe_values import BLOCK_SIZES
from .coded_constants import CodedConstant, encode, moved
from .norm_folding import fold_norms

_QUANTIZE = (FAKE_TENSOR_QUANT, SCALED_E4M3)


class Float8Quantizer(nn.Module):
    """Q/DQ of an activation in E4M3, with one amax.

    Args:
        name: path in the graph.
        amax: 0-d.
    """

    amax: Tensor

    def __init__(self, name: str, amax: Tensor) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("amax", amax.float().reshape(()))

    def forward(self, x: Tensor) -> Tensor:
        """The tensor on the grid of E4M3."""
        if torch.onnx.is_in_onnx_export():
            step = self.amax.clamp(min=TINY_AMAX) / E4M3.max_value
            zero_point = torch.zeros((), dtype=torch.float8_e4m3fn)
            return quantize_dequantize(x, step, zero_point, name=self.name)
        return SCALED_E4M3(x, self.amax)


def has_quantizers(model: nn.Module) -> bool:
    """Whether a model holds a `TensorQuantizer`."""
    return any(isinstance(module, TensorQuantizer) for module in model.modules())


def is_quantized(graph_module: fx.GraphModule) -> bool:
    """Whether a captured graph holds quantizers: of modules, or of direct calls of `qdq.functional`."""
    return any(node.target in _QUANTIZE for node in graph_module.graph.nodes)


def check_stages(model: nn.Module) -> None:
    """Raises:
    CalibrationError: quantizers still collect calibration data; all such are named.
    """
    names = [
        name or "the model itself"
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module._if_calib and not module.disabled
    ]
    if names:
        raise CalibrationError(
            f"{len(names)} quantizers still collect calibration data; finish with load_calib_amax(), enable_quant() "
            f"and disable_calib(): {', '.join(names)}"
        )


def keep_quantizers(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Marks captured quantizers, so that folding computes no constant through them: their codes are to be stored."""
    for node in graph_module.graph.nodes:
        if node.target in _QUANTIZE:
            node.meta["qdq_constant"] = False
    return graph_module


def convert_quantizers(graph_module: fx.GraphModule, target: Target) -> dict[fx.Node, Any]:
    """Replaces captured quantizers of activations by modules, in place, and gives the codes of those of constants.

    Batch norms are folded into the step sizes of the codes.

    Returns:
        For each node with a quantized constant, its `CodedConstant`.

    Raises:
        CalibrationError: quantizers without a range, or with NaN; all such are named.
        ExportError: the target has no codes for a quantizer.
    """
    conversion = _Conversion(graph_module, target)
    _check_ranges(graph_module)
    coded: dict[fx.Node, Any] = {}
    for node in list(graph_module.graph.nodes):
        if node.target in _QUANTIZE:
            if is_constant(node.args[0]):
                coded[node] = conversion.constant(node)
            else:
                conversion.activation(node)
        elif node.target in _BOUNDS:
            _as_clamp(graph_module, node)
        elif node.op == "call_function" and (constant := moved(node, coded)) is not None:
            coded[node] = constant
    fold_norms(graph_module, coded)
    graph_module.graph.eliminate_dead_code()
    left = set(graph_module.graph.nodes)
    coded = {node: constant for node, constant in coded.items() if node in left}
    for node in coded:
        node.meta["qdq_constant"] = True
    return coded


# Which bound of a clamp each is.
_BOUNDS: dict[Any, int] = {torch.ops.aten.maximum.default: 1, torch.ops.aten.minimum.default: 2}


def _as_clamp(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """A learned range is a maximum and a minimum with a constant: clips that quantizers can move over."""
    operands = node.args[:2]
    constants = [a for a in operands if isinstance(a, fx.Node) and is_constant(a) and value_of(a).numel() == 1]
    if len(constants) != 1 or not is_float(node) or rank_of(constants[0]) > rank_of(node):
        return
    (source,) = (a for a in operands if a is not constants[0])
    arguments: list[Any] = [source, None, None]
    arguments[_BOUNDS[node.target]] = float(evaluate(graph_module, constants[0]))
    node.target, node.args = torch.ops.aten.clamp.default, tuple(arguments)


def path_of(node: fx.Node) -> str:
    """Path of the `TensorQuantizer` that a node came from; of its module and the operation for a direct call."""
    path = module_path(node)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if stack and str(stack[-1][1]).endswith("TensorQuantizer"):
        return path
    return ".".join(p for p in (path, operation_name(node)) if p)


def _check_ranges(graph_module: fx.GraphModule) -> None:
    dynamic, broken = [], []
    for node in graph_module.graph.nodes:
        if node.target not in _QUANTIZE:
            continue
        amax = node.args[1]
        if isinstance(amax, fx.Node) and not is_constant(amax):
            dynamic.append(path_of(node))
        elif isinstance(amax, fx.Node) and not bool(torch.isfinite(evaluate(graph_module, amax)).all()):
            broken.append(path_of(node))
    problems = [
        f"{what}: {', '.join(dict.fromkeys(paths))}"
        for what, paths in (("without amax", dynamic), ("with NaN or infinity as amax", broken))
        if paths
    ]
    if problems:
        raise CalibrationError(
            f"cannot export: quantizers {'; '.join(problems)}. Calibrate the model, or disable() these quantizers"
        )


class _Conversion:
    def __init__(self, graph_module: fx.GraphModule, target: Target) -> None:
        self.graph_module, self.target = graph_module, target
        self.names: set[str] = set()
        self.known: dict[Any, fx.Node] = {}

    def constant(self, node: fx.Node) -> CodedConstant:
        """The codes of a weight."""
        path = path_of(node)
        value, amax = (evaluate(self.graph_module, a) for a in node.args[:2])  # type: ignore[arg-type]
        block_size = block_size_of(node)
        if block_size is None:
            _check_axes(path, amax)
        if node.target is SCALED_E4M3:
            self._check_e4m3(path, amax)
            return encode(self._name(path), path, value, amax, None, False, False)
        num_bits, unsigned, narrow_range = node.args[2:5]
        if not 2 <= num_bits <= 8:  # type: ignore[operator]
            raise ExportError(f"the quantizer {path!r} has {num_bits} bits: weights are stored with 2 to 8")
        if block_size is not None and self.target.rounds_inputs is not None and block_size not in BLOCK_SIZES:
            raise ExportError(
                f"the quantizer {path!r} has block_size={block_size}, and {self.target.name} computes with blocks of "
                f"{', '.join(map(str, BLOCK_SIZES))}"
            )
        codes = int(num_bits), bool(unsigned), bool(narrow_range)  # type: ignore[arg-type]
        constant = encode(self._name(path), path, value, amax, *codes, block_size)
        if constant.codes.dtype == torch.uint8 and not self.target.unsigned:
            raise ExportError(
                f"the quantizer {path!r} is unsigned, and {self.target.name} takes signed weights: set unsigned=False"
            )
        return constant

    def activation(self, node: fx.Node) -> None:
        """Replaces a quantizer of an activation by a module; calls that agree in input and range share one."""
        path, source = path_of(node), node.args[0]
        assert isinstance(source, fx.Node)
        if block_size_of(node) is not None:
            raise ExportError(
                f"the quantizer {path!r} has block_size={block_size_of(node)}, which files have for weights alone: set "
                "block_size=None"
            )
        amax = self._amax(node)
        key = (source, node.target, tuple(amax.shape), tuple(amax.flatten().tolist()), *node.args[2:])
        call = self.known.get(key)
        if call is None:
            module = self._module(node, path, amax)
            with self.graph_module.graph.inserting_before(node):
                self.graph_module.add_submodule(module.name, module)
                call = self.known[key] = self.graph_module.graph.call_module(module.name, (source,))
            call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        self.graph_module.graph.erase_node(node)

    def _amax(self, node: fx.Node) -> Tensor:
        amax = node.args[1]
        largest = torch.tensor(E4M3.max_value)  # scaled_e4m3 without amax
        return evaluate(self.graph_module, amax).float() if isinstance(amax, fx.Node) else largest

    def _module(self, node: fx.Node, path: str, amax: Tensor) -> AffineQuantizer | Float8Quantizer:
        _check_axes(path, amax)
        if amax.numel() > 1:
            raise ExportError(
                f"the quantizer {path!r} has one amax per channel, and runtimes take one per activation: set axis=None "
                "(a weight that changes while the model runs counts as one: set max_norm=None of an embedding)"
            )
        if node.target is SCALED_E4M3:
            self._check_e4m3(path, amax)
            return Float8Quantizer(self._name(path), amax)
        num_bits, unsigned, narrow_range = node.args[2:5]
        fmt = IntFormat(int(num_bits), bool(unsigned), bool(narrow_range))  # type: ignore[arg-type]
        self._check_integer(path, fmt)
        zero = 0 if fmt.unsigned or not self.target.unsigned else 128
        quantizer = AffineQuantizer(
            self._name(path), int(fmt.lo) + zero, int(fmt.hi) + zero, symmetric=True, origin=path
        ).to(amax.device)
        wide = amax.reshape(()).clamp(min=TINY_AMAX)
        quantizer.step_size.copy_(wide / torch.full_like(wide, fmt.bound))
        quantizer.zero_point.fill_(zero)
        quantizer.calibrated = quantizer.fixed = True
        return quantizer

    def _check_e4m3(self, path: str, amax: Tensor) -> None:
        if self.target.unsigned:
            raise ExportError(
                f"the quantizer {path!r} is E4M3, which {self.target.name} does not compute in: use num_bits=8, or "
                'target="tensorrt"'
            )
        if amax.numel() > 1:
            raise ExportError(
                f"the quantizer {path!r} is E4M3 with one amax per channel: only one amax can be exported"
            )

    def _check_integer(self, path: str, fmt: IntFormat) -> None:
        if not 2 <= fmt.num_bits <= 8:
            raise ExportError(f"the quantizer {path!r} has {fmt.num_bits} bits: activations are exported with 2 to 8")
        full = fmt.num_bits == 8 and (fmt.unsigned or not fmt.narrow_range)
        if not full and not clips_codes(self.target):
            what = f"{fmt.num_bits} bits" if fmt.num_bits != 8 else "a narrow range"
            raise ExportError(
                f"the quantizer {path!r} has {what}, and {self.target.name} takes activations of 8 bits with all "
                "codes: set num_bits=8 and narrow_range=False"
            )
        if fmt.unsigned and not self.target.unsigned:
            raise ExportError(
                f"the quantizer {path!r} is unsigned, and {self.target.name} takes signed activations: set "
                "unsigned=False, or disable() it (Recipe(attention=False) for the products of attention)"
            )

    def _name(self, path: str) -> str:
        free = name_for(path, lambda name: name in self.names or has_path(self.graph_module, name))
        self.names.add(free)
        return free


def block_size_of(node: fx.Node) -> int | None:
    """The block size of a captured quantizer; None where it has none."""
    given = node.args[5] if node.target is FAKE_TENSOR_QUANT and len(node.args) > 5 else None
    return None if given is None else int(given)  # type: ignore[arg-type]


def clips_codes(target: Target) -> bool:
    """Whether a Clip may stand between QuantizeLinear and DequantizeLinear without hiding them from the runtime."""
    rule = target.rule(Kind.CONVOLUTION)
    return target.unsigned and rule is not None and rule.output


def _check_axes(path: str, amax: Tensor) -> None:
    if sum(size != 1 for size in amax.shape) > 1:
        raise ExportError(
            f"the quantizer {path!r} has an amax of shape {tuple(amax.shape)}, over several axes: ONNX takes one axis"
        )


def name_for(path: str, is_taken: Callable[[str], bool]) -> str:
    """A free name for a quantizer, without the underscores of Python attributes, as `qdq.quantize` gives them."""
    owner, _, leaf = path.rpartition(".")
    return free_name(".".join(p for p in (owner, leaf.strip("_") or "quantizer") if p), is_taken)
