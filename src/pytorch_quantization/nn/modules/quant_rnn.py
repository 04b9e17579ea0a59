"""Old import name: see :mod:`qdq.nn.lstm`."""

from qdq.nn.lstm import QuantLSTM, QuantLSTMCell

LSTM = QuantLSTM
LSTMCell = QuantLSTMCell

__all__ = ["LSTM", "LSTMCell", "QuantLSTM", "QuantLSTMCell"]
