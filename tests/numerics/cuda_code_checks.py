"""The code that Triton compiles for NVIDIA devices, without one: no approximations, nothing fused, nothing flushed.

test_cuda_engine.py runs this file in a process of its own, where Triton does not interpret.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import re
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qdq.kernels import triton_elementwise, triton_gradients, triton_histogram, triton_reductions

POINTERS = {"a": "*fp32", "b": "*fp32", "low": "*fp32", "high": "*fp32", "sums": "*fp64", "keys": "*i32"}
FORMAT = {"LO": 0, "HI": 255, "MAXIMUM": 448.0, "MIN_EXPONENT": -6, "MANTISSA_BITS": 3}
COMMON = {"COMPUTE": tl.float32, "WIDE": False, "ABSOLUTE": False, "CLOSED": True}
SIZES = {"BLOCK": 2048, "STEPS": 2, "ROWS": 16, "WIDTH": 64, "PERIODS": 2, "BINS": 256, "SHARED": True}
FORWARD = ["symmetric", "symmetric_codes", "affine", "range", "scaled_float", "e8m0"]


def ptx(kernel: Any, version: int = 90, element: str = "*fp32", **constants: Any) -> str:
    """The code of ``kernel`` for tensors whose addresses and sizes are multiples of 16."""
    values = {**FORMAT, **COMMON, **SIZES, "GRADIENT": False, "PARAMETERS": True, "DOUBLES": False, **constants}
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in values:
            signature[name] = "constexpr"
        elif name in ("x", "g", "out"):
            signature[name] = element
        else:
            signature[name] = POINTERS.get(name, "*i64" if name == "counts" else "i64" if "bits" in name else "i32")
    places = {name: index for index, name in enumerate(kernel.arg_names)}
    aligned = [
        name for name, kind in signature.items() if kind.startswith("*") or name in ("n", "inner", "row", "period")
    ]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(places[name],): values[name] for name in signature if signature[name] == "constexpr"},
        attrs={(places[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", version, 32), options=options).asm["ptx"]


def assert_exact(code: str) -> None:
    found = re.findall(r"\b(?:fma|mad)\.[\w.]*f(?:32|64)|\bdiv\.full\S*|\S*\.approx\S*|\S*\.ftz\S*", code)
    assert not found, sorted(set(found))
    # A sum or product without a rounding of its own may be fused by the assembler.
    assert not re.search(r"\b(?:mul|add|sub)\.f(?:32|64)", code)


@pytest.mark.parametrize("op", FORWARD)
def test_forward(op: str) -> None:
    code = ptx(triton_elementwise._flat, OP=op, PARAMETERS=op != "e8m0")
    assert_exact(code)
    assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code


@pytest.mark.parametrize("element", ["*bf16", "*fp16"])
def test_16_bits_are_rounded_half_to_even(element: str) -> None:
    code = ptx(triton_elementwise._flat, element=element, OP="affine", DOUBLES=True)
    assert_exact(code)
    assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code
    assert re.search(r"cvt\.rn\.(bf16x2|bf16|f16|f16x2)\.f32", code) and "cvt.rn.f32.f64" in code


@pytest.mark.parametrize("version", [75, 120])
def test_other_devices(version: int) -> None:
    assert_exact(ptx(triton_elementwise._flat, version, OP="symmetric"))


@pytest.mark.parametrize("kernel", [triton_elementwise._rows, triton_elementwise._columns], ids=["rows", "columns"])
def test_per_channel(kernel: Any) -> None:
    code = ptx(kernel, OP="symmetric", parts=1)
    assert_exact(code)
    assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code


@pytest.mark.parametrize("op", ["symmetric_gradient", "affine_gradient"])
def test_gradients(op: str) -> None:
    code = ptx(triton_elementwise._flat, OP=op, GRADIENT=True)
    assert_exact(code)
    assert "st.global.v4.b32" in code


def test_sums_of_gradients() -> None:
    code = ptx(triton_gradients._range_sums)
    assert_exact(code)
    assert "add.rn.f64" in code


@pytest.mark.parametrize("name", ["_flat", "_rows", "_columns", "_decode"])
def test_extrema(name: str) -> None:
    assert_exact(ptx(getattr(triton_reductions, name)))


@pytest.mark.parametrize("shared", [False, True])
def test_histogram(shared: bool) -> None:
    code = ptx(triton_histogram._count, SHARED=shared)
    assert_exact(code)
    assert re.search(r"(?:atom|red)\.\S*add\.u64", code)
