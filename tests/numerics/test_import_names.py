"""The published import names, exactly as code in the field writes them."""

from __future__ import annotations

import torch


def test_published_example_through_both_names() -> None:
    import qdq.functional
    from pytorch_quantization import tensor_quant

    torch.manual_seed(12345)
    x = torch.rand(10)
    for functions in (tensor_quant, qdq.functional):
        codes, scale = functions.tensor_quant(x, x.abs().max())
        assert codes.tolist() == [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]
        assert f"{scale.item():.4f}" == "128.0057"
        fake = functions.fake_tensor_quant(x, x.abs().max())
        assert [f"{v:.4f}" for v in fake.tolist()] == [
            *("0.9843", "0.8828", "0.9921", "0.4609", "0.0859"),
            *("0.1797", "0.3672", "0.5703", "0.3359", "0.2109"),
        ]
    applied, scale = tensor_quant.TensorQuantFunction.apply(x, x.abs().max())
    assert torch.equal(applied, codes)
    assert torch.equal(tensor_quant.FakeTensorQuantFunction.apply(x, x.abs().max()), fake)


def test_names_are_the_same_objects() -> None:
    import qdq
    import qdq.calib
    import qdq.clip
    import qdq.descriptor
    import qdq.functional
    from pytorch_quantization import calib, nn, tensor_quant
    from pytorch_quantization.calib import HistogramCalibrator, MaxCalibrator
    from pytorch_quantization.nn import Clip, TensorQuantizer
    from pytorch_quantization.nn.modules.clip import Clip as SameClip
    from pytorch_quantization.nn.modules.tensor_quantizer import TensorQuantizer as SameQuantizer
    from pytorch_quantization.tensor_quant import QuantDescriptor, ScaledQuantDescriptor

    assert QuantDescriptor is ScaledQuantDescriptor is qdq.QuantDescriptor
    assert TensorQuantizer is SameQuantizer is qdq.TensorQuantizer
    assert Clip is SameClip is qdq.clip.Clip
    assert MaxCalibrator is qdq.calib.MaxCalibrator is calib.MaxCalibrator
    assert HistogramCalibrator is qdq.calib.HistogramCalibrator
    assert nn.TensorQuantizer is TensorQuantizer
    published = {n for n in (*qdq.descriptor.__all__, *qdq.functional.__all__) if "uantizeAffine" not in n}
    published.discard("fake_quantize_affine")
    assert set(tensor_quant.__all__) == published
    for name in published:
        assert getattr(tensor_quant, name) is getattr(qdq.descriptor, name, getattr(qdq.functional, name, None))
