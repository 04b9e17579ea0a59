"""The package `pytorch_quantization` itself: names at the top, version, what an import does and does not do."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pytorch_quantization
import qdq

SOURCES = Path(pytorch_quantization.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(SOURCES.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCES.rglob("*.py")
)


def in_a_fresh_interpreter(program: str) -> str:
    command = [sys.executable, "-W", "error", "-c", program]
    # Warnings of torch's own import are not ours.
    command[3:3] = ["-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"]
    environment = {"PYTHONPATH": str(SOURCES.parent), "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def test_the_version_reads_as_a_successor_of_the_last_published_one() -> None:
    version = pytest.importorskip("packaging.version")
    parsed = version.Version(pytorch_quantization.__version__)
    assert version.Version("2.2.1") < parsed < version.Version("3")
    assert parsed.local == f"qdq.{qdq.__version__}"
    major, minor = pytorch_quantization.__version__.split(".")[:2]
    assert (int(major), int(minor)) >= (2, 2)


def test_names_at_the_top() -> None:
    from pytorch_quantization import quant_modules

    for name in ("initialize", "deactivate", "enable_onnx_export"):
        assert getattr(pytorch_quantization, name) is getattr(quant_modules, name)
    for name in pytorch_quantization.__all__:
        assert hasattr(pytorch_quantization, name)


def test_one_import_reaches_the_submodules_and_does_nothing_else() -> None:
    program = """
import logging, sys
import torch
linear = torch.nn.Linear
handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
import pytorch_quantization
for name in ("calib", "nn", "quant_modules", "tensor_quant", "utils"):
    getattr(pytorch_quantization, name)
pytorch_quantization.nn.modules.tensor_quantizer.TensorQuantizer, pytorch_quantization.utils.reduce_amax
import pytorch_quantization.optim
pytorch_quantization.optim.helper.match_parameters
assert torch.nn.Linear is linear
assert logging.getLogger().handlers == handlers and logging.getLogger().level == level
named = [n for n in logging.Logger.manager.loggerDict if n.split(".")[0] in ("qdq", "pytorch_quantization")]
assert all(not logging.getLogger(n).handlers for n in named)
unwanted = ("absl", "onnx", "onnxruntime", "onnxscript", "typer", "rich", "sklearn", "openvino")
print([name for name in unwanted if name in sys.modules], torch.cuda.is_initialized())
"""
    assert in_a_fresh_interpreter(program) == "[] False"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_gives(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for public in module.__all__:
        value = getattr(module, public)
        home = getattr(value, "__module__", None)
        # Re-exports: nothing but a thin adapter lives here.
        if isinstance(value, type):
            assert home is not None
            assert not home.startswith("pytorch_quantization"), (public, home)


def test_published_import_paths() -> None:
    layers = "_utils clip quant_conv quant_instancenorm quant_linear quant_pooling quant_rnn tensor_quantizer"
    paths = [
        *(f"nn.modules.{module}" for module in layers.split()),
        *("nn", "nn.functional", "nn.modules", "calib", "calib.calibrator", "quant_modules", "tensor_quant"),
        *("optim", "optim.helper", "utils", "utils.quant_logging"),
    ]
    missing = {f"pytorch_quantization.{path}" for path in paths} - set(MODULES)
    assert missing == set()
