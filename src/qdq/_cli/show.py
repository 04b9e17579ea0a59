"""Tables and lines that the commands print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from qdq._cli.onnx_survey import QuantizedTensor, Survey


def step(console: Console, name: str, text: str) -> None:
    """One line that says what begins."""
    console.print(f"[bold]{name:9}[/bold] {escape(text)}", soft_wrap=True)


def decibels(value: float) -> str:
    """An SQNR for a reader: infinite means that every output is equal."""
    if math.isinf(value) and value > 0:
        return "equal to the simulation"
    return f"SQNR {value:.1f} dB"


def size(count: int) -> str:
    """Bytes in a unit that leaves one to four digits before the point."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def scores(console: Console, values: Mapping[str, float]) -> None:
    """The user's score, float and deployed, side by side."""
    table = Table("model", "score")
    for name, value in values.items():
        table.add_row(escape(name), f"{value:.6g}")
    console.print(table)


def survey(console: Console, found: Survey) -> None:
    """The report of `qdq inspect`."""
    heading = f"{found.path}: {size(found.file_bytes)}, opset {found.opset}, {found.producer}"
    console.print(heading, markup=False, soft_wrap=True)
    if found.tensors:
        table = Table(
            "tensor", "role", "codes", "granularity", "step size", "zero point", "read by", title="Quantized tensors"
        )
        for tensor in found.tensors:
            table.add_row(*(escape(cell) for cell in _cells(tensor)))
        console.print(table)
    if found.float_operations:
        table = Table("operation", "type", "quantized operands", title="In float, wholly or in part")
        for operation in found.float_operations:
            table.add_row(
                escape(operation.name), operation.op_type, f"{operation.quantized_operands} of {operation.operands}"
            )
        console.print(table)
    integers = sum(found.integer_operations.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.integer_operations.most_common())
    console.print(f"operations   {integers} with quantized operands" + (f" ({kinds})" if kinds else ""), soft_wrap=True)
    console.print(f"             {len(found.float_operations)} in float, wholly or in part")
    roles = ", ".join(f"{found.count(role)} {name}" for role, name in _ROLES.items() if found.count(role))
    console.print(f"tensors      {len(found.tensors)} quantized" + (f" ({roles})" if roles else ""))
    console.print(f"constants    {size(found.code_bytes)} as integers, {size(found.float_bytes)} as floats")


_ROLES = {"weight": "weights", "bias": "biases", "activation": "activations"}


def _cells(tensor: QuantizedTensor) -> tuple[str, ...]:
    if tensor.step_low is None or tensor.step_high is None:
        steps = "computed"
    elif tensor.step_low == tensor.step_high:
        steps = f"{tensor.step_low:.4g}"
    else:
        steps = f"{tensor.step_low:.4g} to {tensor.step_high:.4g}"
    zero_point = "computed" if tensor.zero_point is None else str(tensor.zero_point)
    used_by = ", ".join(tensor.used_by)
    return tensor.name, tensor.role, tensor.dtype, tensor.granularity, steps, zero_point, used_by


def comparison(title: str, rows: Iterable[tuple[str, str, str, str]]) -> Table:
    """fp32 beside int8: rows of what, fp32, int8, and a remark."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("fp32", justify="right")
    table.add_column("int8", justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table
