"""A calibrated model of quantized modules as the graph that algorithms work on, and their results put into it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..affine_quantizer import AffineQuantizer
from ..algorithms.float_values import Observer, observe_float_values
from ..algorithms.layer import Layer, layers_of
from ..batches import Inputs, signature_of
from ..calib.calibrator import reduce_blocks
from ..calibration import activation_quantizers
from ..constant_quantizers import WeightQuantizer
from ..errors import CalibrationError
from ..export.module_graph import block_size_of, check_stages, keep_quantizers, name_for, path_of
from ..formats import E4M3, IntFormat
from ..graph.capture import capture
from ..graph.contract import InputContract
from ..graph.fold import evaluate, fold
from ..graph.names import has_path
from ..graph.ops import WEIGHTED, Kind, is_constant, kind_of, rank_of, value_of
from ..graph.parameters import add_parameter, get_attribute, tensor_at
from ..graph.record import KEY, Record
from ..kernels.operations import FAKE_TENSOR_QUANT
from ..kernels.reference import TINY_AMAX
from ..quantizer import TensorQuantizer
from ..recipe import Recipe
from .parameters import QUANTIZE, ModuleParameters
from .unchanged_quantizers import UnchangedQuantizer, UnchangedWeightQuantizer
from .writing import write_changes

aten = torch.ops.aten

# Of a quantized tensor in the float model, over the samples: least and largest value, and the sum of the magnitudes.
Extremes = dict[str, tuple[float, float, float]]


class ModuleView:
    """A graph with the quantizers that the algorithms know.

    A layer without a bias before a batch norm gets one in the graph, in place of the batch norm's mean.

    Attributes:
        graph_module: with a record; weights and biases bear the model's own names.
        layers: those that algorithms may change.
        left: path of a weight quantizer -> why its layer is not among them.

    Args:
        model: calibrated; it is not changed before `write`.
        example: inputs of it.
        recipe: of which the algorithms read how weights are calibrated; that is replaced by what the model shows.
        dynamic_shapes: as for `qdq.quantize`.

    Raises:
        CaptureError, DataError: it cannot be captured.
        CalibrationError: quantizers without a range.
    """

    def __init__(self, model: nn.Module, example: Inputs, recipe: Recipe, dynamic_shapes: Any = None) -> None:
        check_stages(model)
        self.model = model
        self.graph_module = capture(model, *example, dynamic_shapes=dynamic_shapes)
        self.parameters = ModuleParameters(model, self.graph_module)
        fold(keep_quantizers(self.graph_module))
        self.left: dict[str, str] = {}
        modules = model.named_modules(remove_duplicate=False)
        self._quantizers = {name: m for name, m in modules if isinstance(m, TensorQuantizer)}
        self._origins: dict[str, str] = {}
        self._activations: dict[str, str] = {}
        self._smaller = 0
        self._convert()
        # Path of a bias that the graph alone has -> path of the mean that it stands for.
        self._means: dict[str, str] = {}
        self._give_biases()
        method = "mse" if self._smaller else "max"
        recipe = Recipe(algorithms=recipe.algorithms, weight_calibration=method)
        contract = InputContract(self.graph_module.graph, signature_of(model.forward), example)
        contract.try_parts(self.graph_module, example)
        self.graph_module.meta[KEY] = Record(contract, (), recipe=recipe)
        self.graph_module.graph.lint()
        self.graph_module.recompile()
        self.layers: list[Layer] = list(layers_of(self.graph_module).values())
        # The tensors themselves: algorithms put others in their place, but write step sizes over.
        paths = {str(n.target) for n in self.graph_module.graph.nodes if n.op == "get_attr"}
        self._before = {path: tensor_at(self.graph_module, path) for path in paths}
        self._steps = {layer.name: layer.quantizer.step_size.clone() for layer in self.layers}
        self._ranges = {q.name: q.step_size.clone() for q in activation_quantizers(self.graph_module)}

    def extremes(self, samples: list[list[Any]], progress: bool) -> Extremes:
        """What the activation quantizers are given in the float model."""
        found: Extremes = {}
        observers: list[Observer] = []
        for node, quantizer in self._calls():
            if not quantizer.fixed:
                observers.append((node.all_input_nodes[0], _observer(found, quantizer.name)))
        observe_float_values(self.graph_module, samples, observers, "looking at ranges", progress)
        return found

    def widen(self, before: Extremes, after: Extremes) -> None:
        """Sets the ranges of the tensors that have changed to their extremes."""
        for quantizer in activation_quantizers(self.graph_module):
            old, new = before.get(quantizer.name), after.get(quantizer.name)
            if old is None or new is None:
                continue
            if any(abs(a - b) > 1e-4 * max(abs(a), abs(b)) for a, b in zip(old, new, strict=True)):
                quantizer.set_range(new[0], new[1])

    def write(self) -> None:
        """Puts what the algorithms have changed into the model: all of it, or after an error nothing.

        Raises:
            QdqError: values that are not finite, or have no place in the model.
        """
        changed: dict[str, Tensor] = {}
        ranges: dict[str, Tensor] = {}
        for path, old in self._before.items():
            new = tensor_at(self.graph_module, path)
            if not torch.equal(new, old):
                changed[path] = new
        for layer in self.layers:
            weight, step = tensor_at(self.graph_module, layer.weight), layer.quantizer.step_size
            path = self._origins[layer.quantizer.name]
            stepped, most = not torch.equal(step, self._steps[layer.name]), layer.quantizer.step_for(weight)
            most = most * layer.quantizer.bound
            # A range that follows the weight would follow the codes.
            if stepped or (layer.weight in changed and self._quantizers[path].amax is None):
                ranges[path] = most if layer.quantizer.block_size is None else step * layer.quantizer.bound
            narrow = self._quantizers[path]._narrow_range
            if not narrow and (stepped or layer.weight in changed):
                # The most negative code of a quantizer without narrow_range is none of the graph's.
                weight = weight.maximum(-most).minimum(most)
                if not torch.equal(weight, self._before[layer.weight]):
                    changed[layer.weight] = weight
        for quantizer in activation_quantizers(self.graph_module):
            if not torch.equal(quantizer.step_size.nan_to_num(), self._ranges[quantizer.name].nan_to_num()):
                ranges[self._origins[quantizer.name]] = quantizer.step_size * quantizer.hi
        factors = {
            self._origins[quantizer.name]: value
            for node, quantizer in self._calls()
            if (value := self._factors(node)) is not None
        }
        for bias, mean in self._means.items():
            if bias in changed:
                changed[mean] = -changed.pop(bias)
        write_changes(self.parameters.destinations(changed), self._quantizers, ranges, factors)

    def _calls(self) -> list[tuple[fx.Node, AffineQuantizer]]:
        modules = dict(self.graph_module.named_modules())
        calls = [(n, modules[str(n.target)]) for n in self.graph_module.graph.nodes if n.op == "call_module"]
        return [(node, module) for node, module in calls if isinstance(module, AffineQuantizer)]

    def _factors(self, call: fx.Node) -> Tensor | None:
        """What an algorithm has put a multiplication by before a quantizer."""
        source = call.all_input_nodes[0]
        if source.target is not aten.mul.Tensor:
            return None
        operand = source.args[1]
        if not isinstance(operand, fx.Node) or operand.op != "get_attr" or str(operand.target) in self._before:
            return None
        return tensor_at(self.graph_module, str(operand.target))

    def _convert(self) -> None:
        graph = self.graph_module.graph
        nodes = [n for n in graph.nodes if n.target in QUANTIZE]
        _check_ranges(self.graph_module, nodes)
        ranges = {node: self._amax(node) for node in nodes}
        for node in nodes:
            node.update_arg(1, None)
        # Without what computes a range: that counts as no reader of a weight.
        graph.eliminate_dead_code()
        self.parameters.count_readings()
        for node, amax in ranges.items():
            source, path = node.args[0], path_of(node)
            assert isinstance(source, fx.Node)
            if is_constant(source):
                name = self._weight(node, path, amax)
                source = self._parameter(source, path)
            else:
                name = self._activations.get(path) or self._activation(node, path, amax)
                if path in self._quantizers:
                    self._activations[path] = name
            with graph.inserting_before(node):
                call = graph.call_module(name, (source,))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
        graph.eliminate_dead_code()

    def _parameter(self, node: fx.Node, path: str) -> fx.Node:
        """A constant as one parameter."""
        if node.op == "get_attr":
            return node
        name = add_parameter(self.graph_module, f"{path}_weight", evaluate(self.graph_module, node))
        leaf = next(n for n in self.graph_module.graph.nodes if n.op == "get_attr")
        with self.graph_module.graph.inserting_before(node):
            return get_attribute(self.graph_module, name, leaf)

    def _amax(self, node: fx.Node) -> Tensor:
        amax = node.args[1]
        if isinstance(amax, fx.Node):
            return evaluate(self.graph_module, amax).float()
        # A direct call of scaled_e4m3 without amax.
        return torch.full((), E4M3.max_value, device=value_of(node).device)

    def _weight(self, node: fx.Node, path: str, amax: Tensor) -> str:
        reason = self._reason(node, path, amax)
        if reason is not None:
            self.left[path] = reason
            name = self._free(path)
            return self._add(UnchangedWeightQuantizer(name, node.target, amax, tuple(node.args[2:])), path)  # type: ignore[arg-type]
        weight = tensor_at(self.graph_module, str(node.args[0].target))  # type: ignore[union-attr]
        block = _block_size(node, amax)
        axis = _axes(amax, weight.dim()) if block is None else [0]
        channels = weight.shape[axis[0]] if axis else 1
        quantizer = WeightQuantizer(
            self._free(path),
            int(node.args[2]),  # type: ignore[arg-type]
            axis[0] if axis else None,
            channels,
            block_size=block,
            inputs=weight.shape[-1],
        ).to(amax.device)
        if block is not None:
            largest = reduce_blocks(weight, block)
        else:
            largest = weight.abs().amax([d for d in range(weight.dim()) if d not in axis]) if weight.numel() else amax
        self._smaller += bool((amax.flatten() < 0.999 * largest.flatten()).any())
        step = amax.clamp(min=TINY_AMAX) / quantizer.bound
        quantizer.step_size.copy_(step.reshape(quantizer.step_size.shape))
        return self._add(quantizer, path)

    def _reason(self, node: fx.Node, path: str, amax: Tensor) -> str | None:
        """Why a weight cannot be improved; None where it can."""
        source, quantizer = node.args[0], self._quantizers.get(path)
        assert isinstance(source, fx.Node)
        readers = list(node.users)
        kind = kind_of(readers[0]) if len(readers) == 1 else None
        if kind not in WEIGHTED or readers[0].args[1] is not node:
            return "it is not of one convolution or linear alone"
        if quantizer is None:
            return "it is quantized by a direct call"
        if quantizer._learn_amax:
            return "its range is learned"
        if source.op != "get_attr":
            return "it is computed from other parameters"
        if not self.parameters.is_writable(str(source.target)):
            return "it is read more than once"
        bias = readers[0].args[2] if len(readers[0].args) > 2 else None
        if isinstance(bias, fx.Node) and not (bias.op == "get_attr" and self.parameters.is_writable(str(bias.target))):
            return "its bias is computed, or read more than once"
        if node.target is not FAKE_TENSOR_QUANT:
            return "it is E4M3"
        if node.args[3] or not 2 <= int(node.args[2]) <= 8:  # type: ignore[arg-type]
            return "it is unsigned" if node.args[3] else f"it has {node.args[2]} bits, and algorithms take 2 to 8"
        if _block_size(node, amax) is not None:
            return None if kind is Kind.LINEAR else "it has blocks, and is not of a linear"
        output = 1 if kind is Kind.TRANSPOSED_CONVOLUTION else 0
        if _axes(amax, rank_of(source)) not in ([], [output]):
            return "its amax is neither one nor one per output channel"
        return None

    def _activation(self, node: fx.Node, path: str, amax: Tensor) -> str:
        name, quantizer = self._free(path), self._quantizers.get(path)
        if node.target is not FAKE_TENSOR_QUANT or amax.numel() != 1 or int(node.args[2]) < 2:  # type: ignore[arg-type]
            return self._add(UnchangedQuantizer(name, node.target, amax, tuple(node.args[2:])), path)  # type: ignore[arg-type]
        fmt = IntFormat(int(node.args[2]), bool(node.args[3]), bool(node.args[4]))  # type: ignore[arg-type]
        affine = AffineQuantizer(name, int(fmt.lo), int(fmt.hi), symmetric=True, origin=path).to(amax.device)
        affine.step_size.copy_(amax.reshape(()).clamp(min=TINY_AMAX) / fmt.bound)
        affine.calibrated = True
        # Without a calibrator it has the range that its descriptor sets.
        affine.fixed = quantizer is None or bool(quantizer._learn_amax) or quantizer._calibrator is None
        return self._add(affine, path)

    def _free(self, path: str) -> str:
        return name_for(path, lambda name: has_path(self.graph_module, name))

    def _add(self, quantizer: AffineQuantizer | WeightQuantizer, path: str) -> str:
        self.graph_module.add_submodule(quantizer.name, quantizer)
        self._origins[quantizer.name] = path
        return quantizer.name

    def _give_biases(self) -> None:
        graph = self.graph_module.graph
        for node, layer in layers_of(self.graph_module).items():
            norm = next(iter(node.users))
            if layer.bias is not None or len(node.users) != 1 or not _is_norm(norm, node):
                continue
            mean = norm.args[3]
            if not isinstance(mean, fx.Node) or not self.parameters.is_writable(str(mean.target)):
                continue
            if kind_of(node) is Kind.LINEAR and rank_of(node) != 2:
                continue
            value = tensor_at(self.graph_module, str(mean.target))
            owner = layer.weight.rpartition(".")[0]
            bias = add_parameter(self.graph_module, f"{owner}.bias" if owner else "bias", -value)
            zero = add_parameter(self.graph_module, f"{mean.target}_zero", torch.zeros_like(value))
            with graph.inserting_before(node):
                node.args = (*node.args[:2], get_attribute(self.graph_module, bias, mean), *node.args[3:])
            with graph.inserting_before(norm):
                norm.update_arg(3, get_attribute(self.graph_module, zero, mean))
            self._means[bias] = str(mean.target)
        graph.eliminate_dead_code()


def _is_norm(norm: fx.Node, source: fx.Node) -> bool:
    outputs = [u for u in norm.users if u.target is operator.getitem and u.args[1] == 0]
    found = norm.target is aten._native_batch_norm_legit_no_training.default and norm.args[0] is source
    return found and len(outputs) == len(norm.users) == 1


def _check_ranges(graph_module: fx.GraphModule, nodes: list[fx.Node]) -> None:
    missing, broken = [], []
    for node in nodes:
        amax = node.args[1]
        if isinstance(amax, fx.Node) and not is_constant(amax):
            missing.append(path_of(node))
        elif isinstance(amax, fx.Node) and not bool(torch.isfinite(evaluate(graph_module, amax)).all()):
            broken.append(path_of(node))
    found = (("without amax", missing), ("with NaN or infinity as amax", broken))
    problems = [f"{what}: {', '.join(dict.fromkeys(paths))}" for what, paths in found if paths]
    if problems:
        raise CalibrationError(
            f"quantizers {'; '.join(problems)}. Calibrate the model (qdq.calibrating), or disable() these quantizers"
        )


def _block_size(node: fx.Node, amax: Tensor) -> int | None:
    """Of a quantizer whose blocks have an amax each; one amax for all of them is one of the tensor."""
    return block_size_of(node) if amax.dim() == 2 else None


def _axes(amax: Tensor, rank: int) -> list[int]:
    """Axes of a tensor of this rank along which amax differs."""
    return [rank - amax.dim() + i for i, size in enumerate(amax.shape) if size != 1] if amax.numel() != 1 else []


def _observer(found: Extremes, name: str) -> Any:
    def observe(x: Tensor) -> None:
        low, high, total = found.get(name, (0.0, 0.0, 0.0))
        if x.numel():
            least, most = x.aminmax()
            found[name] = min(low, float(least)), max(high, float(most)), total + float(x.double().abs().sum())

    return observe
