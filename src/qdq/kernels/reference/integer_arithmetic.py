"""What integer operations of a runtime compute after their exact sums, rounding by rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def requantize(sums: list[Tensor], bias: Tensor | None, ratio: Tensor, step: Tensor) -> Tensor:
    """``round(float32(sum of sums + bias) * ratio) * step``: the end of QLinearConv, in values instead of codes.

    Args:
        sums: float32 or float64 tensors of one shape, [batch, channels, ...], each an exact integer. The first may be
            overwritten.
        bias: integers in float64, [channels]; they may need more bits than float32 has.
        ratio: float32, 0-d or [channels]: step of the sums over step of the result.
        step: float32, 0-d: of the result.

    Returns:
        float32, on the grid of ``step``; not clamped.
    """
    channels = [1, -1, *[1] * (sums[0].dim() - 2)]
    total = sums[0]
    for more in sums[1:]:
        total = total.double() + more
    if bias is not None:
        total = total.double() + bias.reshape(channels)
    return torch.round(total.float() * (ratio.reshape(channels) if ratio.dim() else ratio)) * step


def add_codes(
    a: Tensor,
    b: Tensor,
    steps: tuple[Tensor, Tensor, Tensor],
    zero_points: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """The sum of two tensors as QLinearAdd computes it, in values instead of codes.

    ``fma(a, s_a / s_y, fma(b, s_b / s_y, fixed))`` in float32 with the codes of ``a`` and ``b``, the zero points in
    ``fixed``; half to even; the zero point of the result subtracted, times its step.

    Args:
        a, b: float32, values on the grids of their steps; they broadcast.
        steps: float32, 0-d: of a, of b, of the result.
        zero_points: of a, of b, of the result, 0-d.
    """
    step_a, step_b, step = steps
    ratio_a, ratio_b, fixed = add_constants(steps, zero_points)
    zero_a, zero_b, zero = (float(point) for point in zero_points)
    codes_a, codes_b = torch.round(a / step_a) + zero_a, torch.round(b / step_b) + zero_b
    value = fma(codes_a, ratio_a, fma(codes_b, ratio_b, fixed.double()).double())
    return (torch.round(value) - zero) * step


def add_constants(
    steps: tuple[Tensor, Tensor, Tensor], zero_points: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """``s_a / s_y``, ``s_b / s_y`` and the part of the sum that the zero points give, float32."""
    step_a, step_b, step = steps
    ratio_a, ratio_b = step_a / step, step_b / step
    zero_a, zero_b, zero = (float(point) for point in zero_points)
    fixed = (zero - fma(ratio_a, zero_a, (ratio_b * zero_b).double()).double()).float()
    return ratio_a, ratio_b, fixed


def fma(x: Tensor, y: Tensor | float, z: Tensor) -> Tensor:
    """x * y + z rounded once to float32; products of codes and ratios are exact in float64."""
    return (x.double() * y + z).float()
