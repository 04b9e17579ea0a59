"""Whether int8 is faster than float: the sentence for real processors and GPUs, and for those that nobody measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from qdq import cpuinfo
from qdq._cli import doctor
from qdq.analysis import environment
from qdq.analysis.environment import Environment, Gpu
from qdq.analysis.int8_speed import Int8Speed, expectations

from .processors import PROCESSORS, Case


@pytest.fixture(scope="module")
def here() -> Environment:
    return environment.collect()


def on(here: Environment, case: Case) -> Environment:
    """This environment on another processor, as `collect` would describe it."""
    processor = dataclasses.replace(
        here.processor,
        machine=case.machine,
        architecture="x86" if case.machine == "x86_64" else "arm",
        name=None,
        instruction_sets=cpuinfo.InstructionSets.from_flags(cpuinfo.parse_flags(case.cpuinfo)),
        saturates=case.saturates,
    )
    return dataclasses.replace(here, processor=processor)


def by_target(found: Environment) -> dict[str, Int8Speed]:
    return {speed.target: speed for speed in expectations(found)}


def lines_of(found: Environment, subject: str) -> list[doctor.Line]:
    return [line for line in doctor.lines(found) if line.subject == subject]


@pytest.mark.parametrize("case", PROCESSORS, ids=lambda case: case.name)
def test_the_sentence_for_real_processors(here: Environment, case: Case) -> None:
    found = by_target(on(here, case))
    cpu, openvino = found["onnxruntime"], found["openvino"]
    assert cpu.activations == openvino.activations == "uint8 affine"
    assert "uint8 affine activations, int8 symmetric weights (target onnxruntime)" in cpu.text
    if case.expected == "faster":
        assert cpu.expectation == "faster"
        assert cpu.text.startswith("int8 will be faster than float here")
        assert "3.4 to 4.7 times" in cpu.text
        assert "int8 should be faster" in openvino.text
    elif case.expected == "depends":
        assert cpu.expectation == "depends on the model"
        assert "1.0 to 1.8 times" in cpu.text
    else:
        assert cpu.expectation == openvino.expectation == "not measured"
        # No figure for what nobody measured.
        assert "was not measured" in cpu.text
        assert " times " not in cpu.text + openvino.text
    assert ("ARM processor" in cpu.text) is (case.expected == "ARM")
    if case.saturates:
        assert cpu.warning is not None
        assert openvino.warning is not None
        assert "saturate at 16 bits" in cpu.warning
        assert "shrinks the pairs" in cpu.warning
        assert "7 bits" in openvino.warning
    else:
        assert cpu.warning is openvino.warning is None
    assert found["tensorrt"].warning is None


@pytest.mark.parametrize(
    ("name", "text"),
    [("Graviton", "no 8-bit dot product"), ("Graviton2", "(dot product)"), ("Graviton3", "(dot product, i8mm)")],
)
def test_what_an_arm_processor_has(here: Environment, name: str, text: str) -> None:
    case = next(case for case in PROCESSORS if case.name == name)
    assert text in by_target(on(here, case))["onnxruntime"].text


@pytest.mark.parametrize(
    ("machine", "architecture", "saturates", "text"),
    [
        ("AMD64", "x86", None, "does not tell the processor's instruction sets"),
        ("riscv64", "other", None, "nobody measured riscv64"),
        ("arm64", "arm", False, "does not tell its instruction sets"),
    ],
)
def test_a_system_that_does_not_tell(
    here: Environment, machine: str, architecture: Any, saturates: bool | None, text: str
) -> None:
    processor = dataclasses.replace(
        here.processor, machine=machine, architecture=architecture, instruction_sets=None, saturates=saturates
    )
    found = dataclasses.replace(here, processor=processor)
    for target in ("onnxruntime", "openvino"):
        speed = by_target(found)[target]
        assert speed.expectation == "not measured"
        assert text in speed.text
        assert speed.warning is None
    assert "does not tell its instruction sets" in lines_of(found, "processor")[0].text
    assert ("unknown whether" in lines_of(found, "saturation")[0].text) is (saturates is None)


@pytest.mark.parametrize(
    ("capability", "text"), [("9.0", "9.0 has int8 tensor cores"), ("7.0", "7.0 has no int8 tensor cores")]
)
def test_a_gpu(here: Environment, capability: str, text: str) -> None:
    found = dataclasses.replace(here, gpus=(Gpu("Some GPU", 80 * 2**30, capability),), gpu_note=None)
    speed = by_target(found)["tensorrt"]
    assert (speed.expectation, speed.activations) == ("not measured", "int8 symmetric")
    assert text in speed.text
    assert "int8 symmetric activations" in speed.text
    assert lines_of(found, "gpu") == [
        doctor.Line("ok", "gpu", f"Some GPU, 80.0 GiB, compute capability {capability}"),
    ]


def test_no_gpu_for_tensorrt(here: Environment) -> None:
    amd = (Gpu("Some AMD GPU", 2**30, None),)
    for gpus in ((), amd):
        speed = by_target(dataclasses.replace(here, gpus=gpus))["tensorrt"]
        assert speed.expectation == "not here"
        assert "No NVIDIA GPU" in speed.text
    noted = dataclasses.replace(here, gpus=amd, gpu_note="an old driver")
    assert [line.text for line in lines_of(noted, "gpu")] == ["Some AMD GPU, 1.0 GiB", "an old driver"]
