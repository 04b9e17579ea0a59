"""Models for quantization-aware training, made by qdq and by other toolkits, each by its own documented calls.

All quantize weights to int8 per output channel and activations to 8 bits per tensor, of every convolution and linear
layer; ranges of activations come from one batch and stay fixed while time is taken. What else a toolkit quantizes by
default is left as it is: `quantizers` says how many are on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Trainable:
    """A model in training mode, and how many quantizers are on in it."""

    model: nn.Module
    quantizers: int


def by_float(model: nn.Module, batch: Tensor) -> Trainable:
    """The model as it is."""
    return Trainable(model.train(), 0)


def by_qdq(model: nn.Module, batch: Tensor) -> Trainable:
    """`qdq.nn.quantize_modules`, ranges by `qdq.calibrating`."""
    import qdq

    qdq.nn.quantize_modules(model)
    with qdq.calibrating(model, method="max"):
        model(batch)
    on = [m for m in model.modules() if isinstance(m, qdq.TensorQuantizer) and not m.disabled]
    return Trainable(model.train(), len(on))


def by_modelopt(model: nn.Module, batch: Tensor) -> Trainable:
    """ModelOpt: `mtq.quantize` with `INT8_DEFAULT_CFG`, which it recommends for CNNs."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    def run(quantized: nn.Module) -> None:
        with torch.no_grad():
            quantized(batch)

    made = mtq.quantize(model.eval(), mtq.INT8_DEFAULT_CFG, run)
    on = [m for m in made.modules() if isinstance(m, TensorQuantizer) and m.is_enabled]
    return Trainable(made.train(), len(on))


def by_brevitas(model: nn.Module, batch: Tensor) -> Trainable:
    """Brevitas: `layerwise_quantize` with its int8 quantizers, ranges in its `calibration_mode`."""
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    settings = {
        "input_quant": Int8ActPerTensorFloat,
        "weight_quant": Int8WeightPerChannelFloat,
        "return_quant_tensor": False,
    }
    layers = {nn.Conv2d: (qnn.QuantConv2d, settings), nn.Linear: (qnn.QuantLinear, settings)}
    made = layerwise_quantize(model, compute_layer_map=layers).eval()
    with torch.no_grad(), calibration_mode(made):
        made(batch)
    proxies = (ActQuantProxyFromInjector, WeightQuantProxyFromInjector)
    on = [m for m in made.modules() if isinstance(m, proxies) and m.is_quant_enabled]
    return Trainable(made.train(), len(on))


def by_torchao(model: nn.Module, batch: Tensor) -> Trainable:
    """torchao: `prepare_qat_pt2e` with the quantizer for x86, whose fake quantizers serve convolutions.

    Its `QATConfig` knows linear layers and embeddings only. The observers are off, as torchao advises for the later
    part of a training; activations have uint8 codes.
    """
    from torchao.quantization.pt2e import FakeQuantizeBase, disable_observer, move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    # Not strict, residual additions are not recognised: "Input partition has more than one output node".
    exported = torch.export.export(model.train(), (batch,), strict=True).module()
    made = prepare_qat_pt2e(exported, quantizer)
    move_exported_model_to_train(made)
    with torch.no_grad():
        made(batch)
    made.apply(disable_observer)
    return Trainable(made, sum(isinstance(m, FakeQuantizeBase) for m in made.modules()))


PEERS = {"modelopt": by_modelopt, "brevitas": by_brevitas, "torchao": by_torchao}
DISTRIBUTIONS = {"modelopt": "nvidia-modelopt", "brevitas": "brevitas", "torchao": "torchao"}
