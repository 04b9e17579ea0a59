"""The wheel: pure, with both import names, and an import that asks for nothing but the core."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from scikit_build_core.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True, timeout=300)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_is_pure_and_whole(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src").rglob("*")
        if path.suffix in (".py", ".typed") and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == {name.replace("\\", "/") for name in sources}
    assert any(name.endswith("licenses/LICENSE") for name in names)


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
