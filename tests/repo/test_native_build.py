"""The compiled kernels: installed where they can be, current, one narrow interface, one pool of threads."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qdq.kernels import native

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = os.environ.get("QDQ_LIBRARY") == ""
COMPILER = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)

pytestmark = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").is_file(), reason="not run from a source tree")


@pytest.fixture(scope="module")
def library() -> Path:
    """The library of this process."""
    path = native.library().path
    if path is None:
        pytest.skip(native.library().reason)
    return path


def output_of(*command: str | Path, **variables: str) -> str:
    found = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.skipif(HIDDEN, reason="QDQ_LIBRARY hides the compiled kernels")
@pytest.mark.skipif(COMPILER is None or os.name == "nt", reason="no compiler for the kernels")
def test_where_there_is_a_compiler_the_kernels_are_installed() -> None:
    """An install succeeds even if compiling fails, so that here is the place to notice."""
    assert native.library().functions is not None, native.library().reason


@pytest.mark.skipif(HIDDEN, reason="QDQ_LIBRARY hides the compiled kernels")
def test_the_library_is_not_older_than_its_sources(library: Path) -> None:
    sources = [path for folder in ("include", "src") for path in (ROOT / "native" / folder).iterdir()]
    newer = [path.name for path in sources if path.stat().st_mtime > library.stat().st_mtime]
    assert newer == [], f"{library} is older: `make test` compiles it again"


def test_an_empty_variable_hides_the_library() -> None:
    code = "from qdq.kernels.engine import status; s = status(); print(s.cpu, s.library, s.level); print(s.cpu_reason)"
    name, reason = output_of(sys.executable, "-c", code, QDQ_LIBRARY="", PYTHONPATH=str(ROOT / "src")).splitlines()
    assert name == "reference None None"
    assert "QDQ_LIBRARY" in reason


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
def test_only_the_interface_is_visible(library: Path) -> None:
    header = (ROOT / "native" / "include" / "qdq_kernels.h").read_text()
    declared = set(re.findall(r"^QDQ_EXPORT .*?\b(qdq_\w+)\(", header, re.MULTILINE))
    assert "qdq_interface" in declared
    symbols = output_of(tool("nm"), "-D", "--defined-only", library).splitlines()
    assert {line.split()[-1] for line in symbols} == declared


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
@pytest.mark.skipif(COMPILER is None, reason="no compiler")
def test_it_needs_the_c_library_and_libgomp_only(library: Path) -> None:
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", output_of(tool("readelf"), "-d", library)))
    allowed = {"libc.so.6", "libm.so.6", "libgomp.so.1", "libpthread.so.0"}
    assert {name for name in needed if not name.startswith("ld-linux")} <= allowed
    if native.library().openmp:
        assert "libgomp.so.1" in needed


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_its_threads_are_those_of_pytorch(library: Path) -> None:
    """Two copies of libgomp would have two pools of threads, each as large as the processor."""
    code = (
        "import re, torch\n"
        "from qdq.kernels import native\n"
        "assert native.library().openmp, native.library().reason\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(len(set(re.findall(r'(/\\S*lib[gi]?omp\\S*)', maps))))\n"
    )
    if not native.library().openmp:
        pytest.skip("built without OpenMP")
    assert output_of(sys.executable, "-c", code, PYTHONPATH=str(ROOT / "src")) == "1\n"


def test_every_instruction_set_agrees_with_plain_loops(library: Path, tmp_path: Path) -> None:
    """A program in C99 that includes the header and calls the library without Python."""
    program = tmp_path / "check"
    flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    sources = ["-I", ROOT / "native" / "include", ROOT / "native" / "check" / "check.c"]
    output_of(tool("cc"), *flags, *sources, "-o", program, "-ldl", "-lm")
    own = native.library().level
    assert own is not None
    for level in dict.fromkeys([own, "x86-64-v2", "x86-64-v3"]):
        found = subprocess.run([program, library, level], capture_output=True, text=True, timeout=60, check=False)
        assert found.returncode in ((0,) if level == own else (0, 3)), found.stderr
        assert found.returncode == 3 or level in found.stdout
    assert subprocess.run([program, library, "none"], timeout=60, check=False).returncode == 3


def configure(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [tool("cmake"), "-G", "Unix Makefiles", "-S", str(ROOT), "-B", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set only")
@pytest.mark.skipif(COMPILER is None or shutil.which("make") is None, reason="no compiler or no make")
def test_lower_instruction_sets_are_linked_first(tmp_path: Path) -> None:
    """The linker keeps the first copy of an inline function of the C++ library: one for any processor."""
    found = configure(tmp_path, "-DQDQ_OPENMP=OFF")
    assert found.returncode == 0, found.stderr
    link = (tmp_path / "CMakeFiles" / "qdq_kernels.dir" / "link.txt").read_text()
    assert re.findall(r"qdq_level_(v\d)", link) == ["v2", "v3", "v4"]


@pytest.mark.skipif(COMPILER is None or shutil.which("make") is None, reason="no compiler or no make")
def test_windows_is_refused_when_configured(tmp_path: Path) -> None:
    """Its compilers lack the vectors; the install then goes on without the library."""
    found = configure(tmp_path, "-DWIN32=ON")
    assert found.returncode != 0
    assert "the kernels need GCC or Clang on Linux or macOS" in found.stderr
