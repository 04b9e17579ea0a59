"""One quantized file for all tests of the commands that read one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from qdq.cli import app

USER_CODE = Path(__file__).with_name("user_code.py")
Run = Callable[..., Any]


def run_command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """The command adds a handler to the library's logger, which other tests in this process must not meet."""
    logger = logging.getLogger("qdq")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs `qdq` in this process; the result has exit_code, stdout and stderr."""
    return run_command


@pytest.fixture(scope="session")
def user() -> Callable[[str], str]:
    """The command line's name of something in user_code.py."""
    return lambda name: f"{USER_CODE}:{name}"


class Deployed(NamedTuple):
    """What one run of `qdq quantize` left."""

    int8: Path
    fp32: Path
    result: Any


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    folder = tmp_path_factory.mktemp("deployed")
    int8, fp32 = folder / "net.int8.onnx", folder / "net.fp32.onnx"
    code = str(USER_CODE)
    result = run_command(
        "quantize", f"{code}:make", "--data", f"{code}:labelled", "-o", int8, "--fp32", fp32,
        "--eval", f"{code}:mean_logit",
    )  # fmt: skip
    return Deployed(int8, fp32, result)
