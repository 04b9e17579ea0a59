"""What a file stores of weights and biases: codes with DequantizeLinear, or packed for MatMulNBits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..onnx_nodes import INT4_KEY, dequantize, matmul_nbits

if TYPE_CHECKING:
    import onnx_ir


class ConstantDequantizer(nn.Module):
    """Integer codes of a weight or bias that the file stores, and their DequantizeLinear.

    Args:
        name: of the quantizer.
        codes: int8, uint8, int32 or E4M3.
        step_size: 0-d, [channels], or [channels, blocks] with `block_size`.
        axis: of the codes, the channels; None for one step size.
        block_size: so many neighbours along the other axis of a matrix share a step size.
        stored_bits: 4 where the file packs two codes into a byte.
    """

    codes: Tensor
    step_size: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        name: str,
        codes: Tensor,
        step_size: Tensor,
        axis: int | None,
        block_size: int | None = None,
        stored_bits: int = 8,
    ) -> None:
        super().__init__()
        self.name, self.axis, self.block_size, self.stored_bits = name, axis, block_size, stored_bits
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("step_size", step_size.detach().float().clone())
        plain = block_size is None and stored_bits == 8
        self.register_buffer("zero_point", torch.zeros(step_size.shape, dtype=codes.dtype) if plain else None)

    def transposed(self) -> ConstantDequantizer:
        """The same of the transposed matrix."""
        axis = None if self.axis is None else 1 - self.axis
        return ConstantDequantizer(self.name, self.codes.t(), self.step_size, axis, self.block_size, self.stored_bits)

    def unsqueezed(self) -> ConstantDequantizer:
        """The same with a leading dimension of size 1; not with blocks."""
        assert self.block_size is None
        axis = None if self.axis is None else self.axis + 1
        return ConstantDequantizer(self.name, self.codes[None], self.step_size, axis, None, self.stored_bits)

    def forward(self) -> Tensor:
        """The constant as float32."""
        step, axis = self.step_size, self.axis
        if self.block_size is not None:
            assert axis is not None
            step = step.movedim(0, axis)
            axis = 1 - axis
        if torch.onnx.is_in_onnx_export():
            return dequantize(
                self.codes,
                step,
                self.zero_point,
                axis,
                self.name,
                block_size=self.block_size,
                stored_bits=self.stored_bits,
            )
        if self.block_size is not None:
            assert axis is not None
            step = step.repeat_interleave(self.block_size, axis).narrow(axis, 0, self.codes.shape[axis])
        elif axis is not None:
            step = step.reshape([-1 if i == axis else 1 for i in range(self.codes.dim())])
        return self.codes.float() * step


class PackedMatMul(nn.Module):
    """The product of an input with a constant matrix, as MatMulNBits of com.microsoft.

    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits

    Args:
        weight: codes of a matrix [inputs, outputs].
        block_size: of the packed matrix: that of the weight, or any power of two from 16 where it has none.
        accuracy_level: 4 rounds inputs to int8 in each block, 1 computes in float.
    """

    packed: Tensor
    step_size: Tensor

    def __init__(self, weight: ConstantDequantizer, block_size: int, accuracy_level: int) -> None:
        super().__init__()
        self.name = weight.name
        inputs, outputs = weight.codes.shape
        bits = weight.stored_bits
        rows = weight.codes.t().to(torch.int16) + 2 ** (bits - 1)
        blocks = F.pad(rows, (0, -inputs % block_size), value=2 ** (bits - 1)).to(torch.uint8)
        blocks = blocks.unflatten(1, (-1, block_size))
        if bits == 4:
            blocks = blocks[..., 0::2] | (blocks[..., 1::2] << 4)
        steps = weight.step_size
        if weight.block_size is None:
            steps = steps.reshape(-1, 1).expand(outputs, blocks.shape[1])
        self.register_buffer("packed", blocks.contiguous())
        self.register_buffer("step_size", steps.reshape(-1).contiguous())
        self.attributes = {
            "K": inputs, "N": outputs, "bits": bits, "block_size": block_size, "accuracy_level": accuracy_level
        }  # fmt: skip
        self.weight = (weight,)

    def forward(self, x: Tensor) -> Tensor:
        """x of shape [..., inputs] to [..., outputs]."""
        if torch.onnx.is_in_onnx_export():
            return matmul_nbits(x, self.packed, self.step_size, self.name, **self.attributes)
        return x @ self.weight[0]()


def store_int4(model: onnx_ir.Model) -> None:
    """Turns the int8 codes of DequantizeLinear nodes that are marked for it into INT4, two in a byte, in place."""
    import ml_dtypes
    import onnx_ir

    for node in model.graph.all_nodes():
        if node.metadata_props.pop(INT4_KEY, None) is None:
            continue
        codes = node.inputs[0]
        assert codes is not None and codes.const_value is not None
        if codes.dtype is onnx_ir.DataType.INT4:
            continue
        packed: Any = np.asarray(codes.const_value.numpy()).astype(ml_dtypes.int4)
        codes.const_value = onnx_ir.Tensor(packed, dtype=onnx_ir.DataType.INT4, name=codes.name)
        codes.dtype = onnx_ir.DataType.INT4
