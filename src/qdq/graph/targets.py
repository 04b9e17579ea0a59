"""Targets: what each runtime executes in integers, as tables that can be checked against its documentation."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..cpuinfo import saturates_u8s8
from ..descriptor import QuantDescriptor
from ..errors import RecipeError
from ..recipe import Recipe
from .ops import Kind

Role = Literal["compute", "follow", "weight"]


@dataclasses.dataclass(frozen=True)
class FewProducts:
    """A convolution of two dimensions, without groups, that multiplies little.

    Attributes:
        channels: that it reads, at most.
        products: for a value of its result, at most.
    """

    channels: int
    products: int


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a target's table.

    Attributes:
        kind: the operations that the row is about.
        role: "compute" operations are quantized wherever they stand (but see `few_products`): they ask for quantized
            inputs (and a quantized weight).
            "follow" operations run in integers where their neighbours do, and stay in float otherwise. "weight"
            operations have a quantized weight and compute in float.
        output: whether the runtime needs a quantized output to run the operation in integers.
        shared: whether inputs and output share one quantizer.
        few_products: convolutions that are no faster in integers where they alone would need codes: they stay in float.
        note: what the runtime makes of it, in its own words for the operation.
    """

    kind: Kind
    role: Role
    note: str
    output: bool = False
    shared: bool = False
    few_products: FewProducts | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """A runtime: how it lays out codes, and which operations it executes in integers.

    Attributes:
        name: as `qdq.quantize(..., target=name)` takes it.
        unsigned, symmetric: codes of activations: uint8 with a zero point, or int8 with zero point 0.
        rules: the table.
        integer_bias: biases of integer convolutions and linears are int32 of step activation step x weight step.
        skip_only: of a residual addition only the skip branch is quantized; the other stays fused with its layer.
        attention: whether products of two activations are quantized by default.
        exact: whether operations are simulated in the runtime's own integer arithmetic (`qdq.integer_operations`).
        opset: of the exported file.
        reduce_range: weights whose products cannot saturate at 16 bits: "auto" where this machine's x86 processor
            has no VNNI, True or False.
        pairs: how range is reduced: only where two neighbouring codes would saturate (the order in which the runtime
            multiplies is known), or to 7 bits for all.
        int4: weights of at most 4 bits, where they are computed with in float, are stored as INT4.
        rounds_inputs: what linears with quantized weights and float activations read is rounded to int8 by the
            runtime, in blocks of the weight's block size, or of this one where the weight has none; None where it is
            not.
        matmul_nbits: such linears are stored as MatMulNBits of com.microsoft (accuracy level 4 where inputs are
            rounded, else 1), not as DequantizeLinear and MatMul.
        activation_bits: widths that codes of activations may have. With 16 operations compute in float, between
            QuantizeLinear and DequantizeLinear of 16 bits.
        reference: documentation that the table was read from.
    """

    name: str
    unsigned: bool
    symmetric: bool
    rules: tuple[Rule, ...]
    integer_bias: bool
    skip_only: bool
    attention: bool
    reduce_range: bool | str
    reference: str
    pairs: bool = False
    exact: bool = False
    int4: bool = True
    rounds_inputs: int | None = None
    matmul_nbits: bool = False
    activation_bits: tuple[int, ...] = (8,)
    opset: int = 21

    def rule(self, kind: Kind) -> Rule | None:
        """The row for a kind of operation, or None where the target leaves it in float."""
        return next((r for r in self.rules if r.kind is kind), None)

    def activation_codes(self, bits: int = 8) -> tuple[int, int]:
        """Least and largest code of an activation."""
        return (0, 2**bits - 1) if self.unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


_EMBEDDING = Rule(Kind.EMBEDDING, "weight", "rows are gathered as int8 and scaled by their row's step size")

# The QDQ fusions of ONNX Runtime's CPU provider: a DequantizeLinear -> op -> QuantizeLinear group becomes one
# integer kernel. DequantizeLinear -> MatMul becomes MatMulNBits at accuracy level 4 (in 1.32), if nothing else reads
# the two constants and the input is float; else the weight is dequantized in every run. So linears are stored as
# MatMulNBits. Weight only, one core of an x86 without VNNI, in microseconds (1 row; 32 rows):
#
#     K x N         float       4 bits, blocks of 32   blocks of 128   8 bits, 32   not fused     level 1, 4 bits, 32
#     384 x 1536    63; 454     35; 487                33; 451         38; 705      663; 1214     115; 603
#     1024 x 4096   715; 4028   174; 3340              167; 2950       218; 5054    9269; 17791   820; 4532
#
# DequantizeLinear that is fused is as fast as MatMulNBits, and per channel as fast as blocks of 32. At 8 bits level 1
# takes 978 and 22856 microseconds for one row.
#
# The first convolution of a network reads 3 channels. Where a SiLU or a normalisation follows it, it alone would be
# computed in integers, between two conversions. With 3 x 3 x 3 products a value that takes about as long as in float or
# longer, with 7 x 7 x 3 it is faster (benchmarks/first_convolution.py).
ONNXRUNTIME = Target(
    name="onnxruntime",
    unsigned=True,
    symmetric=False,
    rules=(
        Rule(
            Kind.CONVOLUTION,
            "compute",
            "QLinearConv; needs a quantized output",
            output=True,
            few_products=FewProducts(4, 27),
        ),
        Rule(Kind.TRANSPOSED_CONVOLUTION, "weight", "no integer kernel: computed in float from int8 weights"),
        Rule(Kind.LINEAR, "compute", "QGemm (2-d input) or MatMulIntegerToFloat"),
        Rule(Kind.MATMUL, "compute", "MatMulIntegerToFloat"),
        _EMBEDDING,
        Rule(Kind.ADD, "follow", "QLinearAdd"),
        Rule(Kind.MUL, "follow", "QLinearMul"),
        Rule(Kind.CONCAT, "follow", "QLinearConcat; one range makes it a copy", shared=True),
        Rule(Kind.AVERAGE_POOL, "follow", "QLinearAveragePool"),
        Rule(Kind.GLOBAL_AVERAGE, "follow", "QLinearGlobalAveragePool"),
    ),
    integer_bias=True,
    skip_only=False,
    attention=False,
    reduce_range="auto",
    pairs=True,
    exact=True,
    rounds_inputs=32,
    matmul_nbits=True,
    # QuantizeLinear and DequantizeLinear of opset 21 take uint16 and int16; no integer kernel reads them.
    activation_bits=(8, 16),
    reference="https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html and "
    "https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md",
)

