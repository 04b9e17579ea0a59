"""docs/kernels.md: its example runs, and it names every operator."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qdq.kernels.operations import OPERATORS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"

pytestmark = pytest.mark.skipif(not DOCUMENT.is_file(), reason="not run from a source tree")


def test_the_example_runs() -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(DOCUMENT), "exec"), names)
    weight, quantized = names["weight"], names["quantized"]
    assert 0 < (quantized - weight).abs().max() < 0.5  # type: ignore[operator]


def test_every_operator_has_its_place_in_the_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    missing = [op._name for op in OPERATORS if f"`{op._name}`" not in text]
    assert not missing
