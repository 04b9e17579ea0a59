"""What is no path, or no path of a file, is told by every call that takes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import qdq
from pipeline.helpers import quantize, randn

CALLS: dict[str, Callable[[fx.GraphModule, Any], Any]] = {
    "export_onnx": qdq.export_onnx,
    "save": qdq.calib.save,
    "load": lambda _, path: qdq.calib.load(path),
    "verify": lambda qmodel, path: qdq.verify(qmodel, path, [randn(8, 4)], progress=False),
    "benchmark": lambda _, path: qdq.benchmark(path, progress=False),
    "recover": lambda _, path: qdq.recover(nn.Linear(4, 2), [randn(8, 4)], lambda m: 1.0, journal=path, progress=False),
}


@pytest.fixture(scope="module")
def linear() -> fx.GraphModule:
    torch.manual_seed(0)
    return quantize(nn.Linear(4, 2).eval(), [randn(8, 4)])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("path", "kind"), [(5, "int"), (b"m.onnx", "bytes"), (["m.onnx"], "list")])
def test_what_is_no_path(linear: fx.GraphModule, call: str, path: Any, kind: str) -> None:
    name = "journal" if call == "recover" else "path"
    with pytest.raises(qdq.QdqError, match=f"^{name} must be a path, a str or os.PathLike, not {kind}$"):
        CALLS[call](linear, path)


@pytest.mark.parametrize(
    ("name", "told"), [("a" * 300 + ".onnx", "File name too long"), ("a\0b.onnx", "it holds a null character")]
)
def test_names_that_no_file_can_have(linear: fx.GraphModule, tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(qdq.ExportError, match=f"cannot write .*: {told}"):
        qdq.export_onnx(linear, tmp_path / name)
    with pytest.raises(qdq.DataError, match=f"cannot be written: {told}"):
        qdq.calib.save(linear, tmp_path / name)
    with pytest.raises(qdq.DataError, match="there is no file"):
        qdq.calib.load(tmp_path / name)
    with pytest.raises(qdq.DataError, match=f"the journal .* cannot be written: {told}"):
        CALLS["recover"](linear, tmp_path / name)
    for call in ("verify", "benchmark"):
        with pytest.raises(qdq.ExportError, match="there is no file"):
            CALLS[call](linear, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [215, 225, 240, 250])
def test_long_names(linear: fx.GraphModule, tmp_path: Path, length: int) -> None:
    name = "a" * (length - 5) + ".onnx"
    qdq.export_onnx(linear, tmp_path / name)
    qdq.calib.save(linear, tmp_path / f"{name[:-5]}.safe")
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, f"{name[:-5]}.safe"]
    evaluated = 0

    def evaluate(_: nn.Module) -> float:
        nonlocal evaluated
        evaluated += 1
        return 1.0

    def recover() -> qdq.Recovery:
        model = nn.Linear(4, 2)
        return qdq.recover(model, [randn(8, 4)], evaluate, journal=tmp_path / name[:-5], progress=False)

    if length < 230:
        assert recover().reached
        return
    # The statistics beside it have a longer name.
    with pytest.raises(qdq.DataError, match="the journal .* cannot be written: File name too long"):
        recover()
    assert not evaluated
