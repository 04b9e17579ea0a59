"""`qdq migrate` on files and folders: what it prints, writes and skips, and the exit code of every way to fail."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

OLD = "from pytorch_quantization import nn as quant_nn\n\nquant_nn.QuantLinear\n"
NEW = OLD.replace("pytorch_quantization", "qdq")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str | Path, text: str = OLD) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def test_shows_and_changes_nothing(here: Path, run: Any) -> None:
    write("train.py")
    result = run("migrate", "train.py")
    assert result.exit_code == 1
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "train.py:1: import: from pytorch_quantization import nn as quant_nn -> from qdq import nn as quant_nn",
        "train.py:3: use: pytorch_quantization.nn.QuantLinear -> qdq.nn.QuantLinear",
        "--- train.py",
        "+++ train.py",
        "@@ -1,3 +1,3 @@",
        "-from pytorch_quantization import nn as quant_nn",
        "+from qdq import nn as quant_nn",
        " ",
        " quant_nn.QuantLinear",
        "1 file to rewrite (1 import, 1 use); --write does it",
    ]
    assert Path("train.py").read_text() == OLD


def test_writes_and_finds_nothing_the_second_time(here: Path, run: Any) -> None:
    write("train.py")
    write("package/model.py", "from pytorch_quantization.nn import Linear as L\n")
    first = run("migrate", ".", "--write")
    assert first.exit_code == 0, first.output
    assert first.stdout.splitlines()[-1] == "2 files rewritten (2 imports, 1 use)"
    assert Path("train.py").read_text() == NEW
    assert Path("package/model.py").read_text() == "from qdq.nn import QuantLinear as L\n"
    assert sorted(path.name for path in here.rglob("*")) == ["model.py", "package", "train.py"]
    for arguments in ((), ("--write",)):
        again = run("migrate", ".", *arguments)
        assert (again.exit_code, again.stdout) == (0, "nothing to rewrite\n")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_diff_can_be_applied(here: Path, run: Any) -> None:
    write("train.py", OLD.rstrip("\n"))
    diff = run("migrate", "train.py").stdout
    assert "\\ No newline at end of file" in diff
    applied = subprocess.run(["git", "apply", "-p0"], input=diff.encode(), cwd=here, capture_output=True)
    assert applied.returncode == 0, applied.stderr
    assert Path("train.py").read_text() == NEW.rstrip("\n")


def test_what_is_left_is_listed_and_does_not_count(here: Path, run: Any) -> None:
    text = "from pytorch_quantization import tensor_quant, quant_modules\nquant_modules.initialize()\nf(tensor_quant)\n"
    write("a.py", text)
    result = run("migrate", "a.py", "--write")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "a.py:2: note: pytorch_quantization.quant_modules.initialize(): new code converts one model" in result.stdout
    # After writing the numbers are those of the new file.
    assert lines[-3:] == [
        "a.py:1: left: from pytorch_quantization import tensor_quant: line 4 uses the module itself as a value",
        "a.py:4: left: pytorch_quantization.tensor_quant: its import on line 1 is left",
        "1 file rewritten (1 import, 1 use); 2 left as listed: pytorch_quantization serves them",
    ]
    star = write("star.py", "from pytorch_quantization.nn import *\n")
    result = run("migrate", star)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "nothing to rewrite; 1 left as listed: pytorch_quantization serves it"


@pytest.mark.parametrize(
    "data",
    [
        b"# -*- coding: latin-1 -*-\n# \xe9\nfrom pytorch_quantization import nn\n",
        b"\xef\xbb\xbf# \xc3\xa9\r\nfrom pytorch_quantization import nn\r\nx = 1\n",
        b"from pytorch_quantization import nn\rx = '\xe2\x80\xa8\x0c'",
    ],
    ids=["latin-1", "byte order mark and mixed line ends", "carriage returns, odd separators"],
)
def test_keeps_encoding_and_line_ends(here: Path, run: Any, data: bytes) -> None:
    path = here / "a.py"
    path.write_bytes(data)
    assert run("migrate", path, "--write").exit_code == 0
    assert path.read_bytes() == data.replace(b"from pytorch_quantization", b"from qdq")


def test_keeps_mode_and_links(here: Path, run: Any) -> None:
    path = write("real/train.py")
    path.chmod(0o750)
    link = here / "link.py"
    link.symlink_to(path.resolve())
    result = run("migrate", "link.py", "real", "--write")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("1 file rewritten")
    assert link.is_symlink()
    assert path.read_text() == NEW
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_folders_that_are_not_the_users_code_are_skipped(here: Path, run: Any) -> None:
    for folder in (
        ".git",
        "build",
        "dist",
        "node_modules",
        "__pycache__",
        "x.egg-info",
        "env/lib",
        "lib/site-packages",
    ):
        write(f"{folder}/a.py")
    write("env/pyvenv.cfg", "")
    write("notes.txt")
    assert (run("migrate", ".").exit_code, run("migrate", ".").stdout) == (0, "nothing to rewrite\n")
    # What is named is looked into.
    assert run("migrate", "build").exit_code == 1
    assert run("migrate", "notes.txt").exit_code == 1


def test_the_old_package_itself_is_left(here: Path, run: Any) -> None:
    write("pytorch_quantization/__init__.py", "from pytorch_quantization import nn\n")
    result = run("migrate", ".")
    assert result.exit_code == 0
    assert "left: pytorch_quantization: a file of the old package itself" in result.stdout


def test_notebooks_are_listed(here: Path, run: Any) -> None:
    write("a.ipynb", '{"cells": [{"source": ["import pytorch_quantization"]}]}')
    write("b.ipynb", '{"cells": []}')
    result = run("migrate", ".")
    assert result.exit_code == 0
    assert "a.ipynb:1: left: pytorch_quantization: notebooks are not rewritten" in result.stdout
    assert "b.ipynb" not in result.stdout


def test_names_that_files_take_from_each_other_stay(here: Path, run: Any) -> None:
    text = "from pytorch_quantization import nn as quant_nn, calib\n"
    for name in ("utils", "helpers", "names", "free"):
        write(f"package/{name}.py", text)
    write("package/__init__.py", text)
    write("package/a.py", "from .utils import quant_nn\nfrom . import calib\n")
    write("b.py", "import package.helpers as h\nh.quant_nn.QuantLinear\nimport package\npackage.helpers.calib\n")
    write("c.py", "from package.names import *\n")
    write("broken.py", "utils names (\n")
    result = run("migrate", ".", "--write")
    assert result.exit_code == 0, result.output
    first, second = "from pytorch_quantization import ", "\nfrom qdq import "
    expected = {
        "utils": f"from pytorch_quantization import nn as quant_nn{second}calib\n",
        "helpers": text,
        "names": text,
        "free": text.replace("pytorch_quantization", "qdq"),
        "__init__": f"from qdq import nn as quant_nn\n{first}calib\n",
    }
    for name, new in expected.items():
        found = Path(f"package/{name}.py").read_text()
        assert sorted(found.splitlines()) == sorted(new.splitlines()), name
    assert "another of the files takes this name from here" in result.stdout


@pytest.mark.parametrize(
    ("data", "code", "texts"),
    [
        (b"import pytorch_quantization\nx = (\n", 1, ("bad.py:2:", "cannot be read as Python", "never closed")),
        (b"import pytorch_quantization\0\n", 1, ("bad.py:", "cannot be read as Python", "null bytes")),
        (b"import pytorch_quantization\n# \xff\n", 1, ("bad.py: cannot be decoded",)),
        (b"# coding: klingon\nimport pytorch_quantization\n", 1, ("bad.py: cannot be decoded", "klingon")),
        (None, 2, ("bad.py: no such file or folder",)),
    ],
    ids=["syntax", "null byte", "not utf-8", "unknown encoding", "missing"],
)
def test_a_bad_file_is_named_and_the_others_go_on(
    here: Path, run: Any, data: bytes | None, code: int, texts: tuple[str, ...]
) -> None:
    if data is not None:
        Path("bad.py").write_bytes(data)
    write("good.py")
    result = run("migrate", "bad.py", "good.py", "--write")
    assert result.exit_code == code
    (line,) = result.stderr.splitlines()
    for text in (*texts, "qdq: error: "):
        assert text in line
    assert Path("good.py").read_text() == NEW
    assert "1 file rewritten" in result.stdout


def test_bad_files_without_the_old_package_are_of_no_concern(here: Path, run: Any) -> None:
    Path("a.py").write_bytes(b"x = (\n")
    Path("b.py").write_bytes(b"# \xff\n")
    result = run("migrate", ".")
    assert (result.exit_code, result.output) == (0, "nothing to rewrite\n")


def test_what_is_no_file_is_refused(here: Path, run: Any) -> None:
    os.mkfifo("pipe.py")
    result = run("migrate", "pipe.py")
    assert result.exit_code == 2
    assert "pipe.py: neither a file nor a folder" in result.stderr


def test_pipes_and_sockets_in_a_folder_are_passed_over(here: Path, run: Any) -> None:
    write("a.py")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("b.py")
        result = run("migrate", ".")
    assert (result.exit_code, result.stderr) == (1, "")
    assert "1 file to rewrite" in result.stdout
    for name in ("c.py", "d.ipynb"):
        os.mkfifo(name)  # to open it waits for a writer
    assert run("migrate", ".").stdout == result.stdout


def test_links_that_lead_nowhere_are_named(here: Path, run: Any) -> None:
    (here / "a.py").symlink_to("nowhere")
    result = run("migrate", ".")
    assert result.exit_code == 1
    assert "a.py: No such file or directory" in result.stderr


def test_a_failed_write_leaves_the_file(here: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.py")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    result = run("migrate", "a.py", "--write")
    assert result.exit_code == 1
    assert "a.py: not written: No space left on device" in result.stderr
    assert result.stdout.splitlines()[-1] == "nothing to rewrite"
    assert [path.name for path in here.iterdir()] == ["a.py"]
    assert Path("a.py").read_text() == OLD


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is permitted to root")
def test_permissions(here: Path, run: Any) -> None:
    write("closed/a.py")
    for path, mode in (("read_only.py", 0o444), ("secret.py", 0o000)):
        write(path).chmod(mode)
    Path("closed").chmod(0o000)
    try:
        result = run("migrate", ".", "closed/a.py", "--write")
    finally:
        Path("closed").chmod(0o700)
    assert result.exit_code == 1
    assert "read_only.py: not written: permission denied" in result.stderr
    assert "secret.py: Permission denied" in result.stderr
    assert result.stderr.count("closed") == 2
    assert Path("read_only.py").read_text() == OLD


def test_called_without_a_path(run: Any) -> None:
    assert run("migrate").exit_code == 2
