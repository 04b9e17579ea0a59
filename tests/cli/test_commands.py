"""Each command on a tiny model: what it prints, what it leaves, and the exit code of every way to fail."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import qdq
from qdq._cli.scoring import predict_with_onnxruntime, score

from .conftest import Deployed


def fails(result: Any, code: int, *texts: str) -> None:
    """The command ended with this code and one line on stderr that holds these texts."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("qdq: error:")]
    assert len(lines) == 1, result.stderr
    for text in texts:
        assert text in lines[0]


def test_quantize_does_the_whole_job(deployed: Deployed) -> None:
    result = deployed.result
    assert result.exit_code == 0, result.output
    assert f"VERIFIED {deployed.int8}" in result.stdout
    assert "scored by the user's own function" in result.stdout
    assert "fp32 (PyTorch)" in result.stdout
    assert "net.int8.onnx (ONNX Runtime)" in result.stdout
    assert "[torch.onnx]" not in result.output
    for path in (deployed.int8, deployed.fp32):
        onnx.checker.check_model(str(path))
    assert sorted(path.name for path in deployed.int8.parent.iterdir()) == ["net.fp32.onnx", "net.int8.onnx"]


def test_the_file_computes_what_the_model_does(deployed: Deployed) -> None:
    image = torch.randn(5, 1, 8, 8)
    expected = predict_with_onnxruntime(deployed.fp32)(image)
    got = predict_with_onnxruntime(deployed.int8)(image)
    assert got.shape == expected.shape == (5, 4)
    assert (got - expected).norm() < 0.1 * expected.norm()


def test_inspect_tells_quantized_from_float(run: Any, deployed: Deployed) -> None:
    result = run("inspect", deployed.int8)
    assert result.exit_code == 0, result.output
    for text in ("uint8", "int8", "per channel (axis 0)", "Conv", "weights", "biases", "activations"):
        assert text in result.stdout
    float_result = run("inspect", deployed.fp32)
    assert float_result.exit_code == 0
    assert "0 quantized" in float_result.stdout
    assert "Conv" in float_result.stdout


def test_verify_makes_the_simulation_again(run: Any, user: Any, deployed: Deployed) -> None:
    result = run(
        "verify", user("make"), deployed.int8, "--data", user("labelled"), "--on", user("batches"), "--per-tensor"
    )
    assert result.exit_code == 0, result.output
    assert "VERIFIED" in result.stdout
    assert "per tensor" in result.stdout


def test_verify_finds_another_models_file(run: Any, user: Any, deployed: Deployed) -> None:
    result = run("verify", user("make_other"), deployed.int8, "--data", user("batches"))
    fails(result, 1, "NOT VERIFIED", "below --min-sqnr 30 dB")
    result = run("verify", user("make_other"), deployed.int8, "--data", user("batches"), "--min-sqnr", "nan")
    fails(result, 2, "--min-sqnr must be a number, not nan")


def test_benchmark(run: Any, deployed: Deployed) -> None:
    result = run(
        "benchmark", deployed.int8, "--against", deployed.fp32, "--batch-size", 2, "--threads", 1, "--rounds", 2
    )
    assert result.exit_code == 0, result.output
    assert "net.int8.onnx" in result.stdout
    assert "net.fp32.onnx" in result.stdout
    assert "ms" in result.stdout


def test_version_and_help(run: Any) -> None:
    assert run("--version").stdout.strip() == f"qdq {qdq.__version__}"
    text = run("--help").stdout
    for command in ("quantize", "verify", "benchmark", "inspect", "demo", "doctor"):
        assert command in text
    assert "run that code" in " ".join(run("quantize", "--help").stdout.replace("│", " ").split())


