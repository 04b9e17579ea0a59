"""What the tests of QuantMultiheadAttention share: small instances beside torch's, inputs, masks, calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qdq.nn import QuantMultiheadAttention, TensorQuantizer

E, H = 8, 2
N, L, S = 3, 4, 5
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
NAMES = {f"_{p}_{what}_quantizer" for p in PARTS for what in ("input", "weight")} | {
    f"_{operand}_quantizer" for operand in ("q", "k", "v", "probs")
}


def quantizers(module: nn.Module) -> dict[str, TensorQuantizer]:
    return {name: m for name, m in module.named_modules() if isinstance(m, TensorQuantizer)}


def disabled(module: Any) -> Any:
    for quantizer in quantizers(module).values():
        quantizer.disable()
    return module


def collect(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    for quantizer in quantizers(module).values():
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        module(*args, **kwargs)


def calibrate(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    collect(module, *args, **kwargs)
    for quantizer in quantizers(module).values():
        quantizer.load_calib_amax()
        quantizer.disable_calib()
        quantizer.enable_quant()


def convert(module: Any) -> Any:
    """An existing instance, as a converter of whole models treats it."""
    module.__class__ = QuantMultiheadAttention
    module.add_quantizers(
        QuantMultiheadAttention.default_quant_desc_input, QuantMultiheadAttention.default_quant_desc_weight
    )
    return module


def twins(seed: int = 3, **arguments: Any) -> tuple[nn.MultiheadAttention, QuantMultiheadAttention]:
    torch.manual_seed(seed)
    of_torch = nn.MultiheadAttention(E, H, **arguments)
    after = torch.rand(1)
    torch.manual_seed(seed)
    ours = QuantMultiheadAttention(E, H, **arguments)
    assert torch.equal(torch.rand(1), after)
    for module in (of_torch, ours):  # torch starts biases at 0
        torch.manual_seed(seed)
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    return of_torch, ours


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def masks(kind: str | None, shape: tuple[int, ...], causal: bool = False) -> Tensor | None:
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(9)
    closed = torch.ones(shape, dtype=torch.bool).triu(1) if causal else torch.rand(shape, generator=generator) > 0.6
    closed[..., 0] = False
    if kind == "bool":
        return closed
    values = torch.zeros(shape, dtype=torch.float64) if causal else torch.randn(shape, generator=generator).double()
    return values.masked_fill(closed, -torch.inf)
