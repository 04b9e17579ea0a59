"""Which engine runs: the variables of the environment, libraries that cannot be used, tensors that are not plain."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qdq.functional import fake_tensor_quant
from qdq.kernels import engine, native, reference

SOURCES = Path(engine.__file__).parents[2]
LIBRARY = native.library()
needs_library = pytest.mark.skipif(LIBRARY.functions is None, reason=LIBRARY.reason)
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
BUILD = r"C\+\+ compiler"

# Prints what ran, and a value that both engines give.
PROGRAM = """
import torch
from qdq.functional import fake_tensor_quant
from qdq.kernels import engine
try:
    value = fake_tensor_quant(torch.tensor([0.3, -2.0]), torch.tensor(1.0), 4, False, False)
    now = engine.status()
    print(engine.for_tensor(value).__name__.split(".")[-1], now.requested, now.cpu, now.library, value.tolist())
    print(now.cpu_reason)
except (RuntimeError, ValueError) as error:
    print(type(error).__name__)
    print(error)
"""
VALUE = [torch.round(torch.tensor(0.3) * 7).div(7).item(), float(torch.tensor(-8.0).div(7))]


def run(**environment: str) -> tuple[list[str], str]:
    """The two lines that a process of its own prints with these variables, and what it writes to standard error."""
    kept = {name: value for name, value in os.environ.items() if name not in ("QDQ_ENGINE", "QDQ_LIBRARY")}
    path = os.pathsep.join([str(SOURCES), *filter(None, [kept.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip().splitlines(), result.stderr


# -- in processes of their own ---------------------------------------------------------------------


def test_the_reference_can_be_forced() -> None:
    (first, reason), _ = run(QDQ_ENGINE="reference")
    assert first.startswith("reference reference reference ")
    assert first.endswith(str(VALUE))
    assert reason == "QDQ_ENGINE=reference forces it"


def test_the_library_can_be_required() -> None:
    (kind, message), _ = run(QDQ_ENGINE="cpu", QDQ_LIBRARY="")
    assert kind == "RuntimeError"
    assert message.startswith("QDQ_ENGINE=cpu, but the variable QDQ_LIBRARY is empty, which hides the compiled kernels")
    assert message.endswith("Check with: qdq doctor")


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    """A warning, and the reference."""
    text = tmp_path / "text.so"
    text.write_text("no library\n")
    (first, reason), errors = run(QDQ_LIBRARY=str(text))
    assert first == f"reference None reference None {VALUE}"
    assert reason.startswith(f"{text} cannot be loaded: ")
    assert f"{text} cannot be loaded" in errors and "the slower reference runs" in errors


# -- in this process -------------------------------------------------------------------------------


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> engine._Choice:
    """A choice that is still to be made."""
    for name in ("QDQ_ENGINE", "QDQ_LIBRARY"):
        monkeypatch.delenv(name, raising=False)
    fresh = engine._Choice()
    monkeypatch.setattr(engine, "_choice", fresh)
    return fresh


def found_anew() -> native.Library:
    """The library, looked for once more."""
    return native.library.__wrapped__()


@pytest.mark.parametrize("name", ["native", "CPU", "cuda:0", "reference "])
def test_a_wrong_name_is_refused_at_the_first_use(
    name: str, choice: engine._Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDQ_ENGINE", name)
    message = f"QDQ_ENGINE='{name}' is no engine: choose one of reference, cpu, cuda"
    for call in (lambda: fake_tensor_quant(torch.ones(2), torch.tensor(1.0)), engine.status):
        with pytest.raises(ValueError, match=message):
            call()


def test_an_empty_variable_forces_nothing(choice: engine._Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDQ_ENGINE", "")
    assert engine.status().requested is None


def test_cpu_without_a_library_says_how_to_get_one(choice: engine._Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDQ_ENGINE", "cpu")
    monkeypatch.setattr(native, "_candidates", list)
    missing = found_anew()
    assert missing.functions is None and missing.level is None
    monkeypatch.setattr(native, "library", lambda: missing)
    for _ in range(2):  # it is not taken for decided after the first error
        with pytest.raises(RuntimeError, match=rf"QDQ_ENGINE=cpu, but the compiled kernels are not .*{BUILD}"):
            fake_tensor_quant(torch.ones(2), torch.tensor(1.0))


def test_without_a_library_the_reference_runs(choice: engine._Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_candidates", list)
    missing = found_anew()
    monkeypatch.setattr(native, "library", lambda: missing)
    status = engine.status()
    assert (status.cpu, status.library, status.level, status.openmp) == ("reference", None, None, False)
    assert "compiler" in status.cpu_reason
    assert engine.for_tensor(torch.ones(1)) is reference
    assert fake_tensor_quant(torch.tensor([0.3, -2.0]), torch.tensor(1.0), 4, False, False).tolist() == VALUE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(choice: engine._Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDQ_ENGINE", "cuda")
    with pytest.raises(RuntimeError, match="QDQ_ENGINE=cuda, but PyTorch finds no GPU"):
        engine.status()


def test_a_library_of_another_program(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import _ctypes

    path = getattr(_ctypes, "__file__", None)
    if path is None:
        pytest.skip("ctypes is built in")
    monkeypatch.setenv("QDQ_LIBRARY", path)
    with caplog.at_level(logging.WARNING):
        library = found_anew()
    assert library.functions is None and "qdq_interface" in library.reason
    assert "the slower reference runs" in caplog.text


def test_a_missing_file(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    monkeypatch.setenv("QDQ_LIBRARY", str(tmp_path / "none.so"))
    assert found_anew().functions is None
    assert "none.so cannot be loaded" in caplog.text


def compiled(folder: Path, code: str) -> Path:
    source, library = folder / "other.c", folder / "other.so"
    source.write_text(code)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


@needs_compiler
def test_a_library_of_another_interface(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = compiled(tmp_path, "int qdq_interface(void) { return 12345; }")
    monkeypatch.setenv("QDQ_LIBRARY", str(path))
    library = found_anew()
    assert (library.path, library.functions) == (None, None)
    assert f"another version of qdq (interface 12345, needed {native.INTERFACE}): reinstall qdq" in caplog.text


@needs_compiler
def test_a_library_that_lacks_a_function(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    names = [*native._SIGNATURES, "qdq_level", "qdq_set_level", "qdq_openmp"]
    for lacking in (names[0], names[-4], "qdq_level", "qdq_openmp"):
        code = f"int qdq_interface(void) {{ return {native.INTERFACE}; }}\n"
        code += "\n".join(f"int {name}(void) {{ return 0; }}" for name in names if name != lacking)
        folder = tmp_path / lacking
        folder.mkdir()
        monkeypatch.setenv("QDQ_LIBRARY", str(compiled(folder, code)))
        library = found_anew()
        assert library.functions is None and lacking in library.reason
        assert "the slower reference runs" in caplog.text
        caplog.clear()


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="names the functions of the file format of Linux")
def test_every_function_that_is_called_has_its_signature() -> None:
    header = (SOURCES.parent / "native" / "include" / "qdq_kernels.h").read_text()
    counts = {name: len(arguments) for name, arguments in native._SIGNATURES.items()}
    for name, count in counts.items():
        declared = header.split(f" {name}(")[1].split(")")[0]
        assert len(declared.split(",")) == count, name
        assert getattr(LIBRARY.functions, name).argtypes == native._SIGNATURES[name]
    assert f"#define QDQ_INTERFACE {native.INTERFACE}\n" in header


# -- forced ----------------------------------------------------------------------------------------


@needs_library
def test_forced_can_be_nested_and_is_undone(choice: engine._Choice) -> None:
    x = torch.ones(2)
    assert engine.for_tensor(x) is not reference
    status = engine.status()
    assert (status.cpu, status.cpu_reason) == ("native", "the compiled kernels are installed")
    assert (status.library, status.level) == (str(LIBRARY.path), LIBRARY.level)
    with engine.forced("reference"):
        assert engine.for_tensor(x) is reference
        assert engine.status().requested == "reference"
        with engine.forced("cpu"):
            assert engine.for_tensor(x).__name__ == "qdq.kernels.cpu"
        assert engine.for_tensor(x) is reference
    assert engine.status().requested is None
    assert engine.for_tensor(x) is not reference


def test_forced_is_undone_after_errors(choice: engine._Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), engine.forced("reference"):
        raise ZeroDivisionError
    assert engine.status().requested is None
    for name in ("nothing", "Reference", ""):
        with pytest.raises(ValueError, match="is no engine"), engine.forced(name):
            pytest.fail(f"{name!r} was taken")
        assert engine.status().requested is None
    monkeypatch.setattr(native, "library", lambda: native.Library(None, "there is none"))
    with pytest.raises(RuntimeError, match="QDQ_ENGINE=cpu, but there is none"), engine.forced("cpu"):
        pytest.fail("it was taken")
    assert engine.for_tensor(torch.ones(1)) is reference


def test_forced_goes_before_the_variable(choice: engine._Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDQ_ENGINE", "nothing")
    with engine.forced("reference"):
        assert engine.for_tensor(torch.ones(1)) is reference
    with pytest.raises(ValueError, match="is no engine"):
        engine.for_tensor(torch.ones(1))


# -- what is no plain tensor -----------------------------------------------------------------------


class Subclass(Tensor):
    pass


class SeesEverything(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_plain_tensors() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    for tensor in (x, x.detach(), x.t(), x * 2, nn.Parameter(torch.ones(1)), nn.Buffer(torch.ones(1)), torch.ones(())):
        assert engine.is_plain(tensor)
    with torch.inference_mode():
        assert engine.is_plain(torch.ones(2))


@pytest.mark.filterwarnings("ignore:.*prototype.*:UserWarning", "ignore:Sparse .* beta:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2).as_subclass(Subclass),
        lambda: nn.UninitializedParameter(),
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.eye(2).to_sparse_csr(),
        lambda: torch.ones(2).to_mkldnn(),
        lambda: FakeTensorMode().from_tensor(torch.ones(2)),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided),
        lambda: torch._efficientzerotensor((2,)),  # pyright: ignore[reportPrivateImportUsage]
        lambda: 1.0,
        lambda: None,
    ],
    ids="subclass uninitialized sparse csr mkldnn fake jagged nested zero number none".split(),
)
def test_what_is_not_plain(make: Callable[[], Any]) -> None:
    assert not engine.is_plain(make())


def test_a_subclass_stays_one() -> None:
    x, amax = torch.randn(5), torch.tensor(1.0)
    y = fake_tensor_quant(x.as_subclass(Subclass), amax)
    assert type(y) is Subclass
    assert torch.equal(y.as_subclass(Tensor), fake_tensor_quant(x, amax))
    assert engine.for_tensor(x.as_subclass(Subclass)) is reference
    assert torch.equal(fake_tensor_quant(x, amax.as_subclass(Subclass)).as_subclass(Tensor), fake_tensor_quant(x, amax))


def test_meta_and_fake_tensors_have_the_right_form() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    y = fake_tensor_quant(x.to("meta"), torch.ones(1, device="meta"))
    assert (y.device.type, y.shape, y.stride()) == ("meta", x.shape, x.stride())
    mode = FakeTensorMode()
    with mode:
        assert not engine.is_plain(torch.ones(2))
        y = fake_tensor_quant(mode.from_tensor(x), mode.from_tensor(torch.ones(1)))
    assert (type(y).__name__, y.shape, y.stride()) == ("FakeTensor", x.shape, x.stride())


def test_not_plain_under_transforms() -> None:
    seen = []

    def note(x: Tensor) -> Tensor:
        seen.append(engine.is_plain(x))
        return (x * 2).sum()

    x = torch.randn(3, 2)
    for transform in (torch.func.vmap, torch.func.grad, torch.func.jacrev, torch.func.functionalize):
        transform(note)(x)
    assert seen == [False] * 4
    assert engine.is_plain(x)


@needs_library
def test_a_mode_sees_the_operations(choice: engine._Choice) -> None:
    """A mode that counts, records or replaces operations must see some."""
    x, amax = torch.randn(5), torch.tensor(1.0)
    expected = fake_tensor_quant(x, amax)
    with SeesEverything() as mode:
        assert not engine.is_plain(x)
        found = fake_tensor_quant(x, amax)
    assert torch.equal(found, expected)
    assert any("round" in name for name in mode.seen)
    assert engine.is_plain(x)
