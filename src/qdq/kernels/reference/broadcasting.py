"""Which dtype inputs are computed in, and how the parameters of quantization spread over them."""

from __future__ import annotations

import torch
from torch import Tensor

_COMPUTE_DTYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that inputs of ``dtype`` are computed in.

    Raises:
        TypeError: ``dtype`` is none of float16, bfloat16, float32, float64.
    """
    try:
        return _COMPUTE_DTYPES[dtype]
    except KeyError:
        raise TypeError(
            f"inputs must be float16, bfloat16, float32 or float64 to be quantized, got {dtype}; convert them first"
        ) from None


def _fits(shape: torch.Size, target: tuple[int, ...]) -> bool:
    if len(shape) > len(target):
        return False
    sizes = target[len(target) - len(shape) :]
    return all(have == 1 or have == want for have, want in zip(shape, sizes, strict=True))


def check_broadcast(inputs: Tensor, parameter: Tensor, name: str) -> Tensor:
    """``parameter``, ready to broadcast to ``inputs`` (a single value of any rank becomes 0-d).

    Raises:
        ValueError: it does not broadcast to the shape of ``inputs``.
    """
    if parameter.dim() > inputs.dim() and parameter.numel() == 1:
        return parameter.reshape(())
    if not _fits(parameter.shape, inputs.shape):
        raise ValueError(
            f"{name} of shape {tuple(parameter.shape)} does not broadcast to inputs of shape {tuple(inputs.shape)}"
        )
    return parameter


def expand_blocks(inputs: Tensor, parameter: Tensor, block_size: int | None, name: str) -> Tensor:
    """``parameter`` with one value per block of ``block_size`` along the last axis, ready to broadcast to ``inputs``.

    It has the shape ``inputs.shape[:-1] + (ceil(n / block_size),)``, n the size of the last axis, or broadcasts to it.
    The last block may be short. Without ``block_size`` this is :func:`check_broadcast`.

    Raises:
        ValueError: it does not broadcast to the blocks; ``block_size`` is below 1.
    """
    if block_size is None:
        return check_broadcast(inputs, parameter, name)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if parameter.dim() > inputs.dim() and parameter.numel() == 1:
        return parameter.reshape(())
    size = inputs.shape[-1] if inputs.dim() else 1
    blocks = (*inputs.shape[:-1], (size + block_size - 1) // block_size) if inputs.dim() else ()
    if not _fits(parameter.shape, blocks):
        raise ValueError(
            f"{name} of shape {tuple(parameter.shape)} does not broadcast to the blocks of shape {tuple(blocks)}: "
            f"inputs of shape {tuple(inputs.shape)} with block_size={block_size}"
        )
    if parameter.dim() == 0 or parameter.shape[-1] == 1:
        return parameter
    return parameter.repeat_interleave(block_size, dim=-1)[..., :size]
