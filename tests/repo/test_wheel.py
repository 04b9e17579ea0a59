"""The wheel: both import names, the compiled kernels or none, and an import that asks for nothing but the core."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "qdq/kernels/libqdq_kernels." + ("dylib" if sys.platform == "darwin" else "so")


def build(folder: Path, *settings: str, **variables: str) -> Path:
    """The wheel of the tree, built with what is installed."""
    pytest.importorskip("scikit_build_core")
    code = (
        "import sys; from scikit_build_core.build import build_wheel\n"
        "build_wheel(sys.argv[1], dict(word.split('=') for word in sys.argv[2:]))"
    )
    command = [sys.executable, "-c", code, str(folder), *settings]
    found = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def sources() -> set[str]:
    return {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src").rglob("*")
        if path.suffix in (".py", ".typed") and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built where no compiler is found."""
    folder = tmp_path_factory.mktemp("wheel")
    if shutil.which("cmake") is None:
        # pip would bring CMake; without it the build has nothing to fail with.
        return build(folder, "wheel.cmake=false")
    return build(folder, CC=str(folder / "none"), CXX=str(folder / "none"))


def test_without_a_compiler_the_wheel_is_pure_and_whole(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert contents(wheel) == sources()
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


@pytest.mark.skipif(os.name == "nt", reason="no compiler for the kernels")
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="no CMake or no compiler")
def test_with_a_compiler_the_wheel_is_for_a_platform_and_any_python(tmp_path: Path) -> None:
    # One instruction set, not optimised: the compiler takes seconds instead of a minute.
    quick = "-DQDQ_MULTIVERSIONING=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O0"
    wheel = build(tmp_path, CMAKE_ARGS=quick)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_").partition("_")[0]
    assert f"-py3-none-{platform}_" in wheel.name
    assert contents(wheel) == sources() | {LIBRARY}

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import sys\n"
        # An editable install has its own finder, before sys.path.
        "sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith('_editable')]\n"
        f"sys.path.insert(0, {str(site)!r})\n"
        "import torch, qdq\n"
        "from qdq.kernels.engine import status\n"
        "x = torch.linspace(-1, 1, 65536)\n"
        "codes, scale = qdq.functional.tensor_quant(x, torch.tensor(1.0))\n"
        "assert torch.equal(codes, torch.round(x * 127)) and scale == 127\n"
        "print(status().cpu, status().library)\n"
    )
    variables = {name: value for name, value in os.environ.items() if name not in ("QDQ_LIBRARY", "QDQ_ENGINE")}
    found = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"native {site / LIBRARY}\n"
    if shutil.which("readelf") is not None and sys.platform.startswith("linux"):
        tables = subprocess.run(["readelf", "-SW", site / LIBRARY], capture_output=True, text=True, check=True).stdout
        assert ".dynsym" in tables
        assert ".symtab" not in tables, "the installed library is not stripped"


def test_the_metadata_name_the_command_and_the_core_dependencies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.partition("/")[2]: name for name in archive.namelist()}
        metadata = archive.read(inside["METADATA"]).decode()
        assert "qdq = qdq.cli:main" in archive.read(inside["entry_points.txt"]).decode().replace("=", " = ").replace(
            "  ", " "
        )
    core = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    names = {line.split()[1].split(">")[0].split(";")[0] for line in core}
    assert names == {"torch", "numpy", "pyyaml", "safetensors", "rich", "typer", "tomli"}


def test_import_needs_nothing_but_the_core() -> None:
    """Optional packages may be missing, and what the command or a single step needs is not loaded by the import."""
    late = ("onnx", "onnxscript", "onnxruntime", "openvino", "sklearn", "PIL", "typer", "rich", "scipy")
    code = (
        "import sys\n"
        "import torch\n"
        f"before = set(sys.modules)\nfor name in {late}:\n    sys.modules.setdefault(name, None)\n"
        "import qdq, qdq.functional, qdq.calib, pytorch_quantization\n"
        f"print([n for n in {late} if sys.modules.get(n) is not None and n not in before])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"
