"""What is installed and what the machine can do, as values. Starts nothing, changes nothing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import sys
import warnings
from typing import Literal

import torch

from .. import cpuinfo
from ..kernels import engine
from ..kernels.engine import EngineStatus

# Distributions that bring the same module: the first one installed names the version.
_ONNXRUNTIME = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-qnn",
    "onnxruntime-training",
)
# Variables of the environment that change what the report says.
VARIABLES = ("QDQ_ENGINE", "QDQ_LIBRARY", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
_TENSORRT = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11")


@dataclasses.dataclass(frozen=True)
class PythonInfo:
    """The interpreter: version and implementation, and the system that it runs on."""

    version: str
    implementation: str
    system: str


@dataclasses.dataclass(frozen=True)
class TorchInfo:
    """PyTorch.

    Attributes:
        version: of the package.
        build: "cpu", "cuda" or "rocm".
        toolkit: version of CUDA or ROCm that it was built with.
        threads: that one operation uses.
    """

    version: str
    build: Literal["cpu", "cuda", "rocm"]
    toolkit: str | None
    threads: int


@dataclasses.dataclass(frozen=True)
class Processor:
    """The processor.

    Attributes:
        machine: architecture as the system calls it.
        architecture: "x86", "arm" or "other".
        name: as its maker writes it; None if unknown.
        cores: logical processors; None if unknown.
        available: those that this process may run on; None if unknown.
        instruction_sets: None where the system does not tell.
        saturates: whether sums of two products of uint8 and int8 saturate at 16 bits; None if unknown.
    """

    machine: str
    architecture: Literal["x86", "arm", "other"]
    name: str | None
    cores: int | None
    available: int | None
    instruction_sets: cpuinfo.InstructionSets | None
    saturates: bool | None


@dataclasses.dataclass(frozen=True)
class EngineFailure:
    """Why no engine runs.

    Attributes:
        engine: what QDQ_ENGINE says, None where it is not set.
        kind: "unknown" if no engine has that name, "unavailable" if it cannot run here.
        message: one sentence.
    """

    engine: str | None
    kind: Literal["unknown", "unavailable"]
    message: str


@dataclasses.dataclass(frozen=True)
class Package:
    """A Python package.

    Attributes:
        installed: whether its module can be found.
        version: None if it is not installed, or does not tell.
        providers: ONNX Runtime's execution providers, best first; empty for other packages.
        error: why an installed package cannot be imported, where that was tried.
    """

    installed: bool
    version: str | None
    providers: tuple[str, ...] = ()
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU that PyTorch can use. `compute_capability` is "major.minor"; None on AMD GPUs."""

    name: str
    memory_bytes: int
    compute_capability: str | None


@dataclasses.dataclass(frozen=True)
class Environment:
    """Everything that `qdq doctor` looks at.

    Attributes:
        engine: which engine runs; None where QDQ_ENGINE names one that cannot.
        engine_failure: why `engine` is None; None otherwise.
        packages: by the name of the distribution.
        gpus: those that PyTorch can use.
        gpu_note: why there is none, or what PyTorch warned of.
        variables: those of `VARIABLES` that are set.
    """

    python: PythonInfo
    torch: TorchInfo
    processor: Processor
    engine: EngineStatus | None
    engine_failure: EngineFailure | None
    packages: dict[str, Package]
    gpus: tuple[Gpu, ...]
    gpu_note: str | None
    variables: dict[str, str]


def collect() -> Environment:
    """Looks at Python, PyTorch, the processor, the engine, the packages and the GPUs."""
    status, failure = _engine()
    gpus, note = _gpus()
    return Environment(
        python=PythonInfo(platform.python_version(), platform.python_implementation(), platform.system()),
        torch=_torch(),
        processor=_processor(),
        engine=status,
        engine_failure=failure,
        packages={
            "onnx": _package("onnx"),
            "onnxscript": _package("onnxscript"),
            "onnxruntime": _onnxruntime(),
            "openvino": _package("openvino"),
            "tensorrt": _package("tensorrt", _TENSORRT),
            "pillow": _package("PIL", ("pillow",)),
            "scikit-learn": _package("sklearn", ("scikit-learn",)),
        },
        gpus=gpus,
        gpu_note=note,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _torch() -> TorchInfo:
    hip: str | None = getattr(torch.version, "hip", None)
    cuda = torch.version.cuda
    build: Literal["cpu", "cuda", "rocm"] = "rocm" if hip else "cuda" if cuda else "cpu"
    return TorchInfo(str(torch.__version__), build, hip or cuda, torch.get_num_threads())


def _processor() -> Processor:
    return Processor(
        machine=platform.machine(),
        architecture="x86" if cpuinfo.is_x86() else "arm" if cpuinfo.is_arm() else "other",
        name=cpuinfo.processor_name(),
        cores=os.cpu_count(),
        available=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        instruction_sets=cpuinfo.instruction_sets(),
        saturates=cpuinfo.saturates_u8s8(),
    )


def _engine() -> tuple[EngineStatus | None, EngineFailure | None]:
    asked = os.environ.get("QDQ_ENGINE") or None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PyTorch warns of when it looks for GPUs is in `gpu_note`
            return engine.status(), None
    except ValueError as error:
        return None, EngineFailure(asked, "unknown", str(error))
    except RuntimeError as error:
        # The operations raise the same message, and it sends their reader here.
        return None, EngineFailure(asked, "unavailable", str(error).partition("Check with:")[0].strip())
    except Exception as error:
        # A half-installed package raises whatever it likes; to find that out is what the report is for.
        return None, EngineFailure(asked, "unavailable", _one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _package(module: str, distributions: tuple[str, ...] = ()) -> Package:
    """A package by the name of its module, found without importing it."""
    if not _is_installed(module):
        return Package(installed=False, version=None)
    for distribution in distributions or (module,):
        try:
            return Package(installed=True, version=importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            continue
    return Package(installed=True, version=None)


def _is_installed(module: str) -> bool:
    """Whether a module is there. A folder that only bears its name (a namespace package) is not it."""
    if module in sys.modules:
        return sys.modules[module] is not None
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def _onnxruntime() -> Package:
    """ONNX Runtime is imported: only it knows its execution providers."""
    found = _package("onnxruntime", _ONNXRUNTIME)
    if not found.installed:
        return found
    try:
        import onnxruntime

        return dataclasses.replace(found, providers=tuple(onnxruntime.get_available_providers()))
    except Exception as error:
        # A wheel of another platform or a missing shared library raises whatever it likes: report it, go on.
        return dataclasses.replace(found, error=_one_line(error))


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    build = _torch().build
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            usable = torch.cuda.is_available()
            gpus = tuple(_gpu(index, build) for index in range(torch.cuda.device_count())) if usable else ()
    except RuntimeError as error:
        return (), f"PyTorch cannot use its GPU: {' '.join(str(error).split())}"
    if caught:
        return gpus, " ".join(str(caught[0].message).split())
    if gpus:
        return gpus, None
    if build == "cpu":
        return (), "this build of PyTorch uses the CPU alone"
    return (), "PyTorch sees none; if there is one, look at its driver and at CUDA_VISIBLE_DEVICES"


def _gpu(index: int, build: str) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    return Gpu(found.name, found.total_memory, None if build == "rocm" else f"{found.major}.{found.minor}")
