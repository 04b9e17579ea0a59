"""Lowering: a calibrated graph becomes the graph that is written, with integer constants in place of float ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..affine_quantizer import AffineQuantizer
from ..constant_quantizers import BiasQuantizer, WeightQuantizer
from ..errors import CalibrationError
from ..graph.names import free_name
from ..graph.ops import WEIGHT_ONLY, Kind, bias_of, kind_of, rank_of
from ..graph.parameters import tensor_at
from ..graph.plan import USUAL_BITS
from ..graph.record import KEY, Record
from ..graph.targets import Target
from ..integer_operations import BlockRounding, IntegerOperation
from ..onnx_nodes import OPSET
from .constants import ConstantDequantizer, PackedMatMul

aten = torch.ops.aten
# (name of the quantizer, form) -> the module that holds the constant in this form.
_Known = dict[tuple[str, str], str]


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
    lowered = _on_cpu(copy.deepcopy(graph_module))
    modules = dict(lowered.named_modules())
    missing = [n for n, m in modules.items() if isinstance(m, AffineQuantizer) and m.enabled and not m.calibrated]
    if missing:
        raise CalibrationError(f"cannot export: {len(missing)} quantizers have no range: {', '.join(missing)}")
    for node in list(lowered.graph.nodes):
        if node.op == "call_module" and isinstance(module := modules.get(str(node.target)), IntegerOperation):
            if isinstance(module, BlockRounding):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                lowered.graph.erase_node(node)
                continue
            with lowered.graph.inserting_before(node):
                plain = lowered.graph.call_function(module.operation, node.args)
            plain.meta = dict(node.meta)
            node.replace_all_uses_with(plain)
            lowered.graph.erase_node(node)
    record = graph_module.meta.get(KEY)
    target = record.target if isinstance(record, Record) else None
    by_recipe = isinstance(record, Record) and record.recipe is not None
    weights: _Known = {}
    for node in list(lowered.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, BiasQuantizer):
            _lower_bias(lowered, node, module)
        elif isinstance(module, WeightQuantizer):
            parameter = node.args[0]
            assert isinstance(parameter, fx.Node)
            codes = module.codes(tensor_at(lowered, str(parameter.target)))
            constant = ConstantDequantizer(
                module.name, codes, module.step_size, module.axis, module.block_size, module.stored_bits
            )
            _lower_constant(lowered, node, constant, weights, target)
        elif isinstance(module, ConstantDequantizer):
            _lower_constant(lowered, node, module, weights, target if module.block_size else None, exact=True)
    if target is not None and target.integer_bias and by_recipe:
        for node in list(lowered.graph.nodes):
            _keep_float_bias(lowered, node)
    for node in list(lowered.graph.nodes):
        if node.op == "call_function" and kind_of(node) is Kind.GLOBAL_AVERAGE:
            _replace_by_module(lowered, node, GlobalAveragePool(), (node.args[0],))
    lowered.graph.eliminate_dead_code()
    lowered.delete_all_unused_submodules()
    _drop_unused_tensors(lowered)
    lowered.graph.lint()
    lowered.recompile()
    return lowered


def _on_cpu(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The graph module with its values on the CPU, where files are made; a file knows no devices."""
    cpu = torch.device("cpu")
    for node in graph_module.graph.nodes:
        node.args, node.kwargs = pytree.tree_map_only(torch.device, lambda _: cpu, (node.args, node.kwargs))
    return graph_module.cpu()


def _lower_bias(lowered: fx.GraphModule, node: fx.Node, module: BiasQuantizer) -> None:
    bias, input_step, weight_step = (tensor_at(lowered, str(a.target)) for a in node.args)  # type: ignore[union-attr]
    step = (input_step.double() * weight_step.double()).float()
    codes = module.codes(bias, input_step, weight_step)
    constant = ConstantDequantizer(module.name, codes, step, 0 if step.dim() else None)
    _replace_by_module(lowered, node, constant, ())


