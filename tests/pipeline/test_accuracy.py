"""S1 and S2, trained: what an INT8 deployment costs them on the committed images of Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import fashion
from fixtures.classifiers import s1, s2
from pipeline.helpers import operations, optimized_graph, quantize, run_file, run_model, sqnr_db

import qdq


@pytest.mark.parametrize(
    ("build", "loss", "floor"),
    # One image is 0.1 point here. S1 loses none of ten thousand's 0.1; a thousand images may sway by a few of those
    # that lie between two classes.
    [pytest.param(s1, 0.003, 35.0, id="S1"), pytest.param(s2, 0.005, 25.0, id="S2")],
)
def test_trained_classifier_keeps_its_accuracy_as_deployed(build, loss, floor, tmp_path: Path) -> None:
    model = build()
    calibration = fashion.load("train")[0]
    images, labels = fashion.load("test")
    qmodel = quantize(model, calibration.split(64))
    path = qdq.export_onnx(qmodel, tmp_path / "m.onnx")

    parts = images.split(250)
    reference = [run_model(model, [part])[0] for part in parts]
    deployed = [run_file(path, [part])[0] for part in parts]
    correct = [(np.concatenate(o).argmax(1) == labels.numpy()).mean() for o in (reference, deployed)]
    assert correct[1] >= correct[0] - loss
    assert sqnr_db(reference, deployed) >= floor

    fidelity = qdq.verify(qmodel, path, [(part, 0) for part in parts[:2]], progress=False)
    assert fidelity.sqnr_db > 40 and fidelity.agreement is not None and fidelity.agreement >= 0.99
    executed = operations(optimized_graph(path))
    assert executed["Conv"] == executed["FusedConv"] == executed["Add"] == 0 and executed["QLinearAdd"] >= 3


def test_lower_bits_cost_more() -> None:
    """The order is what can be promised: 8 bits, then 4 per channel, then 4 per tensor."""
    model, calibration = s1(), fashion.load("train", limit=128)[0]
    images = fashion.load("test", limit=250)[0]
    reference = run_model(model, [images])
    found = []
    for bits, axis in ((8, 0), (4, 0), (4, None)):
        weights = qdq.QuantDescriptor(num_bits=bits, axis=axis, narrow_range=True)
        qmodel = quantize(model, [calibration], recipe=qdq.Recipe(weights=weights, weight_calibration="mse"))
        found.append(sqnr_db(reference, run_model(qmodel, [images])))
    assert found == sorted(found, reverse=True) and found[0] > found[1] + 6
    assert torch.get_default_dtype() is torch.float32
