"""Whether int8 is faster than float on this machine, and with which layout of codes, as far as it was measured."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..graph.targets import TARGETS, Target
from .environment import Environment, Gpu, Processor

Expectation = Literal["faster", "depends on the model", "not measured", "not here"]

# Least compute capability with int8 tensor cores: Turing (CUDA C++ Programming Guide, "Compute Capabilities").
_INT8_TENSOR_CORES = (7, 5)
# Least and largest speed-up over fp32 with target onnxruntime: benchmarks/deploy.py, docs/figures.md.
_WITHOUT_VNNI = "1.0 to 1.8 times as fast as float (AVX2, 2 threads, batch 1)"
_WITH_VNNI = "3.4 to 4.7 times as fast as float (ResNet-18, ResNet-50, MobileNetV2)"


@dataclasses.dataclass(frozen=True)
class Int8Speed:
    """What to expect of an 8-bit file in one runtime.

    Attributes:
        target: as `qdq.quantize(..., target=...)` takes it.
        expectation: against float in the same runtime on this machine.
        activations: layout of activation codes, "uint8 affine" or "int8 symmetric".
        weights: layout of weight codes.
        text: the sentence for a reader.
        warning: what can make results wrong here, and what qdq does about it; None if nothing can.
    """

    target: str
    expectation: Expectation
    activations: str
    weights: str
    text: str
    warning: str | None


def expectations(environment: Environment) -> tuple[Int8Speed, ...]:
    """What to expect of each target here, in the order of `qdq.graph.targets.TARGETS`."""
    processor, gpus = environment.processor, environment.gpus
    found = {
        "onnxruntime": _onnxruntime(processor),
        "openvino": _openvino(processor),
        "tensorrt": _tensorrt(next((gpu for gpu in gpus if gpu.compute_capability), None)),
    }
    return tuple(_of(target, *found[target.name], processor) for target in TARGETS.values())


def _of(target: Target, expectation: Expectation, text: str, processor: Processor) -> Int8Speed:
    activations = f"{'uint8' if target.unsigned else 'int8'} {'symmetric' if target.symmetric else 'affine'}"
    layout = f"Code layout: {activations} activations, int8 symmetric weights (target {target.name})."
    # Of the targets only those with unsigned activations run on this processor.
    warning = _saturation(target) if target.unsigned and processor.saturates else None
    return Int8Speed(target.name, expectation, activations, "int8 symmetric", f"{text} {layout}", warning)


def _saturation(target: Target) -> str:
    remedy = (
        "shrinks the pairs of weight codes that could, and only those" if target.pairs else "makes weights of 7 bits"
    )
    return (
        "Without VNNI pairs of uint8 x int8 products saturate at 16 bits: in files that qdq writes here, reduce_range "
        f'"auto" {remedy}. Other files, and those that qdq wrote on a processor with VNNI, may compute something else '
        "here."
    )


def _onnxruntime(processor: Processor) -> tuple[Expectation, str]:
    sets = processor.instruction_sets
    if processor.architecture == "arm":
        return "not measured", f"Whether int8 is faster than float here was not measured: {_arm(processor)}."
    if processor.saturates is None or sets is None:
        return "not measured", f"Whether int8 is faster than float here is unknown: {_unknown(processor)}."
    if not processor.saturates:
        return (
            "faster",
            f"int8 will be faster than float here: on a processor with VNNI it was {_WITH_VNNI}. Only with uint8 "
            "activations: int8 ones were no faster than float.",
        )
    if sets.avx2 and not sets.avx512:
        return (
            "depends on the model",
            f"Whether int8 is faster than float here depends on the model: on a processor like this one it was "
            f"{_WITHOUT_VNNI}; `qdq benchmark` measures yours.",
        )
    kind = "AVX-512 but no VNNI" if sets.avx512 else "no AVX2"
    return (
        "not measured",
        f"Whether int8 is faster than float here was not measured: the processor has {kind}; `qdq benchmark` measures "
        "your model.",
    )


def _openvino(processor: Processor) -> tuple[Expectation, str]:
    if processor.saturates is None:
        return "not measured", f"Whether int8 is faster than float here is unknown: {_unknown(processor)}."
    if processor.architecture == "arm":
        return "not measured", f"Whether int8 is faster than float here was not measured: {_arm(processor)}."
    if processor.saturates:
        return "not measured", "Whether int8 is faster than float here was not measured: the processor has no VNNI."
    return "not measured", "int8 should be faster than float here (VNNI), but qdq has not measured it."


def _tensorrt(gpu: Gpu | None) -> tuple[Expectation, str]:
    if gpu is None or gpu.compute_capability is None:
        return (
            "not here",
            "No NVIDIA GPU that PyTorch can use: files for TensorRT can be written here and verified in ONNX Runtime, "
            "not timed.",
        )
    major, _, minor = gpu.compute_capability.partition(".")
    cores = "has" if (int(major), int(minor)) >= _INT8_TENSOR_CORES else "has no"
    return (
        "not measured",
        f"Whether int8 is faster than float here was not measured: compute capability {gpu.compute_capability} {cores} "
        "int8 tensor cores. Compare with float16, not with float32.",
    )


def _arm(processor: Processor) -> str:
    sets = processor.instruction_sets
    if sets is None:
        return "the processor is an ARM one, and this system does not tell its instruction sets"
    names = [name for name, there in (("dot product", sets.dotprod), ("i8mm", sets.i8mm)) if there]
    has = f"has 8-bit instructions ({', '.join(names)})" if names else "has no 8-bit dot product instructions"
    return f"this ARM processor {has}, and `qdq benchmark` measures your model"


def _unknown(processor: Processor) -> str:
    if processor.architecture == "x86":
        return "this system does not tell the processor's instruction sets; `qdq benchmark` measures your model"
    return f"nobody measured {processor.machine or 'this architecture'}; `qdq benchmark` measures your model"
