"""The tree around the library: one version, no colliding names, no traces of a machine, true documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

import qdq
from qdq.cli import app

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {"build", "dist", "demo-out", "__pycache__", "node_modules"}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="not run from a source tree")


def files() -> Iterator[Path]:
    """Text files of the project; hidden folders are environments and caches, but for .ci."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts[:-1])
        if path.is_file() and not hidden and not SKIPPED.intersection(parts) and not parts[0].startswith(".venv"):
            yield path


def text_of(path: Path) -> str | None:
    if path.stat().st_size > 1_000_000:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def test_the_version_is_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", qdq.__version__)
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in pyproject
    assert qdq.__version__ not in re.findall(r'^version = "(.*)"', pyproject, re.MULTILINE)
    assert f"## {qdq.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_no_module_bears_the_name_of_a_public_function() -> None:
    """Importing such a submodule would rebind the attribute of the package."""
    package = ROOT / "src" / "qdq"
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert modules.isdisjoint({name for name in qdq.__all__ if callable(getattr(qdq, name))})
    later = {"sensitivity", "recover", "report", "calibrating"}
    assert modules.isdisjoint({"quantize", "export_onnx", "verify", "explain", "benchmark", *later})


def test_both_packages_are_marked_as_typed() -> None:
    for package in ("qdq", "pytorch_quantization"):
        assert (ROOT / "src" / package / "py.typed").is_file()


def test_nothing_names_a_machine() -> None:
    home = re.compile(r"(?<![\w./~-])/(?:root|home|work|farm|opt|Users)/\w")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()[:100]}"
        for path in files()
        for line in (text_of(path) or "").splitlines()
        if home.search(line)
    ]
    assert found == []


def test_files_stay_readable_at_one_sitting() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in (ROOT / "src").rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 450
    }
    assert long == {}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_commands_and_options_that_exist(path: Path) -> None:
    group = typer.main.get_command(app)
    commands = group.commands  # type: ignore[attr-defined]
    known = {
        name: {option for p in command.params for option in p.opts} | {"--help"} for name, command in commands.items()
    }
    # A shell line may go on after a backslash.
    for line in re.findall(r"(?:^|`|\$ )qdq ([^`\n]*)", path.read_text().replace("\\\n", " "), re.MULTILINE):
        words = line.split()
        if not words or words[0].startswith("-"):
            continue
        assert words[0] in known, line
        options = [word.partition("=")[0] for word in words if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)]
        assert set(options) <= known[words[0]], line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_make_targets_that_exist(path: Path) -> None:
    rules = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", path.read_text())) <= rules


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_in_documents_uses_names_that_exist(path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        compile(block, str(path), "exec")
        for name in re.findall(r"\bqdq\.(\w+)\(", block):
            assert hasattr(qdq, name), name


def test_recipes_in_documents_are_recipes() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert qdq.Recipe.from_yaml(block) != qdq.Recipe()


def test_every_extra_in_the_readme_exists() -> None:
    known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)) == {"onnx", "images", "demo", "openvino", "dev"}
    assert set(re.findall(r"\.\[(\w+)\]", readme)) <= known
