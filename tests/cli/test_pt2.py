"""A `.pt2` file is data: what could run code is refused before PyTorch's loader sees it."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qdq._cli.errors import UsageError
from qdq._cli.pt2 import is_plain_expression, load_pt2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4, 3)
        self.register_buffer("offset", torch.ones(3), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(image).mean((2, 3))) + self.offset


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as `torch.export.save` writes it by default."""
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    torch.export.save(export(), str(path))
    return path


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copy(saved, tmp_path / "net.pt2"))


def export() -> torch.export.ExportedProgram:
    dim = torch.export.Dim.DYNAMIC
    return torch.export.export(
        network(), (torch.randn(2, 1, 8, 8),), dynamic_shapes={"image": {0: dim, 2: dim, 3: dim}}
    )


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def rewrite(path: Path, change: dict[str, Any]) -> None:
    """Replaces or adds members, named by their path inside the archive's root folder; a callable edits JSON."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(members)).partition("/")[0]
    for part, content in change.items():
        name = f"{root}/{part}"
        if callable(content):
            data = json.loads(members[name])
            content(data)
            members[name] = json.dumps(data).encode()
        else:
            members[name] = content
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


class Marker:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def check_loads(path: Path) -> None:
    model, loaded = network(), load_pt2(path)
    image = torch.randn(5, 1, 12, 10)
    torch.testing.assert_close(loaded(image), model(image), rtol=0, atol=0)
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_a_saved_program_loads_and_computes_the_same(saved: Path) -> None:
    check_loads(saved)


def test_the_way_out_that_the_messages_name(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    program = torch.export.load(str(saved))
    program.example_inputs = None
    torch.export.save(program, str(path))
    with zipfile.ZipFile(path) as archive:
        assert archive.read("net/data/sample_inputs/model.pt") == b""
    check_loads(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_pt2(tmp_path / "none.pt2")


def test_not_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(b"not a zip")
    with pytest.raises(UsageError, match=r"is not a \.pt2 archive"):
        load_pt2(path)


def test_older_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.0")
        archive.writestr("serialized_state_dict.pt", pickle.dumps({}))
    with pytest.raises(UsageError, match=r"older files are pickles.*torch\.export\.save"):
        load_pt2(path)


@pytest.mark.parametrize("part", ["data/weights/model.pt", "data/constants/model.pt"])
def test_legacy_pickled_members_are_refused(path: Path, tmp_path: Path, part: str) -> None:
    trace = tmp_path / "trace"
    rewrite(path, {part: pickle.dumps(Marker(trace))})
    with pytest.raises(UsageError, match=r"pickled member .*example_inputs = None"):
        load_pt2(path)
    assert not trace.exists()


@pytest.mark.parametrize("folder", ["weights", "constants"])
def test_tensors_marked_as_pickles_are_refused(path: Path, tmp_path: Path, folder: str) -> None:
    trace = tmp_path / "trace"

    def mark(config: dict[str, Any]) -> None:
        payload = next(iter(config["config"].values()))
        payload["use_pickle"] = True
        payload["path_name"] = "evil_0"

    evil = pickle.dumps(Marker(trace))
    rewrite(path, {f"data/{folder}/model_{folder}_config.json": mark, f"data/{folder}/evil_0": evil})
    with pytest.raises(UsageError, match="as a pickle"):
        load_pt2(path)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["custom_obj_0", "opaque_obj_0"])
def test_custom_objects_are_refused(path: Path, tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"

    def mark(config: dict[str, Any]) -> None:
        next(iter(config["config"].values()))["path_name"] = name

    rewrite(
        path,
        {
            "data/constants/model_constants_config.json": mark,
            f"data/constants/{name}": pickle.dumps(Marker(trace)),
        },
    )
    with pytest.raises(UsageError, match="as a pickle"):
        load_pt2(path)
    assert not trace.exists()


def test_sample_inputs_with_more_than_tensors_are_refused(path: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    buffer = io.BytesIO()
    torch.save(((torch.ones(1),), {"extra": Marker(trace)}), buffer)
    rewrite(path, {"data/sample_inputs/model.pt": buffer.getvalue()})
    with pytest.raises(UsageError, match=r"hold more than plain tensors.*example_inputs = None"):
        load_pt2(path)
    assert not trace.exists()


def test_compiled_code_is_refused(path: Path) -> None:
    rewrite(path, {"data/aotinductor/model/model.so": b"\x7fELF"})
    with pytest.raises(UsageError, match="compiled code"):
        load_pt2(path)


def test_damaged_json_is_refused(path: Path) -> None:
    rewrite(path, {"models/model.json": b"{"})
    with pytest.raises(UsageError, match="damaged"):
        load_pt2(path)


def test_an_expression_that_would_run_is_refused(path: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    def plant(model: dict[str, Any]) -> None:
        sizes = model["graph_module"]["graph"]["tensor_values"]["image"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = f"__import__('pathlib').Path({str(trace)!r}).touch() or Integer(2)"

    rewrite(path, {"models/model.json": plant})
    with pytest.raises(UsageError, match="will not evaluate"):
        load_pt2(path)
    assert not trace.exists()


def test_a_guard_is_not_executed(path: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    def plant(model: dict[str, Any]) -> None:
        model["guards_code"] = [f"__import__('pathlib').Path({str(trace)!r}).touch() is None"]

    rewrite(path, {"models/model.json": plant})
    load_pt2(path)(torch.randn(2, 1, 8, 8))
    assert not trace.exists()


def test_a_parameter_name_that_would_run_is_refused(path: Path) -> None:

    def plant(model: dict[str, Any]) -> None:
        model["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = ["x=print('evil')"]

    rewrite(path, {"models/model.json": plant})
    with pytest.raises(UsageError, match="not a Python name"):
        load_pt2(path)


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(Integer(1), FloorDiv(Add(Symbol('s0', positive=True, integer=True), Integer(-1)), Integer(2)))",
        "s77",
        "2*s0 + 1",
        "Max(1, u0)",
        "True",
    ],
)
def test_plain_expressions(text: str) -> None:
    assert is_plain_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "s0.__class__",
        "eval('1')",
        "Symbol('a b')",
        "Symbol('x')('y')",
        "[s0 for s0 in (1,)]",
        "lambda: 1",
        "sympify('1')",
        "open",
        "f'{s0}'",
        "s0 +",
        "",
        3,
        None,
    ],
)
def test_expressions_that_are_refused(text: Any) -> None:
    assert not is_plain_expression(text)
