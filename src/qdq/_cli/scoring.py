"""``--eval file.py:function``: the user's own score of a model, asked in PyTorch and in ONNX Runtime alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdq._cli.errors import CommandError, require
from qdq._cli.factories import call

if TYPE_CHECKING:
    import torch

Predict = Callable[..., Any]


def score(function: Callable[[Predict], Any], spec: str, predict: Predict) -> float:
    """``function(predict)`` as a finite float.

    Raises:
        CommandError: the function raised, or returned something else than a finite number.
    """
    value = call(function, spec, predict, argument="--eval")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise CommandError(f"--eval {spec!r} returned a {type(value).__name__}, not a number") from None
    if not math.isfinite(number):
        raise CommandError(f"--eval {spec!r} returned {number}")
    return number


def predict_with_torch(model: torch.nn.Module) -> Predict:
    """Runs the float model in inference mode; takes tensors or arrays, returns what the model returns."""
    import torch

    def predict(*args: Any, **kwargs: Any) -> Any:
        inputs = [torch.as_tensor(value) for value in args]
        named = {name: torch.as_tensor(value) for name, value in kwargs.items()}
        with torch.inference_mode():
            return model(*inputs, **named)

    return predict


def predict_with_onnxruntime(path: Path, *, threads: int | None = None) -> Predict:
    """Runs an ONNX file on the CPU; takes tensors or arrays by position or by name.

    Returns one tensor, or a tuple of them where the model has several outputs.
    """
    require("onnxruntime", "onnx", "running an ONNX file")
    import numpy as np
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def predict(*args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):
            raise CommandError(f"predict takes the model's {len(names)} inputs {names}, got {len(args)}")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        unknown = [name for name in given if name not in names]
        if unknown:
            raise CommandError(f"predict: the model has no input {unknown[0]!r}; its inputs are {names}")
        feed = {name: np.ascontiguousarray(torch.as_tensor(value).numpy()) for name, value in given.items()}
        outputs = [torch.from_numpy(value) for value in session.run(None, feed)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return predict
