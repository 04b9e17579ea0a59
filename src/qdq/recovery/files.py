"""What a rung of `qdq.recover` costs as deployed: the size of its file, and its latency beside the float model's."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .. import api
from ..analysis.latency import measure
from ..batches import Inputs, signature_of
from ..errors import QdqError, RuntimeMissingError
from ..graph.record import record_of
from ..graph.targets import ONNXRUNTIME, Target

logger = logging.getLogger("qdq.recovery")

# Rounds of about 50 ms for each of two files: the median of their ratio needs no more.
_ROUNDS = 7


class DeployedFiles:
    """Exports models to a folder and measures the files.

    Args:
        model: in float.
        example: of its inputs: the float model is captured with it; one sample of it is what is timed.
        target: only ONNX Runtime is timed.
        folder: for the files; what is in it may be replaced.
        dynamic_shapes: of the float model's file, as for `api.export_onnx`.

    Attributes:
        float_size: bytes of the float model's file; None before the first measurement, or where it has none.
    """

    def __init__(
        self, model: nn.Module, example: Inputs, target: Target, folder: Path, dynamic_shapes: Any = None
    ) -> None:
        self.float_size: int | None = None
        self._model, self._example, self._target, self._folder = model, example, target, folder
        self._dynamic_shapes = dynamic_shapes
        self._float: Path | None = None
        self._float_fails = self._missing = False

    def measure(self, quantized: fx.GraphModule) -> tuple[int | None, float | None]:
        """Size of the model's file in bytes, and its latency over the float model's; None for what cannot be known.

        Raises:
            ExportError: the quantized model cannot be exported.
        """
        if self._missing:
            return None, None
        try:
            file = api.export_onnx(quantized, self._folder / "quantized.onnx")
        except RuntimeMissingError as error:
            self._missing = True
            logger.info("neither size nor latency is measured: %s", error)
            return None, None
        reference = self._float_file()
        return _size_of(file), None if reference is None else self._ratio(quantized, file, reference)

    def _ratio(self, quantized: fx.GraphModule, file: Path, reference: Path) -> float | None:
        if self._target.name != ONNXRUNTIME.name:
            return None
        contract, inputs = record_of(quantized).contract, self._example
        if contract.divisible:
            inputs = pytree.tree_map_only(Tensor, lambda x: x[:1], inputs)
        arrays = [x.detach().cpu().numpy() for x in contract.flatten(inputs) if isinstance(x, Tensor)]
        try:
            ratio = measure(file, reference, arrays, 1, None, _ROUNDS, False).ratio
        except QdqError as error:
            logger.info("latency is not measured: %s", error)
            return None
        return None if ratio is None else 1 / ratio

    def _float_file(self) -> Path | None:
        if self._float is None and not self._float_fails:
            args, kwargs = self._example
            example: Any = _by_name(signature_of(self._model.forward), self._example) if kwargs else args
            try:
                self._float = api.export_onnx(
                    self._model,
                    self._folder / "float.onnx",
                    example_inputs=example,
                    dynamic_shapes=self._dynamic_shapes,
                )
                self.float_size = _size_of(self._float)
            except QdqError as error:
                self._float_fails = True
                logger.info("latency is not measured, as the float model cannot be exported: %s", error)
        return self._float


def _by_name(signature: inspect.Signature, inputs: Inputs) -> dict[str, Any]:
    """All inputs as keywords, those that `forward` takes in its `**` among them."""
    bound = signature.bind(*inputs[0], **inputs[1])
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        free = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        named |= value if free else {name: value}
    return named


def _size_of(file: Path) -> int:
    """Bytes, with those of the tensors beside it where they did not fit in."""
    beside = file.with_name(f"{file.name}.data")
    return file.stat().st_size + (beside.stat().st_size if beside.exists() else 0)
