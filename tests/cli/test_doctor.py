"""`qdq doctor`: what it finds here, and what it says of other engines and installations."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.text import Text

import qdq
from qdq._cli import doctor
from qdq._cli.errors import CommandError, UsageError
from qdq.analysis import environment
from qdq.analysis.environment import EngineFailure, Environment, Gpu, Package
from qdq.analysis.int8_speed import expectations
from qdq.kernels import engine, native
from qdq.kernels.engine import EngineStatus

NATIVE = EngineStatus(
    requested=None,
    cpu="native",
    cpu_reason="it is there and this processor runs it",
    library="/somewhere/libqdq.so",
    level="x86-64-v3",
    openmp=True,
    cuda="none",
    cuda_reason="PyTorch is built without CUDA",
)
WITHOUT_LIBRARY = dataclasses.replace(
    NATIVE, cpu="reference", cpu_reason="the compiled kernels are missing", library=None, level=None, openmp=False
)


@pytest.fixture(autouse=True)
def _no_forced_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QDQ_ENGINE", "QDQ_LIBRARY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def here() -> Environment:
    return environment.collect()


def printed(found: Environment, *, terminal: bool = False, encoding: str = "utf-8", width: int = 160) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    console = Console(file=stream, highlight=False, width=width, force_terminal=terminal, no_color=True)
    doctor.show(console, found, expectations(found))
    return raw.getvalue().decode(encoding)


def lines_of(found: Environment, subject: str) -> list[doctor.Line]:
    return [line for line in doctor.lines(found) if line.subject == subject]


# What is found


def test_what_is_found_here(here: Environment) -> None:
    assert here.torch.version == torch.__version__
    assert here.torch.build == ("cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu")
    assert here.torch.threads == torch.get_num_threads()
    assert here.python.version == sys.version.split()[0]
    import onnxruntime

    assert here.packages["onnxruntime"].version == onnxruntime.__version__
    assert here.packages["onnxruntime"].providers == tuple(onnxruntime.get_available_providers())
    assert bool(here.gpus) is torch.cuda.is_available()


def test_without_onnxruntime(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("onnxruntime", "onnxscript", "openvino", "sklearn"):
        monkeypatch.setitem(sys.modules, module, None)
    result = run("doctor")
    assert result.exit_code == 0, result.output
    text = result.stdout
    for name, extra in (("onnxruntime", "onnx"), ("onnxscript", "onnx")):
        assert f"missing  {name:13} not installed: pip install 'qdq[{extra}]'" in text
    assert "note     openvino      not installed: pip install 'qdq[openvino]'" in text
    assert "note     scikit-learn  not installed: pip install 'qdq[demo]'" in text


def test_an_onnxruntime_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libsomething.so:\\n  cannot open')\n")
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.syspath_prepend(tmp_path)
    found = environment.collect()
    assert found.packages["onnxruntime"].error == "OSError: libsomething.so: cannot open"
    (line,) = lines_of(found, "onnxruntime")
    assert line.level == "missing"
    assert "cannot be imported: OSError: libsomething.so" in line.text


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_a_folder_is_not_a_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tensorrt").mkdir()
    assert not environment.collect().packages["tensorrt"].installed
    # A package without a distribution; it is not imported.
    (tmp_path / "tensorrt" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    importlib.invalidate_caches()
    found = environment.collect().packages["tensorrt"]
    assert found == Package(installed=True, version=None)
    assert doctor._package("tensorrt", found).text == "installed, version unknown"


def test_packages_as_lines() -> None:
    one = Package(installed=True, version="10.1")
    assert doctor._package("tensorrt", one) == doctor.Line("ok", "tensorrt", "10.1")
    none = Package(installed=False, version=None)
    assert doctor._package("tensorrt", none).level == "note"


def test_a_driver_that_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> bool:
        warnings.warn("the driver is too\nold", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warn)
    found = environment.collect()
    assert (found.gpus, found.gpu_note) == ((), "the driver is too old")


def test_gpus_of_other_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Any GPU", total_memory=2**34, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    found = environment.collect()
    assert (found.torch.build, found.torch.toolkit) == ("cuda", "13.0")
    assert found.gpus == (Gpu("Any GPU", 2**34, "9.0"),) * 2
    assert "CUDA build (13.0)" in lines_of(found, "torch")[0].text
    monkeypatch.setattr(torch.version, "hip", "6.4")
    found = environment.collect()
    assert found.torch.build == "rocm"
    assert found.gpus[0].compute_capability is None

    def fail(_: int) -> None:
        raise RuntimeError("CUDA error: out of\nmemory")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    assert environment.collect().gpu_note == "PyTorch cannot use its GPU: CUDA error: out of memory"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "look at its driver" in str(environment.collect().gpu_note)


# The engine


def test_the_compiled_library(here: Environment) -> None:
    found = dataclasses.replace(here, engine=NATIVE, engine_failure=None, variables={})
    first, second = lines_of(found, "kernels")
    assert first.level == "ok"
    for part in ("compiled kernels", "x86-64-v3", "OpenMP", "/somewhere/libqdq.so", NATIVE.cpu_reason):
        assert part in first.text
    assert NATIVE.cuda_reason in second.text
    serial = dataclasses.replace(found, engine=dataclasses.replace(NATIVE, openmp=False))
    assert "no OpenMP" in lines_of(serial, "kernels")[0].text


def test_how_to_get_the_compiled_library(here: Environment) -> None:
    found = dataclasses.replace(here, engine=WITHOUT_LIBRARY, engine_failure=None, variables={})
    first, *_, last = lines_of(found, "kernels")
    assert "reference engine" in first.text
    assert "the compiled kernels are missing" in first.text
    assert (first.level, last) == ("note", doctor.Line("note", "kernels", doctor.BUILD))
    assert "C++ compiler" in doctor.BUILD
    assert "pip install" in doctor.BUILD
    # Nothing to build where the reference was asked for.
    forced = dataclasses.replace(found, engine=dataclasses.replace(WITHOUT_LIBRARY, requested="reference"))
    texts = [line.text for line in lines_of(forced, "kernels")]
    assert doctor.BUILD not in texts
    assert any("QDQ_ENGINE=reference forces this" in text for text in texts)


@pytest.fixture
def engine_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Sets variables that the engine reads once a process; it reads them again inside and after the test."""

    def forget() -> None:
        native.library.cache_clear()
        engine._choice.forget()

    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


