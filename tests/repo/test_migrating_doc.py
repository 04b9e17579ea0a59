"""docs/migrating.md: its program runs as it stands, and its tables are true."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from qdq._cli.import_table import SAME_ROLE
from qdq._cli.old_imports import migrate_text

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "migrating.md"

pytestmark = pytest.mark.skipif(not DOCUMENT.is_file(), reason="not run from a source tree")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export")
def test_the_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_quantization import nn as quant_nn

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 7
    names: dict[str, object] = {"__name__": "__main__"}
    before = quant_nn.QuantConv2d.default_quant_desc_input
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            for block in blocks:
                exec(compile(block, str(DOCUMENT), "exec"), names)
    finally:
        quant_nn.QuantConv2d.default_quant_desc_input = before
    written = {path.name for path in tmp_path.glob("*.onnx")}
    assert written == {"modules.onnx", "model.int8.onnx", "new_exporter.onnx", "old_exporter.onnx"}
    assert out.getvalue().count("SQNR") >= 2


def rows(first_cell: str) -> list[list[str]]:
    """The rows of the table whose heading begins with this cell."""
    text = DOCUMENT.read_text(encoding="utf-8")
    table = text[text.index(f"| {first_cell} |") :].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def test_every_published_module_has_a_row() -> None:
    paths = {path for row in rows("import path") for path in re.findall(r"`([\w.*]+)`", row[0])}
    for module in SAME_ROLE:
        short = module.removeprefix("pytorch_quantization") or module
        below = {".nn.modules": ".nn", ".utils.quant_logging": ".utils", ".optim": ".optim.helper"}
        parents = {short, below.get(short, short), re.sub(r"^(\.nn\.modules)\..*", r"\1.*", short)}
        parents |= {".calib"} if short in (".calib.max", ".calib.histogram") else set()
        assert parents & paths, module


def test_the_rows_on_imports_are_what_migrate_writes() -> None:
    text = "from pytorch_quantization import tensor_quant, nn as quant_nn\n{}\ntensor_quant.TensorQuantFunction, "
    text += "tensor_quant.QuantDescriptor\n"
    for before, after in rows("before"):
        line = before.strip("`")
        source = f"{line}\nquant_modules.initialize()\n" if line.startswith("from") else text.format(line)
        assert after.strip("`") in migrate_text(source).text.splitlines()
