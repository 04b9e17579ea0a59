"""What the commands check before the long work begins, and the small steps between the calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qdq
from qdq._cli.errors import CommandError, UsageError, require
from qdq._cli.scoring import predict_with_onnxruntime, predict_with_torch, score

if TYPE_CHECKING:
    import torch


def check_packages(target: str = "onnxruntime") -> None:
    """Raises CommandError unless the packages that export, verify and benchmark need are there."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx", "this command")
    if target == "openvino":
        require("openvino", "openvino", "verifying a file for OpenVINO")


def check_demo() -> None:
    """Raises CommandError unless scikit-learn, whose wheel carries the digits, is there."""
    require("sklearn", "demo", "the demo")


def target_and_recipe(target: str, recipe: Path | None) -> tuple[str, qdq.Recipe]:
    """The target's name and the recipe, both known to be valid.

    Raises:
        UsageError: an unknown target, or a recipe file that is missing or malformed.
    """
    from qdq.errors import RecipeError
    from qdq.graph.targets import find_target

    try:
        return find_target(target).name, qdq.Recipe() if recipe is None else qdq.Recipe.load(recipe)
    except RecipeError as error:
        raise UsageError(str(error)) from error


def check_writable(path: Path) -> None:
    """Raises UsageError if ``path`` cannot become a file: found out before the model is calibrated, not after."""
    folder = path.parent
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise UsageError(f"cannot write {path}: permission denied")
    if path.suffix != ".onnx":
        raise UsageError(f"{path}: the name of an ONNX file must end in .onnx")


def check_readable(path: Path) -> None:
    """Raises UsageError unless ``path`` is a file."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}")


def in_eval_mode(model: torch.nn.Module) -> torch.nn.Module:
    """The model in evaluation mode; a module out of a ``.pt2`` file has the mode it was exported in."""
    try:
        return model.eval()
    except NotImplementedError:
        return model


def first_batch(batches: Iterable[Any]) -> Any:
    """The first batch, which shows an exporter the shapes of the inputs."""
    for batch in batches:
        return batch
    raise CommandError("the data hold no batch")


def scores(scorer: Callable[..., Any], spec: str, model: torch.nn.Module, path: Path) -> dict[str, float]:
    """The user's score of the float model in PyTorch and of the file in ONNX Runtime."""
    return {
        "fp32 (PyTorch)": score(scorer, spec, predict_with_torch(model)),
        f"{path.name} (ONNX Runtime)": score(scorer, spec, predict_with_onnxruntime(path)),
    }