def _lower_constant(
    lowered: fx.GraphModule,
    node: fx.Node,
    constant: ConstantDequantizer,
    known: _Known,
    target: Target | None = None,
    exact: bool = False,
) -> None:
    """Puts a constant before each of its readers, in the form that the reader takes.

    Args:
        target: given for weights of `qdq.quantize`, and for blocks: linears with float activations, or with blocks, are
            then stored as the matrix products that runtimes compute from few bits.
        exact: the runtime must not round what these products read: quantized modules do that themselves, or not at all.
    """
    readers = list(node.users)
    for reader in readers:
        kind = kind_of(reader)
        rows = constant.axis in (None, 0) and not constant.codes.dtype.is_floating_point
        if kind is Kind.EMBEDDING and reader.args[0] is node and rows:
            table = QuantizedEmbedding(constant.codes, constant.step_size)
            _replace_by_module(lowered, reader, table, (reader.args[1],))
            continue
        weight_only = target is not None and (exact or bool(reader.meta.get(WEIGHT_ONLY)))
        used = constant
        if kind is Kind.LINEAR and reader.args[1] is node and (rank_of(reader) != 2 or weight_only):
            reader, used = _linear_as_matmul(lowered, reader), constant.transposed()
        shared = exact or len(readers) > 1
        if target is not None and weight_only and _is_packed(lowered, reader, target, shared):
            packed = (constant.name, "packed")
            if packed not in known:
                block = used.block_size or target.rounds_inputs or 32
                module = PackedMatMul(used, block, 1 if exact or target.rounds_inputs is None else 4)
                known[packed] = add_module(lowered, module)
            _replace_by_call(lowered, reader, known[packed], (reader.args[0],))
            continue
        form = "codes" if used is constant else "transposed codes"
        product = kind_of(reader) is Kind.MATMUL and reader.args[1] is node and used.codes.dim() == 2
        if product and _reads_wide_codes(lowered, reader):
            reader, used, form = _with_three_dimensions(lowered, reader), used.unsqueezed(), f"{form}, 3-d"
        _constant_argument(lowered, reader, node, used, known, form)


def _is_packed(lowered: fx.GraphModule, product: fx.Node, target: Target, shared: bool) -> bool:
    """Whether a product is stored as MatMulNBits.

    ONNX Runtime makes one of DequantizeLinear and MatMul by itself, but not where several operations read the weight,
    and not where the input has a DequantizeLinear too: there it computes something else, or fails.
    """
    quantized = _quantizer_of(lowered, product.args[0]) is not None
    return target.matmul_nbits or ((quantized or shared) and target.rounds_inputs is not None)


def _linear_as_matmul(lowered: fx.GraphModule, linear: fx.Node) -> fx.Node:
    """The product alone, of a weight that is still to be transposed, with the bias added behind it.

    It is stored transposed: a Transpose between DequantizeLinear and MatMul would hide the integer pattern.
    """
    source, weight, bias = (*linear.args, None)[:3]
    with lowered.graph.inserting_before(linear):
        product = lowered.graph.call_function(aten.matmul.default, (source, weight))
        product.meta = dict(linear.meta)
        result = product
        if bias is not None:
            result = lowered.graph.call_function(aten.add.Tensor, (product, bias))
            result.meta = dict(linear.meta)
    linear.replace_all_uses_with(result)
    lowered.graph.erase_node(linear)
    return product


