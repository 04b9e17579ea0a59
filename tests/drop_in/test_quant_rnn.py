"""The recurrent layers by their old import names, as code in the field writes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import qdq.nn
from pytorch_quantization import tensor_quant
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.nn.modules import quant_rnn
from pytorch_quantization.nn.modules.quant_rnn import LSTM, LSTMCell, QuantLSTM, QuantLSTMCell


def test_names() -> None:
    assert LSTM is QuantLSTM is qdq.nn.QuantLSTM and LSTMCell is QuantLSTMCell is qdq.nn.QuantLSTMCell
    assert set(quant_rnn.__all__) == {"LSTM", "LSTMCell", "QuantLSTM", "QuantLSTMCell"}


def test_default_descriptors() -> None:
    assert QuantLSTM.default_quant_desc_input == tensor_quant.QUANT_DESC_8BIT_PER_TENSOR
    for kind in (QuantLSTM, QuantLSTMCell):
        assert kind.default_quant_desc_weight == tensor_quant.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW


def test_lists_of_quantizers_and_their_index() -> None:
    lstm = quant_rnn.QuantLSTM(
        3,
        5,
        num_layers=2,
        bidirectional=True,
        quant_desc_input=tensor_quant.QuantDescriptor(amax=2.0),
        quant_desc_weight=tensor_quant.QUANT_DESC_8BIT_PER_TENSOR,
    )
    names = [name for name, module in lstm.named_modules() if isinstance(module, TensorQuantizer)]
    assert names == [f"_{kind}_quantizers.{i}" for kind in ("input", "weight") for i in range(4)]
    assert all(quantizer.amax == 2.0 for quantizer in lstm._input_quantizers)
    seen: list[int] = []
    for i, quantizer in enumerate(lstm._weight_quantizers):
        quantizer.register_forward_hook(lambda _, inputs, __, i=i: seen.append(i))
    lstm(torch.randn(2, 1, 3))
    assert seen == [0, 1, 2, 3]


def test_state_dicts_pass_both_ways() -> None:
    plain = nn.LSTM(3, 5, 2)
    quantized = QuantLSTM(3, 5, 2)
    quantized.load_state_dict(plain.state_dict())
    plain.load_state_dict(quantized.state_dict())
    x = torch.randn(4, 2, 3)
    for module in quantized.modules():
        if isinstance(module, TensorQuantizer):
            module.disable()
    torch.testing.assert_close(quantized(x)[0], plain(x)[0])


@pytest.mark.parametrize("kind", [QuantLSTM, QuantLSTMCell])
def test_refusals(kind: type) -> None:
    with pytest.raises(TypeError, match="Unused keys"):
        kind(3, 5, quant_desc_inputs=None)
    with pytest.raises(ValueError, match="Only fake quantization is supported"):
        kind(3, 5, quant_desc_input=tensor_quant.QuantDescriptor(fake_quant=False))
    with pytest.raises(ValueError):
        kind.set_default_quant_desc_input(8)


def test_layer_refusals() -> None:
    with pytest.raises(ValueError):
        QuantLSTM(3, 5, proj_size=2)
    with pytest.raises(RuntimeError):
        QuantLSTM(3, 5)(torch.randn(2, 3))


def test_defect_unsorted_packed_sequence() -> None:
    lstm, plain = QuantLSTM(3, 5), nn.LSTM(3, 5)
    plain.load_state_dict(lstm.state_dict())
    for module in lstm.modules():
        if isinstance(module, TensorQuantizer):
            module.disable()
    packed = pack_padded_sequence(torch.randn(4, 3, 3), torch.tensor([1, 4, 2]), enforce_sorted=False)
    (output, (h, c)), (expected, (expected_h, expected_c)) = lstm(packed), plain(packed)
    torch.testing.assert_close(pad_packed_sequence(output)[0], pad_packed_sequence(expected)[0])
    torch.testing.assert_close((h, c), (expected_h, expected_c))


def test_defect_input_quantizer_property() -> None:
    lstm: Any = QuantLSTM(3, 5, 2)
    assert list(lstm.input_quantizer) == list(lstm._input_quantizers)