@pytest.mark.parametrize(
    ("change", "code", "texts"),
    [
        ({"model": "nonsense"}, 2, ("MODEL 'nonsense'",)),
        ({"model": "user:value"}, 2, ("returned a int",)),
        ({"data": "none.npy"}, 2, ("no such file or folder",)),
        ({"data": "user:nothing"}, 1, ("batch",)),
        ({"data": "user:with_nan"}, 1, ("NaN",)),
        ({"data": "user:wrong_shape"}, 1, ()),
        ({"--target": "abacus"}, 2, ("unknown target 'abacus'", "onnxruntime")),
        ({"--recipe": "none.yaml"}, 2, ("none.yaml",)),
        ({"--eval": "user:no_such_name"}, 2, ("--eval", "no_such_name")),
        ({"--mean": "a,b"}, 2, ("--mean",)),
        ({"--output": "no/such/folder/out.onnx"}, 2, ("the folder 'no/such/folder' does not exist",)),
        ({"--output": "."}, 2, ("it is a folder",)),
        ({"--output": "out.txt"}, 2, ("must end in .onnx",)),
        ({"--fp32": "out.onnx"}, 2, ("name the same file",)),
        ({"--save-recipe": "out.toml"}, 2, ("must end in .yaml or .yml",)),
        ({"--save-recipe": "no/such/folder/r.yaml"}, 2, ("the folder 'no/such/folder' does not exist",)),
    ],
)
def test_quantize_refuses(
    run: Any, user: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], code: int, texts: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"model": "user:make", "data": "user:batches", "--output": "out.onnx", **change}
    given = {key: user(value[5:]) if value.startswith("user:") else value for key, value in given.items()}
    options = [part for key, value in given.items() if key.startswith("--") for part in (key, value)]
    fails(run("quantize", given["model"], "--data", given["data"], *options), code, *texts)
    assert list(tmp_path.iterdir()) == []