def refused(run: Any, code: int, *texts: str) -> None:
    """The report stands on stdout, and one line on stderr says why the engine does not run."""
    for option in ((), ("--json",)):
        result = run("doctor", *option)
        assert result.exit_code == code, result.output
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("qdq: error: QDQ_ENGINE")
        for text in texts:
            assert text in result.stderr
        assert "Check with" not in result.output
        assert "onnxruntime" in result.stdout
    report = json.loads(result.stdout)
    assert report["engine"] is None
    assert report["engine_failure"]["message"] in result.stderr
    assert report["engine_failure"]["kind"] == ("unknown" if code == 2 else "unavailable")


def test_no_compiled_kernels_for_who_asks_for_them(run: Any, engine_variables: pytest.MonkeyPatch) -> None:
    engine_variables.setenv("QDQ_ENGINE", "cpu")
    engine_variables.setenv("QDQ_LIBRARY", "")
    refused(run, 1, "QDQ_ENGINE=cpu", "QDQ_LIBRARY is empty")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the engine may run here")
def test_no_gpu_for_who_asks_for_triton(run: Any, engine_variables: pytest.MonkeyPatch) -> None:
    engine_variables.setenv("QDQ_ENGINE", "cuda")
    refused(run, 1, "QDQ_ENGINE=cuda", "no GPU")


def test_an_engine_that_nobody_knows(run: Any, engine_variables: pytest.MonkeyPatch) -> None:
    engine_variables.setenv("QDQ_ENGINE", "abacus")
    refused(run, 2, "abacus", "reference, cpu, cuda")


def test_hidden_kernels(run: Any, engine_variables: pytest.MonkeyPatch) -> None:
    engine_variables.setenv("QDQ_LIBRARY", "")
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "reference engine (plain PyTorch) for CPU tensors" in result.stdout
    assert "QDQ_LIBRARY= names the compiled kernels; unset it" in result.stdout


