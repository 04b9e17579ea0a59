"""Makes `fixtures` importable from every test: `from fixtures.zoo import ZOO`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

_HERE = str(Path(__file__).parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)


def _remember_translations() -> None:
    """Has PyTorch's exporter read the table of its translations once, not in every export of the hundreds here.

    It is the same table each time, and takes longer to read than a small model to export.
    """
    try:
        import onnxscript._framework_apis.torch_2_11 as apis
    except ImportError:  # another version of onnxscript: slower, nothing else
        return
    apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)


_remember_translations()
