"""Constants behind quantizers: their codes and step sizes, followed through operations that only move values."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..formats import E4M3, IntFormat
from ..graph.ops import REARRANGEMENTS, SPLITS
from ..kernels.reference import TINY_AMAX, affine_quantize, symmetric_quantize

aten = torch.ops.aten

_MOVES = REARRANGEMENTS | SPLITS | {aten.cat.default, operator.getitem}


@dataclasses.dataclass(frozen=True)
class CodedConstant:
    """A constant as codes.

    Attributes:
        name: of its quantizer.
        codes: int8, uint8 or float8_e4m3fn.
        step_size: float32, of the rank of the codes, 1 where they share it; with blocks [rows, blocks].
        origin: path of the `TensorQuantizer`.
        block_size: so many codes of a row of a matrix share a step size.
        stored_bits: 4 where a file may pack two codes into a byte.
    """

    name: str
    codes: Tensor
    step_size: Tensor
    origin: str
    block_size: int | None = None
    stored_bits: int = 8

    @property
    def axis(self) -> int | None:
        """The one axis along which step sizes differ, None where there is one step size; with blocks, of the rows."""
        if self.block_size is not None:
            return 0
        axes = [i for i, size in enumerate(self.step_size.shape) if size != 1]
        return axes[0] if axes else None

    @property
    def value(self) -> Tensor:
        """The dequantized constant, float32."""
        step = self.step_size
        if self.block_size is not None:
            step = step.repeat_interleave(self.block_size, 1)[:, : self.codes.shape[1]]
        return self.codes.float() * step

    @property
    def steps(self) -> Tensor:
        """The step sizes as ONNX takes them: of shape [channels], [rows, blocks], or 0-d."""
        if self.block_size is not None:
            return self.step_size
        return self.step_size.reshape(() if self.axis is None else (-1,))


def encode(
    name: str,
    origin: str,
    value: Tensor,
    amax: Tensor,
    num_bits: int | None,
    unsigned: bool,
    narrow_range: bool,
    block_size: int | None = None,
) -> CodedConstant:
    """The codes that `fake_tensor_quant` (`num_bits` of at most 8) or `scaled_e4m3` (None) gives a constant."""
    sizes = list(amax.shape) if amax.numel() > 1 else []
    amax = amax.float().reshape([1] * (value.dim() - len(sizes)) + sizes)
    tiny = amax.clamp(min=TINY_AMAX)
    if num_bits is None:
        step = tiny / torch.full_like(tiny, E4M3.max_value)
        codes = (value.float() / step).clamp(-E4M3.max_value, E4M3.max_value).to(torch.float8_e4m3fn)
        return CodedConstant(name, codes, step, origin)
    fmt = IntFormat(num_bits, unsigned, narrow_range)
    codes = symmetric_quantize(value.float(), amax, fmt, block_size)[0]
    dtype = torch.uint8 if float(codes.max() if codes.numel() else 0) > 127 else torch.int8
    step = tiny / torch.full_like(tiny, max(fmt.bound, 1))
    if block_size is None or amax.numel() == 1:
        return CodedConstant(name, codes.to(dtype), step, origin)
    return CodedConstant(name, codes.to(dtype), step, origin, block_size, 4 if num_bits + unsigned <= 4 else 8)


def requantized(constant: CodedConstant, step_size: Tensor) -> CodedConstant:
    """The constant with other step sizes, its codes rounded to them."""
    info = torch.iinfo(constant.codes.dtype)
    codes = affine_quantize(constant.value, step_size, torch.zeros_like(step_size), info.min, info.max)
    return dataclasses.replace(constant, codes=codes.to(constant.codes.dtype), step_size=step_size)


def moved(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """What a node makes of coded constants: a constant, a list of them (split), or None where it is no move."""
    sources = node.all_input_nodes
    if node.target not in _MOVES or not sources or any(n not in known for n in sources):
        return None
    if node.target is operator.getitem:
        parts = known[sources[0]]
        return parts[int(str(node.args[1]))] if isinstance(parts, list) else None
    first = known[sources[0]]
    if any(isinstance(known[n], list) or known[n].codes.dtype != first.codes.dtype for n in sources):
        return None
    if any(known[n].block_size is not None for n in sources):
        return None
    codes = _run(node, {n: known[n].codes.contiguous().view(torch.int8) for n in sources})
    steps = _run(node, {n: known[n].step_size.expand(known[n].codes.shape).contiguous() for n in sources})
    parts = []
    for code, step in zip(pytree.tree_leaves(codes), pytree.tree_leaves(steps), strict=True):
        step = _compressed(step)
        if sum(size != 1 for size in step.shape) > 1:
            return None
        parts.append(dataclasses.replace(first, codes=code.contiguous().view(first.codes.dtype), step_size=step))
    return parts if isinstance(codes, (list, tuple)) else parts[0]


def _run(node: fx.Node, values: dict[fx.Node, Tensor]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _compressed(step: Tensor) -> Tensor:
    """Step sizes without the repetitions along each axis."""
    for axis, size in enumerate(step.shape):
        if size > 1 and bool((step == step.narrow(axis, 0, 1)).all()):
            step = step.narrow(axis, 0, 1)
    return step.contiguous()
