"""Insert: a placement becomes quantizer modules and their calls in the graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from ..affine_quantizer import AffineQuantizer
from ..constant_quantizers import BiasQuantizer, WeightQuantizer
from ..descriptor import QuantDescriptor
from ..errors import RecipeError
from ..integer_operations import (
    BlockRounding,
    IntegerAdd,
    IntegerConvolution,
    IntegerGlobalAverage,
    IntegerMul,
    IntegerOperation,
)
from ..recipe import Recipe
from .explanation import Explanation, explain_plan
from .names import ORIGINAL_NAME, free_name, has_path
from .ops import (
    WEIGHT_ONLY,
    Kind,
    bias_of,
    data_inputs,
    is_depthwise,
    is_split,
    kind_of,
    module_path,
    operation_name,
    rank_of,
    weight_position,
)
from .parameters import device_of, tensor_at
from .plan import USUAL_BITS, Plan, block_size_of, names_of, tail
from .targets import Target, reduces_range


def insert(
    graph_module: fx.GraphModule, plan: Plan, target: Target, recipe: Recipe
) -> tuple[fx.GraphModule, Explanation]:
    """Adds the quantizers of a placement to a graph module. Weights are fitted; activations are not calibrated.

    Activation quantizers bear the name of the module whose tensor they quantize (`layer1.0.relu.output_quantizer`),
    those of weights and biases the name of the parameter (`conv1.weight_quantizer`).

    Returns:
        The graph module, changed in place, and the explanation of every tensor.
    """
    insertion = _Insertion(graph_module, plan, target, recipe)
    explanation = insertion.prepare()
    insertion.edit()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module, explanation


EXACT_FORMS: dict[Kind, type[IntegerOperation]] = {
    Kind.CONVOLUTION: IntegerConvolution,
    Kind.ADD: IntegerAdd,
    Kind.MUL: IntegerMul,
    Kind.GLOBAL_AVERAGE: IntegerGlobalAverage,
}

# A parameter, its output-channel axis, and its block size or None.
_WeightKey = tuple[str, int, "int | None"]


class _Insertion:
    """Modules first, while the graph still is what the placement speaks of; then the edits."""

    def __init__(self, graph_module: fx.GraphModule, plan: Plan, target: Target, recipe: Recipe) -> None:
        self.graph_module, self.plan, self.target, self.recipe = graph_module, plan, target, recipe
        self.graph = graph_module.graph
        self.device = device_of(graph_module)
        self.reduce = reduces_range(target, recipe.reduce_range)
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.sources = {tensor: self._source(tensor) for tensor in plan.tensors}
        self.activations: dict[fx.Node, str] = {}
        self.weights: dict[_WeightKey, str] = {}
        self.biases: dict[fx.Node, str] = {}
        self.kinds = {node: kind_of(node) for node in (*plan.operations, *plan.weighted)}
        self.tails = {node: tail(node) for node in plan.operations}

    def prepare(self) -> Explanation:
        for tensor in sorted(self.plan.tensors, key=self.order.__getitem__):
            root = self.plan.root(tensor)
            if root not in self.activations:
                self.activations[root] = self._new_activation_quantizer(root)
        parameters: dict[fx.Node, str | None] = {}
        for node in self.plan.weighted:
            key = self._weight_key(node)
            if key not in self.weights:
                self.weights[key] = self._new_weight_quantizer(key)
            parameters[node.args[weight_position(node)[0]]] = self.weights[key]  # type: ignore[index]
        for node in self.plan.operations if self.target.integer_bias else ():
            bias = None if node in self.plan.wide else bias_of(node)
            if bias is not None and bias.op == "get_attr" and self._has_integer_bias(node):
                name = self._free(f"{bias.target}_quantizer")
                self.graph_module.add_submodule(name, BiasQuantizer(name))
                self.biases[node] = name
                parameters[bias] = name
        quantizers = {t: self.activations[self.plan.root(t)] for t in self.plan.tensors}
        return explain_plan(self.graph, self.plan, self.target.name, self.recipe, quantizers, parameters)

    def edit(self) -> None:
        calls: dict[_WeightKey, fx.Node] = {}
        keys = {node: self._weight_key(node) for node in self.plan.weighted}
        positions = {node: weight_position(node)[0] for node in self.plan.weighted}  # type: ignore[index]
        readers = {t: [u for u in t.users if self._reads_codes(u, t)] for t in self.plan.tensors}
        for tensor in self.plan.tensors:
            self._call_activation(tensor, readers[tensor])
        for node, key in keys.items():
            parameter = node.args[positions[node]]
            assert isinstance(parameter, fx.Node)
            if key not in calls:
                with self.graph.inserting_after(parameter):
                    calls[key] = self.graph.call_module(self.weights[key], (parameter,))
                calls[key].meta = dict(parameter.meta)
            node.update_arg(positions[node], calls[key])
        for node, name in self.biases.items():
            self._call_bias(node, name)
        self._round_inputs(keys)
        if self.target.exact:
            for node in self.plan.operations:
                self._call_exact(node)

    def _call_exact(self, node: fx.Node) -> None:
        """Replaces an operation between quantizers by the module that simulates it in integers."""
        kind, result = self.kinds[node], self.tails[node]
        form = EXACT_FORMS.get(kind)
        if form is None or result not in self.plan.integer or node in self.plan.wide or node.kwargs:
            return
        modules = dict(self.graph_module.named_modules())
        around = [modules.get(str(n.target)) for n in node.all_input_nodes if n.op == "call_module"]
        inputs = tuple(m for m in around if isinstance(m, AffineQuantizer))
        constants = tuple(m for m in around if isinstance(m, (WeightQuantizer, BiasQuantizer)))
        output = modules[self.activations[self.plan.root(result)]]
        assert isinstance(output, AffineQuantizer) and callable(node.target)
        if kind in (Kind.ADD, Kind.MUL):
            inputs = tuple(
                m for a in node.args if isinstance(m := modules.get(str(getattr(a, "target", ""))), AffineQuantizer)
            )
            if len(inputs) != 2:
                return
        if kind is Kind.CONVOLUTION and len(constants) != 1 + (len(node.args) > 2 and node.args[2] is not None):
            return
        path = module_path(node)
        name = self._free(".".join(p for p in (path, f"integer_{operation_name(node)}") if p))
        self.graph_module.add_submodule(name, form(node.target, inputs, output, constants))
        with self.graph.inserting_before(node):
            call = self.graph.call_module(name, node.args)
        call.meta = {**node.meta, ORIGINAL_NAME: node.name}
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)

    def _round_inputs(self, keys: dict[fx.Node, _WeightKey]) -> None:
        """Marks linears with float activations, and lets them read what their runtime's kernel makes of these."""
        known: dict[tuple[fx.Node, int], fx.Node] = {}
        modules = dict(self.graph_module.named_modules())
        for node, key in keys.items():
            source, weights = node.args[0], modules[self.weights[key]]
            assert isinstance(source, fx.Node) and isinstance(weights, WeightQuantizer)
            if node in self.plan.operations or self.kinds[node] not in (Kind.LINEAR, Kind.MATMUL):
                continue
            if tensor_at(self.graph_module, key[0]).dim() != 2:
                continue
            node.meta[WEIGHT_ONLY] = True
            if self.target.rounds_inputs is None:
                continue
            block = weights.block_size or self.target.rounds_inputs
            if (source, block) not in known:
                name = self._free(".".join(p for p in (module_path(node), "rounded_input") if p))
                self.graph_module.add_submodule(name, BlockRounding(weights, block))
                with self.graph.inserting_before(node):
                    known[source, block] = self.graph.call_module(name, (source,))
                known[source, block].meta = dict(source.meta)
            node.update_arg(0, known[source, block])

    def _call_activation(self, tensor: fx.Node, readers: list[fx.Node]) -> None:
        arguments: dict[str, Any] = {} if self.sources[tensor] else {"on_grid": True}
        with self.graph.inserting_after(tensor):
            call = self.graph.call_module(self.activations[self.plan.root(tensor)], (tensor,), arguments)
        call.meta = {k: v for k, v in tensor.meta.items() if k in ("val", "nn_module_stack")}
        for reader in readers:
            reader.replace_input_with(tensor, call)

    def _call_bias(self, node: fx.Node, name: str) -> None:
        source, weight, bias = node.args[:3]
        assert isinstance(source, fx.Node) and isinstance(weight, fx.Node) and isinstance(bias, fx.Node)
        with self.graph.inserting_before(node):
            input_step = self.graph.get_attr(f"{source.target}.step_size")
            weight_step = self.graph.get_attr(f"{weight.target}.step_size")
            call = self.graph.call_module(name, (bias, input_step, weight_step))
        call.meta = dict(bias.meta)
        node.update_arg(2, call)

    def _weight_key(self, node: fx.Node) -> _WeightKey:
        where = weight_position(node)
        assert where is not None
        block = block_size_of(node, self.recipe.weights_for(*names_of(node), node=node.name))
        return str(node.args[where[0]].target), where[1], block  # type: ignore[union-attr]

    def _weight_descriptor(self, key: _WeightKey, readers: list[fx.Node]) -> QuantDescriptor:
        """What the recipe says of a weight: an override for one of its readers holds for all of them."""
        asked: list[tuple[fx.Node, QuantDescriptor]] = []
        for node in readers:
            # The weight bears the name of one of its readers; what is asked for another goes by that one's module.
            named = ((module_path(node),), names_of(node))
            found = (self.recipe.for_name(*names, node=node.name).weights for names in named)
            asked += [(node, descriptor) for descriptor in found if descriptor is not None][:1]
        codes = [(descriptor.num_bits, descriptor.axis is None) for _, descriptor in asked]
        for (node, _), other in zip(asked, codes, strict=True):
            if other != codes[0]:
                first, second = (module_path(n) or n.name for n in (asked[0][0], node))
                told = (f"{b} bits{' per tensor' if whole else ''}" for b, whole in (codes[0], other))
                raise RecipeError(
                    f"overrides: {first!r} and {second!r} read the same weight {key[0]!r}, but are to have "
                    f"{' and '.join(told)}: it has codes of one kind, so give both the same weights"
                )
        return asked[0][1] if asked else self.recipe.weights

    def _new_weight_quantizer(self, key: _WeightKey) -> str:
        all_readers = [n for n in self.plan.weighted if self._weight_key(n) == key]
        descriptor = self._weight_descriptor(key, all_readers)
        bits = int(descriptor.num_bits)  # type: ignore[arg-type]
        # Depthwise kernels widen before they multiply: nothing saturates there. Of several readers of one weight one
        # is enough.
        readers = [n for n in all_readers if self._may_be_integer(n)]
        reduced = self.reduce and any(not (self.target.pairs and is_depthwise(n)) for n in readers)
        if reduced and not self.target.pairs:
            bits = min(bits, 7)
        pairs_axis = key[1] if reduced and self.target.pairs and bits == 8 else None
        value = tensor_at(self.graph_module, key[0])
        name = self._free(f"{key[0]}_quantizer")
        in_float = not readers and all(self.kinds[n] is not Kind.EMBEDDING for n in all_readers)
        quantizer = WeightQuantizer(
            name,
            bits,
            None if descriptor.axis is None else key[1],
            value.shape[key[1]],
            pairs_axis,
            block_size=key[2],
            inputs=value.shape[1 - key[1]] if key[2] else 0,
            stored_bits=4 if in_float and bits <= 4 and self.target.int4 else 8,
        )
        quantizer.to(value.device).fit(value, self.recipe.weight_calibration)
        self.graph_module.add_submodule(name, quantizer)
        return name

    def _may_be_integer(self, node: fx.Node) -> bool:
        """Whether a runtime computes in integers, or may: it fuses a convolution that we see in float, too, where
        others made its input codes.
        """
        if node in self.plan.operations:
            return node not in self.plan.wide
        codes = [n for n in data_inputs(node) if n in self.plan.integer and self.plan.bits_of(n) == USUAL_BITS]
        return self.kinds[node] is Kind.CONVOLUTION and bool(codes)

    def _has_integer_bias(self, node: fx.Node) -> bool:
        if kind_of(node) is Kind.CONVOLUTION:
            return True
        # A linear with more dimensions is a MatMul and an Add in ONNX, and the Add is computed in float.
        return kind_of(node) is Kind.LINEAR and rank_of(node) == 2

    def _reads_codes(self, reader: fx.Node, tensor: fx.Node) -> bool:
        if tensor in self.plan.integer:
            return reader.target is not torch.ops.aten.sym_size.int
        return tensor in self.plan.operations.get(reader, [])

    def _source(self, tensor: fx.Node) -> bool:
        """Whether a tensor's values are new, and not moved from others of the same quantizer."""
        if kind_of(tensor) not in (Kind.MOVE, Kind.CONCAT):
            return True
        root = self.plan.root(tensor)
        inputs = data_inputs(tensor)
        return not inputs or any(
            (n not in self.plan.tensors and not is_split(n)) or self.plan.root(n) is not root for n in inputs
        )

    def _new_activation_quantizer(self, root: fx.Node) -> str:
        members = [t for t in self.plan.tensors if self.plan.root(t) is root and self.sources[t]]
        names = [name for t in [*members, root] for name in self._tensor_names(t)]
        nodes = tuple(t.name for t in (*members, root))
        override = self.recipe.for_name(*names, node=nodes)
        descriptor = self.recipe.activations_for(*names, node=nodes)
        lo, hi = self.target.activation_codes(self.plan.bits_of(root))
        name = self._free(self._name_for(min(members, key=self.order.__getitem__, default=root)))
        quantizer = AffineQuantizer(
            name,
            lo,
            hi,
            symmetric=self.target.symmetric,
            method=override.calibration or self.recipe.calibration,
            percentile=float(self.recipe.percentile),
            usual_method=self._usual_method(root),
        ).to(self.device)
        if descriptor is not None and isinstance(descriptor.amax, np.ndarray):
            amax = float(descriptor.amax.item())
            quantizer.set_range(0.0 if descriptor.unsigned else -amax, amax)
            quantizer.fixed = True
        self.graph_module.add_submodule(name, quantizer)
        return name

    def _usual_method(self, root: fx.Node) -> str:
        members = [t for t in self.plan.tensors if self.plan.root(t) is root]
        readers = [kind_of(u) for t in members for u in t.users if t in self.plan.operations.get(u, [])]
        from_float = all(t not in self.plan.integer and t.op != "placeholder" for t in members)
        return "max" if from_float and all(k in (Kind.LINEAR, Kind.MATMUL) for k in readers) else "mse"

    def _tensor_names(self, tensor: fx.Node) -> tuple[str, ...]:
        return (str(tensor.target),) if tensor.op == "placeholder" else names_of(tensor)

    def _name_for(self, tensor: fx.Node) -> str:
        if tensor.op == "placeholder":
            return f"{tensor.target}_quantizer"
        path = module_path(tensor)
        stack = list((tensor.meta.get("nn_module_stack") or {}).values())
        leaf = bool(stack) and str(stack[-1][1]).startswith("torch.nn.modules") and path
        if leaf:
            return f"{path}.output_quantizer"
        return ".".join(p for p in (path, f"{operation_name(tensor)}_quantizer") if p)

    def _free(self, name: str) -> str:
        return free_name(name, lambda free: has_path(self.graph_module, free))
