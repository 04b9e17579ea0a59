"""What the commands check before the long work begins, and the small steps between the calls."""

from __future__ import annotations

import math
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
        UsageError: an unknown target, or a recipe that is missing or malformed or that no model can be deployed by.
    """
    from qdq.deployable import check_for_target
    from qdq.errors import RecipeError
    from qdq.graph.targets import find_target

    try:
        chosen, rules = find_target(target), qdq.Recipe() if recipe is None else qdq.Recipe.load(recipe)
        check_for_target(rules, chosen)
        return chosen.name, rules
    except RecipeError as error:
        raise UsageError(str(error)) from error


def check_decibels(argument: str, value: float) -> None:
    """Raises UsageError if the value of an option is not a number, which nothing is above."""
    if math.isnan(value):
        raise UsageError(f"{argument} must be a number, not {value}")


def check_writable(path: Path, *endings: str) -> None:
    """Raises UsageError if ``path`` cannot become a file: found out before the model is calibrated, not after.

    Args:
        path: of an ONNX file, or of one with one of these endings.
        endings: where it is none of an ONNX file.
    """
    from qdq.atomic_file import obstacle

    reason = obstacle(path)
    if reason is not None:
        raise UsageError(f"cannot write {path}: {reason}")
    if endings and path.suffix not in endings:
        raise UsageError(f"{path}: its name must end in {' or '.join(endings)}")
    if not endings and path.suffix != ".onnx":
        raise UsageError(f"{path}: the name of an ONNX file must end in .onnx")


def resulting_recipe(qmodel: torch.nn.Module, given: qdq.Recipe, path: Path | None) -> str:
    """Writes the recipe that a model was quantized by, if a path is given, and says in a line where it is."""
    from qdq.atomic_file import replaced_at_once

    found = qdq.explain(qmodel).recipe
    assert found is not None
    tuned = f"tuned: {len(found.exclude)} patterns are left in float; " if given.tune else ""
    if path is None:
        return f"{tuned}--save-recipe FILE keeps this recipe, as another run may measure otherwise"
    with replaced_at_once(path) as temporary:
        temporary.write_text(found.to_yaml(), encoding="utf-8")
    return f"{tuned}saved to {path}, with which the file can be made and verified again"


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
