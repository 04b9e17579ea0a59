"""What algorithms have found is written into a model: all of it, or after an error nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import QdqError
from ..quantizer import TensorQuantizer


def write_changes(
    values: Sequence[tuple[Tensor, Tensor]],
    quantizers: Mapping[str, TensorQuantizer],
    ranges: Mapping[str, Tensor],
    factors: Mapping[str, Tensor],
) -> None:
    """Writes values over tensors, and into quantizers.

    Args:
        values: tensors of the model, and what they get.
        quantizers: by their paths.
        ranges: path -> largest magnitude, of which a quantizer with `scale_amax` gets its share.
        factors: path -> what the input is multiplied by, besides what it is multiplied by already.

    Raises:
        QdqError: a range or a factor that is not finite.
    """
    for path, value in (*ranges.items(), *factors.items()):
        if not bool(torch.isfinite(value).all()):
            raise QdqError(f"an algorithm gave {path!r} a range that is not finite; the model is as it was")
    writing = _Writing()
    # A tensor of inference mode could not be trained with later.
    with torch.inference_mode(False), torch.no_grad():
        try:
            for tensor, value in values:
                writing.over(tensor, value)
            for path, amax in ranges.items():
                factor = quantizers[path]._scale_amax
                writing.set(quantizers[path], "_amax", amax if factor is None else amax / float(factor))
            for path, value in factors.items():
                present = quantizers[path].pre_quant_scale
                writing.put(quantizers[path], "_pre_quant_scale", value if present is None else present * value)
        except BaseException:
            writing.undo()
            raise


class _Writing:
    """What has been written, with the way back."""

    def __init__(self) -> None:
        self.written: list[tuple[Tensor, Tensor]] = []
        self.buffers: list[tuple[TensorQuantizer, str, Tensor | None]] = []

    def over(self, tensor: Tensor, value: Tensor) -> None:
        self.written.append((tensor, tensor.detach().clone()))
        _copy(tensor, value)

    def set(self, quantizer: TensorQuantizer, name: str, value: Tensor) -> None:
        present = getattr(quantizer, name, None)
        if present is not None and present.numel() == value.numel():
            self.over(present, value)
        else:
            self.put(quantizer, name, value)

    def put(self, quantizer: TensorQuantizer, name: str, value: Tensor) -> None:
        old = getattr(quantizer, name, None)
        if old is not None:
            delattr(quantizer, name)
        quantizer.register_buffer(name, value.detach().float().clone())
        self.buffers.append((quantizer, name, old))

    def undo(self) -> None:
        for tensor, old in self.written:
            _copy(tensor, old)
        for quantizer, name, old in reversed(self.buffers):
            delattr(quantizer, name)
            if old is not None:
                quantizer.register_buffer(name, old)


def _copy(tensor: Tensor, value: Tensor) -> None:
    # What was made in inference mode can be written to there alone.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value.reshape(tensor.shape))