def test_an_engine_that_breaks(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down() -> EngineStatus:
        raise AttributeError("libqdq.so: undefined\nsymbol: any")

    monkeypatch.setattr(engine, "status", break_down)
    result = run("doctor")
    assert result.exit_code == 1
    assert result.stderr == "qdq: error: AttributeError: libqdq.so: undefined symbol: any\n"
    assert "kernels       AttributeError: libqdq.so: undefined symbol: any" in result.stdout


def test_an_engine_that_runs_as_asked(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (
        dataclasses.replace(NATIVE, requested="cpu"),
        dataclasses.replace(WITHOUT_LIBRARY, requested="cuda", cuda="triton", cuda_reason="Triton 3.5"),
        dataclasses.replace(WITHOUT_LIBRARY, requested="reference"),
    )
    for status in asked:
        monkeypatch.setattr(engine, "status", lambda status=status: status)
        result = run("doctor")
        assert result.exit_code == 0, result.output
        assert f"QDQ_ENGINE={status.requested} forces this" in result.stdout


def test_check_engine(here: Environment) -> None:
    doctor.check_engine(dataclasses.replace(here, engine_failure=None))
    with pytest.raises(UsageError, match="no engine"):
        doctor.check_engine(dataclasses.replace(here, engine_failure=EngineFailure("abacus", "unknown", "no engine")))
    failure = EngineFailure("cpu", "unavailable", "it does not load")
    with pytest.raises(CommandError) as caught:
        doctor.check_engine(dataclasses.replace(here, engine_failure=failure, variables={}))
    assert str(caught.value) == f"it does not load. {doctor.BUILD}"
    with pytest.raises(CommandError) as caught:
        doctor.check_engine(dataclasses.replace(here, engine_failure=failure, variables={"QDQ_LIBRARY": "x.so"}))
    assert str(caught.value) == "it does not load"


def test_a_library_that_the_user_names(here: Environment) -> None:
    found = dataclasses.replace(
        here, engine=WITHOUT_LIBRARY, engine_failure=None, variables={"QDQ_LIBRARY": "/none.so"}
    )
    texts = [line.text for line in lines_of(found, "kernels")]
    assert any("QDQ_LIBRARY=/none.so names the compiled kernels" in text for text in texts)
    assert doctor.BUILD not in texts


# The report


def test_the_command(run: Any) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for subject in ("python", "torch", "threads", "processor", "kernels", "gpu", "onnxruntime", "openvino", "tensorrt"):
        assert f" {subject:13} " in result.stdout
    for target in ("onnxruntime", "openvino", "tensorrt"):
        assert f"int8     {target:13} " in result.stdout
    assert qdq.__version__ in result.stdout
    help_text = " ".join(run("doctor", "--help").stdout.split())
    assert "--json" in help_text


def test_json(run: Any, here: Environment) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["schema"] == 1
    assert list(report) == [
        "schema", "qdq", "python", "torch", "processor", "engine", "engine_failure", "packages", "gpus", "gpu_note",
        "variables", "int8",
    ]  # fmt: skip
    assert list(report["torch"]) == ["version", "build", "toolkit", "threads"]
    assert list(report["processor"]) == [
        "machine", "architecture", "name", "cores", "available", "instruction_sets", "saturates",
    ]  # fmt: skip
    assert list(report["engine"]) == [
        "requested", "cpu", "cpu_reason", "library", "level", "openmp", "cuda", "cuda_reason",
    ]  # fmt: skip
    assert set(report["packages"]) >= {"onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt"}
    assert list(report["packages"]["onnxruntime"]) == ["installed", "version", "providers", "error"]
    if here.processor.instruction_sets is not None:
        assert list(report["processor"]["instruction_sets"]) == [
            "avx2", "avx512", "avx512_vnni", "avx_vnni", "amx", "neon", "dotprod", "i8mm",
        ]  # fmt: skip
    assert [entry["target"] for entry in report["int8"]] == ["onnxruntime", "openvino", "tensorrt"]
    for entry in report["int8"]:
        assert list(entry) == ["target", "expectation", "activations", "weights", "text", "warning"]
    assert report["qdq"] == qdq.__version__


def test_names_that_the_terminal_cannot_show(here: Environment) -> None:
    gpu = Gpu("Größe [bold]5", 2**30, "8.6")
    found = dataclasses.replace(here, gpus=(gpu,), gpu_note=None)
    assert "Gr??e [bold]5, 1.0 GiB" in printed(found, encoding="ascii")
    assert "Größe [bold]5, 1.0 GiB" in printed(found)
    text = doctor.as_json(found, expectations(found))
    assert text.isascii()
    assert json.loads(text)["gpus"][0]["name"] == gpu.name


def test_lines_are_whole_in_a_pipe_and_wrapped_on_a_terminal(here: Environment) -> None:
    piped = printed(here, width=40)
    for line in doctor.lines(here):
        assert f"{line.level:8} {line.subject:13} {line.text}" in piped.splitlines()
    wrapped = Text.from_ansi(printed(here, terminal=True, width=60)).plain.splitlines()
    assert max(len(line) for line in wrapped) <= 60
    assert len(wrapped) > len(piped.splitlines())


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_as_a_process(encoding: str) -> None:
    variables = {**os.environ, "PYTHONIOENCODING": encoding, "QDQ_ENGINE": "reference", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "qdq.cli", "doctor"],
        capture_output=True, timeout=300, check=False, env=variables,
    )  # fmt: skip
    text = found.stdout.decode(encoding)
    assert found.returncode == 0, found.stderr
    assert found.stderr == b""
    assert "\x1b" not in text
    assert "QDQ_ENGINE=reference forces this" in text
    assert "1 for an operation of PyTorch (OMP_NUM_THREADS=1)" in text
