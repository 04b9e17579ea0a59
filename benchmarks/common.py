"""Shared by the scripts of this folder: the path to the test fixtures."""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
_TESTS = str(REPOSITORY / "tests")
if _TESTS not in sys.path:
    sys.path.insert(0, _TESTS)
