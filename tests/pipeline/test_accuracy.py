"""S1 and S2, trained: what an INT8 deployment costs them on the committed images of Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import qdq
from fixtures import fashion
from fixtures.classifiers import s1, s2
from pipeline.helpers import operations, optimized_graph, quantize, run_file, run_model, sqnr_db
from qdq.constant_quantizers import WeightQuantizer


@pytest.mark.parametrize(
    ("build", "loss", "floor"),
    # One image is 0.1 point here. S1 loses none of ten thousand's 0.1; a thousand images may sway by a few of those
    # that lie between two classes.
    [pytest.param(s1, 0.003, 35.0, id="S1"), pytest.param(s2, 0.005, 25.0, id="S2")],
)
def test_trained_classifier_keeps_its_accuracy_as_deployed(build, loss, floor, tmp_path: Path) -> None:
    model = build()
    calibration = fashion.load("train", limit=128)[0]
    images, labels = fashion.load("test")
    qmodel = quantize(model, calibration.split(64))
    path = qdq.export_onnx(qmodel, tmp_path / "m.onnx")

    parts = images.split(250)
    reference = [run_model(model, [part])[0] for part in parts]
    deployed = [run_file(path, [part])[0] for part in parts]
    correct = [(np.concatenate(o).argmax(1) == labels.numpy()).mean() for o in (reference, deployed)]
    assert correct[1] >= correct[0] - loss
    assert sqnr_db(reference, deployed) >= floor

    fidelity = qdq.verify(qmodel, path, [(part, 0) for part in images.split(50)[:2]], progress=False)
    assert fidelity.sqnr_db > 40 and fidelity.agreement is not None and fidelity.agreement >= 0.99
    executed = operations(optimized_graph(path))
    assert executed["Conv"] == executed["FusedConv"] == executed["Add"] == 0 and executed["QLinearAdd"] >= 3


def test_lower_bits_and_coarser_ranges_cost_more_of_every_weight() -> None:
    def error(weight: torch.Tensor, bits: int, axis: int | None, method: str) -> float:
        quantizer = WeightQuantizer("w", bits, axis, weight.shape[0])
        quantizer.fit(weight, method)
        return float((quantizer(weight) - weight).square().sum())

    weights = [p.detach() for n, p in s1().named_parameters() if p.dim() == 4]
    assert len(weights) == 15
    for weight in weights:
        eight, four, coarse = error(weight, 8, 0, "max"), error(weight, 4, 0, "max"), error(weight, 4, None, "max")
        assert 100 * eight < four < coarse
        assert error(weight, 4, 0, "mse") < four and error(weight, 4, None, "mse") < coarse
