"""Lets `torchvision` import beside a CPU build of PyTorch. Import this module before torchvision or transformers.

The wheel of torchvision on PyPI is linked to CUDA: its compiled operators do not load beside a CPU build of PyTorch.
`torchvision/_meta_registrations.py` registers fake implementations for two of them whatever happens, and fails where
their schemas are unknown. Declaring the two schemas is enough for every architecture of `torchvision.models`;
`torchvision.ops` stays unusable.
"""

from __future__ import annotations

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _declare_missing_schemas() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    return library


# A library's definitions vanish with the object, so it lives as long as the module.
LIBRARY = _declare_missing_schemas()
