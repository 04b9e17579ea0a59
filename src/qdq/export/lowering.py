"""Lowering: a calibrated graph becomes the graph that is written, with integer constants in place of float ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from ..affine_quantizer import AffineQuantizer
from ..constant_quantizers import BiasQuantizer, WeightQuantizer
from ..errors import CalibrationError
from ..graph.fold import attribute
from ..graph.ops import Kind, kind_of, rank_of
from ..integer_operations import IntegerOperation
from ..onnx_nodes import OPSET, dequantize

aten = torch.ops.aten


class ConstantDequantizer(nn.Module):
    """Integer codes of a weight or bias that the file stores, and their DequantizeLinear."""

    codes: Tensor
    step_size: Tensor
    zero_point: Tensor

    def __init__(self, name: str, codes: Tensor, step_size: Tensor, axis: int | None) -> None:
        super().__init__()
        self.name, self.axis = name, axis
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("step_size", step_size.detach().float().clone())
        self.register_buffer("zero_point", torch.zeros(step_size.shape, dtype=codes.dtype))

    def forward(self) -> Tensor:
        """The constant as float32."""
        if torch.onnx.is_in_onnx_export():
            return dequantize(self.codes, self.step_size, self.zero_point, self.axis, self.name)
        shape = [1] * self.codes.dim()
        if self.axis is not None:
            shape[self.axis] = -1
        return self.codes.float() * self.step_size.reshape(shape if self.axis is not None else ())


class QuantizedEmbedding(nn.Module):
    """Rows of an int8 table, gathered as codes and scaled by the row's step size: the table is never expanded."""

    codes: Tensor
    step_size: Tensor

    def __init__(self, codes: Tensor, step_size: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("step_size", step_size.detach().float().reshape(-1, 1).clone())

    def forward(self, indices: Tensor) -> Tensor:
        """The rows at `indices`, float32 of shape [*indices.shape, width]."""
        rows = aten.embedding.default(self.codes, indices).float()
        if self.step_size.numel() == 1:
            return rows * self.step_size.reshape(())
        return rows * aten.embedding.default(self.step_size, indices)


class GlobalAveragePool(nn.Module):
    """The mean over all spatial dimensions, kept as size 1, as the one ONNX operation that runtimes quantize."""

    def forward(self, x: Tensor) -> Tensor:
        """x of shape [batch, channels, ...] to [batch, channels, 1, ...]."""
        if torch.onnx.is_in_onnx_export():
            shape = (x.shape[0], x.shape[1], *[1] * (x.dim() - 2))
            return torch.onnx.ops.symbolic("GlobalAveragePool", (x,), {}, dtype=x.dtype, shape=shape, version=OPSET)
        return x.mean(tuple(range(2, x.dim())), keepdim=True)


def lower(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a calibrated graph module in the form that is exported. Without quantizers it is a plain copy.

    Raises:
        CalibrationError: an activation quantizer has no range; all such are named.
    """
    lowered = copy.deepcopy(graph_module)
    modules = dict(lowered.named_modules())
    missing = [n for n, m in modules.items() if isinstance(m, AffineQuantizer) and m.enabled and not m.calibrated]
    if missing:
        raise CalibrationError(f"cannot export: {len(missing)} quantizers have no range: {', '.join(missing)}")
    for node in list(lowered.graph.nodes):
        if node.op == "call_module" and isinstance(module := modules.get(str(node.target)), IntegerOperation):
            with lowered.graph.inserting_before(node):
                plain = lowered.graph.call_function(module.operation, node.args)
            plain.meta = dict(node.meta)
            node.replace_all_uses_with(plain)
            lowered.graph.erase_node(node)
    weights: dict[tuple[str, bool], str] = {}
    for node in list(lowered.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, BiasQuantizer):
            _lower_bias(lowered, node, module)
        elif isinstance(module, WeightQuantizer):
            parameter = node.args[0]
            assert isinstance(parameter, fx.Node)
            constant = ConstantDequantizer(
                module.name, module.codes(attribute(lowered, str(parameter.target))), module.step_size, module.axis
            )
            _lower_constant(lowered, node, constant, weights)
        elif isinstance(module, ConstantDequantizer):
            _lower_constant(lowered, node, module, weights)
    for node in list(lowered.graph.nodes):
        if node.op == "call_function" and kind_of(node) is Kind.GLOBAL_AVERAGE:
            _replace_by_module(lowered, node, GlobalAveragePool(), (node.args[0],))
    lowered.graph.eliminate_dead_code()
    lowered.delete_all_unused_submodules()
    _drop_unused_tensors(lowered)
    lowered.graph.lint()
    lowered.recompile()
    return lowered


def _lower_bias(lowered: fx.GraphModule, node: fx.Node, module: BiasQuantizer) -> None:
    bias, input_step, weight_step = (attribute(lowered, str(a.target)) for a in node.args)  # type: ignore[union-attr]
    step = (input_step.double() * weight_step.double()).float()
    codes = module.codes(bias, input_step, weight_step)
    constant = ConstantDequantizer(module.name, codes, step, 0 if step.dim() else None)
    _replace_by_module(lowered, node, constant, ())


def _lower_constant(
    lowered: fx.GraphModule, node: fx.Node, constant: ConstantDequantizer, known: dict[tuple[str, bool], str]
) -> None:
    name, codes, step, axis = constant.name, constant.codes, constant.step_size, constant.axis
    for reader in list(node.users):
        kind = kind_of(reader)
        rows = axis in (None, 0) and not codes.dtype.is_floating_point
        if kind is Kind.EMBEDDING and reader.args[0] is node and rows:
            _replace_by_module(lowered, reader, QuantizedEmbedding(codes, step), (reader.args[1],))
            continue
        if kind is Kind.LINEAR and reader.args[1] is node and rank_of(reader) != 2:
            _linear_as_matmul(lowered, reader, name, codes, step, axis, known)
            continue
        _constant_argument(lowered, reader, node, name, codes, step, axis, known, False)


def _linear_as_matmul(
    lowered: fx.GraphModule,
    linear: fx.Node,
    name: str,
    codes: Tensor,
    step: Tensor,
    axis: int | None,
    known: dict[tuple[str, bool], str],
) -> None:
    """Stores the weight transposed: a Transpose between DequantizeLinear and MatMul would hide the integer pattern."""
    source, weight, bias = (*linear.args, None)[:3]
    assert isinstance(weight, fx.Node)
    with lowered.graph.inserting_before(linear):
        product = lowered.graph.call_function(aten.matmul.default, (source, weight))
        product.meta = dict(linear.meta)
        result = product
        if bias is not None:
            result = lowered.graph.call_function(aten.add.Tensor, (product, bias))
            result.meta = dict(linear.meta)
    linear.replace_all_uses_with(result)
    lowered.graph.erase_node(linear)
    transposed = None if axis is None else 1 - axis
    _constant_argument(lowered, product, weight, name, codes.t(), step, transposed, known, True)


def _constant_argument(
    lowered: fx.GraphModule,
    reader: fx.Node,
    old: fx.Node,
    name: str,
    codes: Tensor,
    step: Tensor,
    axis: int | None,
    known: dict[tuple[str, bool], str],
    transposed: bool,
) -> None:
    if (name, transposed) not in known:
        constant = ConstantDequantizer(name, codes, step, axis)
        known[name, transposed] = add_module(lowered, constant)
    with lowered.graph.inserting_before(reader):
        call = lowered.graph.call_module(known[name, transposed], ())
    call.meta = {**old.meta, "qdq_constant": True}
    reader.replace_input_with(old, call)


def _replace_by_module(lowered: fx.GraphModule, node: fx.Node, module: nn.Module, args: tuple[object, ...]) -> None:
    path = add_module(lowered, module)
    with lowered.graph.inserting_before(node):
        call = lowered.graph.call_module(path, args)  # type: ignore[arg-type]
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    lowered.graph.erase_node(node)


def add_module(lowered: fx.GraphModule, module: nn.Module) -> str:
    """Registers a module under a free name made from its own, which is returned."""
    base = getattr(module, "name", type(module).__name__.lower()).removesuffix("_quantizer").replace(".", "_")
    free, count = base, 1
    while hasattr(lowered, free):
        free, count = f"{base}_{count}", count + 1
    lowered.add_submodule(free, module)
    return free


def _drop_unused_tensors(lowered: fx.GraphModule) -> None:
    """Float weights that were replaced by codes would otherwise be written to the file as well."""
    called = {str(n.target) for n in lowered.graph.nodes if n.op == "call_module"}
    used = {str(n.target) for n in lowered.graph.nodes if n.op == "get_attr"}
    for path, module in list(lowered.named_modules()):
        if path in called:
            continue
        prefix = f"{path}." if path else ""
        for store in (module._parameters, module._buffers):
            for name in [n for n in store if prefix + n not in used]:
                del store[name]