def test_recipe_with_an_unknown_key(run: Any, user: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("wieghts: {}\n")
    result = run("quantize", user("make"), "--data", user("batches"), "-o", tmp_path / "out.onnx", "--recipe", recipe)
    fails(result, 2, "wieghts")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("calibration: é".encode("latin-1"), "is not text in UTF-8"),
        (b"a: 2024-13-45", "not valid YAML"),
        (b"1: a\nb: c", "unknown key"),
        (b"algorithms: [adarond]", "unknown algorithm 'adarond'"),
        (b"weights: {num_bits: 9}", "from 2 to 8"),
    ],
)
def test_a_recipe_of_no_use_is_told_before_the_data_are_read(
    run: Any, user: Any, tmp_path: Path, content: bytes, text: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    arguments = ("--data", user("nothing"), "-o", tmp_path / "out.onnx", "--recipe", recipe)
    fails(run("quantize", user("make"), *arguments), 2, text)
    fails(run("quantize", user("make"), *arguments, "--save-recipe", recipe), 2)


def test_a_recipe_to_tune_for_another_target_is_a_usage_error(run: Any, user: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tune: latency\n")
    arguments = ("--data", user("nothing"), "-o", tmp_path / "out.onnx", "--recipe", recipe)
    fails(run("quantize", user("make"), *arguments, "--target", "tensorrt"), 2, "needs target 'onnxruntime'")
    fails(run("quantize", user("make"), *arguments, "--save-recipe", recipe), 2, "name the same file")


def test_the_recipe_that_tuning_found_makes_the_file_again(run: Any, user: Any, tmp_path: Path) -> None:
    recipe, saved, file = tmp_path / "recipe.yaml", tmp_path / "saved.yaml", tmp_path / "out.onnx"
    recipe.write_text("tune: latency\ncalibration: max\nalgorithms: []\n")
    data = ("--data", user("batches"))
    result = run("quantize", user("make"), *data, "-o", file, "--recipe", recipe, "--save-recipe", saved)
    assert result.exit_code == 0, result.output
    assert "tuned: " in result.stdout and f"saved to {saved}" in result.stdout
    found = qdq.Recipe.load(saved)
    assert found.tune is None and found.calibration == "max"
    fails(run("verify", user("make"), file, *data, "--recipe", recipe), 2, "has tune: latency", "--save-recipe")
    again = tmp_path / "again.onnx"
    result = run("quantize", user("make"), *data, "-o", again, "--recipe", saved)
    assert result.exit_code == 0 and "recipe  " not in result.stdout, result.output
    assert again.read_bytes() == file.read_bytes()
    assert run("verify", user("make"), file, *data, "--recipe", saved).exit_code == 0


def test_a_tuned_recipe_that_is_not_kept_is_told(run: Any, user: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tune: latency\ncalibration: max\nalgorithms: []\n")
    result = run("quantize", user("make"), "--data", user("batches"), "-o", tmp_path / "out.onnx", "--recipe", recipe)
    assert result.exit_code == 0, result.output
    assert "--save-recipe FILE keeps this recipe, as another run may measure otherwise" in result.stdout


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_unwritable_folder(run: Any, user: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = run("quantize", user("make"), "--data", user("batches"), "-o", tmp_path / "out.onnx")
    fails(result, 2, "permission denied")


def test_a_missing_option_is_a_usage_error(run: Any, user: Any) -> None:
    assert run("quantize", user("make")).exit_code == 2
    assert run("quantize", user("make"), "--no-such-option").exit_code == 2
    assert run("no-such-command").exit_code == 2


@pytest.mark.parametrize("command", ["inspect", "benchmark"])
def test_commands_on_a_missing_file(run: Any, command: str) -> None:
    fails(run(command, "none.onnx"), 2, "no such file: none.onnx")


def test_inspect_on_something_else(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("this is no model")
    fails(run("inspect", path), 2, "is not an ONNX model")
    path.write_bytes(b"")
    fails(run("inspect", path), 2, "is not an ONNX model")


def test_verify_needs_the_file(run: Any, user: Any) -> None:
    fails(run("verify", user("make"), "none.onnx", "--data", user("batches")), 2, "no such file: none.onnx")


def test_debug_shows_the_traceback(run: Any) -> None:
    result = run("inspect", "none.onnx", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "qdq: error: no such file" in result.stderr


@pytest.mark.parametrize("command", ["quantize", "benchmark", "verify"])
def test_a_missing_extra_is_named_before_the_work(
    run: Any, user: Any, deployed: Deployed, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    arguments = {
        "quantize": (user("make"), "--data", user("batches"), "-o", "out.onnx"),
        "verify": (user("make"), deployed.int8, "--data", user("batches")),
        "benchmark": (deployed.int8,),
    }
    fails(run(command, *arguments[command]), 1, "needs onnxruntime", "pip install 'qdq[onnx]'")


def test_openvino_is_asked_for_when_it_is_the_target(
    run: Any, user: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    out = tmp_path / "out.onnx"
    result = run("quantize", user("make"), "--data", user("batches"), "-o", out, "--target", "openvino")
    fails(result, 1, "needs openvino", "pip install 'qdq[openvino]'")


def test_a_pt2_file_and_an_array(run: Any, tmp_path: Path) -> None:
    from .user_code import batches, make

    model, data, out = tmp_path / "net.pt2", tmp_path / "data.npy", tmp_path / "out.onnx"
    images = torch.cat(list(batches()))
    dynamic = {"image": {0: torch.export.Dim.DYNAMIC}}
    torch.export.save(torch.export.export(make().eval(), (images[:2],), dynamic_shapes=dynamic), str(model))
    np.save(data, images.numpy())
    result = run("quantize", model, "--data", data, "-o", out, "--batch-size", 5, "--target", "tensorrt")
    assert result.exit_code == 0, result.output
    assert "24 samples" in result.stdout
    assert "VERIFIED" in result.stdout


def test_inspect_without_onnx(run: Any, deployed: Deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    fails(run("inspect", deployed.int8), 1, "needs onnx", "pip install 'qdq[onnx]'")


def test_demo_without_scikit_learn(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    fails(run("demo"), 1, "needs scikit-learn", "pip install 'qdq[demo]'")


def test_scores_by_name(user: Any, deployed: Deployed) -> None:
    from .user_code import by_name

    assert score(by_name, "spec", predict_with_onnxruntime(deployed.int8, threads=1)) == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_a_number", "returned a str, not a number"),
        ("infinite", "returned inf"),
        ("two_inputs", "predict takes the model's 1 inputs"),
    ],
)
def test_scores_that_are_none(deployed: Deployed, name: str, message: str) -> None:
    from qdq._cli.errors import CommandError

    from . import user_code

    with pytest.raises(CommandError, match=message):
        score(getattr(user_code, name), "spec", predict_with_onnxruntime(deployed.int8))
    with pytest.raises(CommandError, match="has no input 'picture'"):
        predict_with_onnxruntime(deployed.int8)(picture=np.zeros((1, 1, 8, 8), np.float32))
