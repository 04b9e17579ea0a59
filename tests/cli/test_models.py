"""MODEL of the command line, and the functions of the user's that it and other options name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qdq._cli.errors import CommandError, UsageError
from qdq._cli.factories import load_callable
from qdq._cli.models import load_model


def write(tmp_path: Path, body: str, name: str = "user_model.py") -> Path:
    path = tmp_path / name
    path.write_text(body)
    return path


def test_factory_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "from torch import nn\ndef make():\n    return nn.Linear(2, 3)\n")
    assert isinstance(load_model(f"{path}:make"), nn.Linear)


def test_a_class_is_a_factory_and_its_file_may_import_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "WIDTH = 5\n", "qdq_test_neighbour.py")
    body = (
        "from torch import nn\nfrom qdq_test_neighbour import WIDTH\n"
        "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(2, WIDTH)\n"
    )
    model = load_model(f"{write(tmp_path, body)}:Net")
    assert isinstance(model, nn.Linear)
    assert model.out_features == 5


def test_factory_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "from torch import nn\nmake = lambda: nn.ReLU()\n", "qdq_test_module.py")
    try:
        assert isinstance(load_model("qdq_test_module:make"), nn.ReLU)
    finally:
        sys.modules.pop("qdq_test_module", None)


def test_one_file_is_imported_once(tmp_path: Path) -> None:
    path = write(tmp_path, "COUNT = []\ndef make():\n    return COUNT\n")
    assert load_callable(f"{path}:make", argument="MODEL")() is load_callable(f"{path}:make", argument="--data")()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("model", "neither package.module:factory, file.py:factory nor a .pt2 file"),
        ("none.py:make", "MODEL: no such file: none.py"),
        ("qdq_no_such_module:make", "there is no module 'qdq_no_such_module'"),
        ("torch.qdq_no_such_module:make", r"there is no module 'torch\.qdq_no_such_module'"),
        ("torch.nn:NoSuchThing", "defines no 'NoSuchThing'"),
        ("torch:__version__", "not a function to call"),
        ("torch.nn:", "neither package.module:factory"),
        ("weights.pt", r"holds weights \(or a pickle\).*weights_only=True"),
        ("weights.safetensors", "holds weights"),
        ("none.pt2", "no such file"),
        ("builtins:dict", "returned a dict, not a torch.nn.Module"),
    ],
)
def test_specs_that_name_no_model(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(spec)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def make(:\n", "cannot be imported: SyntaxError"),
        ("import qdq_no_such_module\n", "cannot be imported: ModuleNotFoundError"),
        ("def make():\n    raise RuntimeError('no weights here')\n", "raised RuntimeError.*no weights here"),
        ("def make(size):\n    pass\n", "raised TypeError"),
    ],
)
def test_code_that_fails(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        load_model(f"{write(tmp_path, body)}:make")


def test_a_module_whose_own_import_fails_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "import qdq_no_such_module\n", "qdq_test_broken.py")
    with pytest.raises(CommandError, match="it needs 'qdq_no_such_module'") as caught:
        load_model("qdq_test_broken:make")
    assert not isinstance(caught.value, UsageError)
    write(tmp_path, "1 / 0\n", "qdq_test_dividing.py")
    with pytest.raises(CommandError, match="cannot be imported: ZeroDivisionError"):
        load_model("qdq_test_dividing:make")


@pytest.mark.parametrize("spec", ["", "file.py", ":name", "file.py:not a name"])
def test_malformed_names_of_functions(spec: str) -> None:
    with pytest.raises(UsageError, match=r"--eval .* is neither file\.py:name nor package\.module:name"):
        load_callable(spec, argument="--eval")


def test_weights_are_not_touched(tmp_path: Path) -> None:
    path = write(tmp_path, "import torch\nmodel = torch.nn.Linear(2, 2)\ndef make():\n    return model\n")
    assert torch.equal(load_model(f"{path}:make").weight, load_model(f"{path}:make").weight)  # type: ignore[arg-type]
