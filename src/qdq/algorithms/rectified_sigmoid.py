"""The variables that AdaRound learns: the share of the way from the code below a weight to the one above it."""

from __future__ import annotations

import torch
from torch import Tensor

# The rectified sigmoid (Nagel et al. 2020, arXiv:2004.10568, equation 23) is stretched, so that it reaches 0 and 1.
LOW, HIGH = -0.1, 1.1
# Exponent of the regulariser, from its first to its last step: a hard pull too early freezes bad choices.
_FIRST_EXPONENT, _LAST_EXPONENT = 20.0, 2.0


def rectified_sigmoid(variable: Tensor) -> Tensor:
    """The share, from 0 to 1."""
    return (torch.sigmoid(variable) * (HIGH - LOW) + LOW).clamp(0, 1)


def variable_of(share: Tensor) -> Tensor:
    """The inverse of `rectified_sigmoid`."""
    return torch.logit((share - LOW) / (HIGH - LOW))


def exponent_at(passed: float) -> float:
    """The regulariser's exponent after a share of its steps."""
    return _LAST_EXPONENT + (_FIRST_EXPONENT - _LAST_EXPONENT) * (1 - passed)


def rounding_penalty(variable: Tensor, passed: float) -> Tensor:
    """The regulariser of each value, 1 - |2 share - 1| ** exponent (equation 24): 0 where the share is 0 or 1."""
    return 1 - (2 * rectified_sigmoid(variable) - 1).abs().pow(exponent_at(passed))