OPENVINO = Target(
    name="openvino",
    unsigned=True,
    symmetric=False,
    rules=(
        Rule(Kind.CONVOLUTION, "compute", "Convolution and GroupConvolution in int8"),
        Rule(Kind.TRANSPOSED_CONVOLUTION, "compute", "ConvolutionBackpropData in int8"),
        Rule(Kind.LINEAR, "compute", "MatMul in int8"),
        Rule(Kind.MATMUL, "compute", "MatMul in int8"),
        _EMBEDDING,
        Rule(Kind.ADD, "follow", "Add with dequantization moved behind it"),
        Rule(Kind.MUL, "follow", "Multiply with dequantization moved behind it"),
        Rule(Kind.CONCAT, "follow", "Concat; inputs with one range stay in int8", shared=True),
        Rule(Kind.AVERAGE_POOL, "follow", "AvgPool in int8"),
        Rule(Kind.GLOBAL_AVERAGE, "follow", "ReduceMean in int8"),
    ),
    integer_bias=False,
    skip_only=False,
    attention=False,
    reduce_range="auto",
    reference="https://docs.openvino.ai/2024/openvino-workflow/model-optimization-guide/"
    "quantizing-models-post-training.html and the low precision transformations it names",
)

TENSORRT = Target(
    name="tensorrt",
    unsigned=False,
    symmetric=True,
    rules=(
        Rule(Kind.CONVOLUTION, "compute", "IConvolutionLayer in int8"),
        Rule(Kind.TRANSPOSED_CONVOLUTION, "compute", "IDeconvolutionLayer in int8"),
        Rule(Kind.LINEAR, "compute", "IMatrixMultiplyLayer in int8"),
        Rule(Kind.MATMUL, "compute", "IMatrixMultiplyLayer in int8"),
        _EMBEDDING,
        Rule(Kind.ADD, "follow", "fused into the convolution before it; the skip branch is quantized"),
        Rule(Kind.CONCAT, "follow", "IConcatenationLayer; inputs share one scale", shared=True),
        Rule(Kind.AVERAGE_POOL, "follow", "IPoolingLayer in int8"),
        Rule(Kind.GLOBAL_AVERAGE, "follow", "IReduceLayer in int8"),
    ),
    integer_bias=False,
    skip_only=True,
    attention=False,
    reduce_range=False,
    reference="https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html",
)

# Neither OpenVINO nor TensorRT has activations of 16 bits: the low precision transformations of the former work on
# FakeQuantize of at most 256 levels, and of the latter's quantized types (INT8, INT4, FP8, FP4) none has 16 bits.
TARGETS = {target.name: target for target in (ONNXRUNTIME, OPENVINO, TENSORRT)}


def find_target(target: str | Target) -> Target:
    """The target of that name (or the one given).

    Raises:
        RecipeError: no target bears the name; the known ones are listed.
    """
    if isinstance(target, Target):
        return target
    if not isinstance(target, str) or target not in TARGETS:
        raise RecipeError(f"unknown target {target!r}; known targets: {', '.join(TARGETS)}")
    return TARGETS[target]


def check_activation_bits(target: Target, recipe: Recipe) -> None:
    """Refuses activations of a width that a target does not take.

    Raises:
        RecipeError: it names the place, the target and what it takes.
    """
    taken = " or ".join(map(str, target.activation_bits))
    wider = ", ".join(repr(t.name) for t in TARGETS.values() if 16 in t.activation_bits)
    for where, scope in recipe.scopes():
        descriptor = scope.activations
        if isinstance(descriptor, QuantDescriptor) and descriptor.num_bits not in target.activation_bits:
            raise RecipeError(
                f"{where}activations.num_bits={descriptor.num_bits}: target {target.name!r} takes activations of "
                f'{taken} bits, or in float (activations="float"); 16 bits are for {wider}. See {target.reference}'
            )


def reduces_range(target: Target, asked: bool | str | None) -> bool:
    """Whether weights avoid saturation: what the recipe asks, else the target's setting; "auto" looks at this
    processor.

    x86 processors without VNNI multiply u8 by s8 and add two products in 16 bits, with saturation: see
    `qdq.saturation`.
    """
    setting = target.reduce_range if asked is None else asked
    return saturates_u8s8() is True if setting == "auto" else bool(setting)