def _quantizer_of(lowered: fx.GraphModule, node: object) -> AffineQuantizer | None:
    """The quantizer whose values a node gives, None where it is no call of one."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = lowered.get_submodule(str(node.target))
    return module if isinstance(module, AffineQuantizer) and module.enabled else None


def _reads_wide_codes(lowered: fx.GraphModule, product: fx.Node) -> bool:
    quantizer = _quantizer_of(lowered, product.args[0])
    return quantizer is not None and quantizer.num_bits > USUAL_BITS


def _with_three_dimensions(lowered: fx.GraphModule, product: fx.Node) -> fx.Node:
    """The product with a weight that is to get a leading dimension of size 1.

    A constant of two dimensions would become MatMulNBits in ONNX Runtime (1.32), with or without a Transpose between,
    and that rounds the other operand to int8.
    """
    source = product.args[0]
    assert isinstance(source, fx.Node)
    with lowered.graph.inserting_before(product):
        result = wide = lowered.graph.call_function(aten.matmul.default, (source, product.args[1]))
        wide.meta = {k: v for k, v in product.meta.items() if k != "val"}
        if rank_of(source) < 3:
            result = lowered.graph.call_function(aten.squeeze.dim, (wide, 0))
        result.meta = dict(product.meta)
    product.replace_all_uses_with(result)
    lowered.graph.erase_node(product)
    return wide


def _quantizers_around(lowered: fx.GraphModule, node: fx.Node, source: object) -> list[AffineQuantizer]:
    """Of what an operation reads and of what it gives, behind clips too; none where it does not read codes."""
    read = _quantizer_of(lowered, source)
    if read is None:
        return []
    found, results = [read], [node]
    while results:
        for user in results.pop().users:
            quantizer = _quantizer_of(lowered, user)
            if quantizer is not None:
                found.append(quantizer)
            elif user.op == "call_function" and kind_of(user) is Kind.CLIP:
                results.append(user)
    return found


def _keep_float_bias(lowered: fx.GraphModule, node: fx.Node) -> None:
    """Stores the float bias of an operation that reads or gives wide codes as int32 codes of a step size of its own.

    That is exact. ONNX Runtime (1.32) rounds a float bias between DequantizeLinear and QuantizeLinear to int32 of step
    input step x weight step, whatever kernel runs. With codes of 16 bits that step may be so small that int32
    saturates.
    """
    bias = bias_of(node) if node.op == "call_function" else None
    if bias is None or bias.op != "get_attr":
        return
    source, weight = node.args[:2]
    quantized = isinstance(weight, fx.Node) and weight.op == "call_module"
    if not quantized or not any(q.num_bits > USUAL_BITS for q in _quantizers_around(lowered, node, source)):
        return
    value = tensor_at(lowered, str(bias.target)).detach()
    # Codes of 24 bits, and a power of two for each value: their product is the value.
    exponents = torch.frexp(value).exponent.clamp(min=-100) - 24
    step = torch.ldexp(torch.ones_like(value), exponents)
    constant = ConstantDequantizer(str(bias.target), (value / step).round().to(torch.int32), step, 0)
    with lowered.graph.inserting_before(node):
        call = lowered.graph.call_module(add_module(lowered, constant), ())
    call.meta = {**bias.meta, "qdq_constant": True}
    node.update_arg(2, call)


def _constant_argument(
    lowered: fx.GraphModule,
    reader: fx.Node,
    old: fx.Node,
    constant: ConstantDequantizer,
    known: _Known,
    form: str,
) -> None:
    key = (constant.name, form)
    if key not in known:
        known[key] = add_module(lowered, constant)
    with lowered.graph.inserting_before(reader):
        call = lowered.graph.call_module(known[key], ())
    call.meta = {**old.meta, "qdq_constant": True}
    reader.replace_input_with(old, call)


def _replace_by_module(lowered: fx.GraphModule, node: fx.Node, module: nn.Module, args: tuple[object, ...]) -> None:
    _replace_by_call(lowered, node, add_module(lowered, module), args)


def _replace_by_call(lowered: fx.GraphModule, node: fx.Node, path: str, args: tuple[object, ...]) -> None:
    with lowered.graph.inserting_before(node):
        call = lowered.graph.call_module(path, args)  # type: ignore[arg-type]
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    lowered.graph.erase_node(node)


def add_module(lowered: fx.GraphModule, module: nn.Module) -> str:
    """Registers a module under a free name made from its own, which is returned."""
    base = getattr(module, "name", type(module).__name__.lower()).removesuffix("_quantizer").replace(".", "_")
    free = free_name(base, lambda name: hasattr(lowered, name))
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
