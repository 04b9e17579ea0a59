"""`pytorch_quantization.utils`, statement by statement of its published contract."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from pytorch_quantization import utils
from pytorch_quantization.utils import quant_logging, reduce_amax


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.mark.parametrize("axis", [0, 2, -1, (0, 1), [0, 2], (-1, 0), (1,), (0, 1, 2), None])
@pytest.mark.parametrize("keepdims", [True, False])
def test_reduce_amax(x: torch.Tensor, axis: Any, keepdims: bool) -> None:
    found = reduce_amax(x, axis=axis, keepdims=keepdims)
    numpy_axis = tuple(axis) if isinstance(axis, list) else axis
    expected = np.abs(x.detach().numpy()).max(axis=numpy_axis, keepdims=keepdims)
    if expected.size == 1:
        expected = expected.reshape(())
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found.numpy(), expected)
    assert not found.requires_grad
    assert utils.reduce_amax is reduce_amax


def test_reduce_amax_defaults_and_one_value(x: torch.Tensor) -> None:
    assert torch.equal(reduce_amax(x), x.detach().abs().max())
    assert reduce_amax(x, (0, 1)).shape == (1, 1, 5)
    for keepdims in (True, False):
        assert reduce_amax(torch.ones(1, 4), 1, keepdims).shape == ()
        assert reduce_amax(torch.tensor([[-3.0]]), 0, keepdims) == 3


@pytest.mark.parametrize("axis", [(0, 1, 2, 0), (0, 1, 2, 3), [0, 1, 2, -1]])
def test_more_axes_than_there_are(x: torch.Tensor, axis: Any) -> None:
    with pytest.raises(ValueError, match="Cannot reduce more axes"):
        reduce_amax(x, axis)


def test_reset_logger_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.NullHandler(), logging.StreamHandler()])
    quant_logging.reset_logger_handler()
    assert root.handlers == []
    quant_logging.reset_logger_handler()
    assert root.handlers == []
