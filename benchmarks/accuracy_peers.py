"""The peers of accuracy.py that give a PyTorch model: each by its own documented calls, 8-bit weights and activations.

What runs is the peer's own simulation in PyTorch, on the CPU; there is no file that ONNX Runtime would run in
integers. Each function takes the case, and returns the quantized model and how many quantizers are on in it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from torch import fx, nn

Made = tuple[Callable[..., Any], int]


def _calibrate(model: Callable[..., Any], case: Case) -> None:
    with torch.no_grad():
        for batch in case.calibration:
            model(*batch)


def by_modelopt(case: Case, algorithm: str = "max") -> Made:
    """ModelOpt: `mtq.quantize`; `INT8_DEFAULT_CFG` for CNNs, `INT8_SMOOTHQUANT_CFG` for transformers.

    `algorithm="histogram"` calibrates activations with its histogram calibrator and entropy.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    smooth = case.kind == "transformer" and algorithm == "max"
    config: Any = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG if smooth else mtq.INT8_DEFAULT_CFG)
    if algorithm == "histogram":
        from modelopt.torch.quantization.calib import HistogramCalibrator

        config["algorithm"] = None
        made = mtq.quantize(copy.deepcopy(case.model), config, None)
        named = [(n, m) for n, m in made.named_modules() if isinstance(m, TensorQuantizer) and m.is_enabled]
        inputs = [m for n, m in named if n.endswith("input_quantizer")]
        for module in made.modules():
            quantizer = getattr(module, "weight_quantizer", None)
            if isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled:
                quantizer.amax = module.weight.detach().abs().amax(tuple(range(1, module.weight.dim())), keepdim=True)
        for module in inputs:
            module._calibrator = HistogramCalibrator(8, None, False)
            module.disable_quant()
            module.enable_calib()
        _calibrate(made, case)
        for module in inputs:
            if module._calibrator._calib_hist is not None:
                module.load_calib_amax("entropy")
            module.enable_quant()
            module.disable_calib()
    else:
        made = mtq.quantize(copy.deepcopy(case.model), config, lambda model: _calibrate(model, case))
    if case.kind == "transformer":
        # Quantized residual sums, which its default has, cost it most of the task; nobody else's default has them.
        mtq.disable_quantizer(made, "*LayerNorm*")
    on = [m for m in made.modules() if isinstance(m, TensorQuantizer) and m.is_enabled]
    return made.eval(), len(on)


def by_torchao(case: Case) -> Made:
    """torchao: PT2E with the quantizer for x86, whose integer kernels are those of Inductor."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    dims = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in case.dynamic)
    # Strict, as its patterns go by what that notes of each call; and what nothing reads (BERT's pooler) stops them.
    exported = torch.export.export(case.model, case.calibration[0], dynamic_shapes=dims, strict=True).module()
    assert isinstance(exported, fx.GraphModule)
    exported.graph.eliminate_dead_code()
    exported.recompile()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    _calibrate(prepared, case)
    made = convert_pt2e(prepared)
    on = [n for n in made.graph.nodes if "quantized_decomposed.quantize" in str(n.target)]
    return made, len(on)


def by_brevitas(case: Case) -> Made:
    """Brevitas: its post-training flow, `preprocess_for_quantize`, `quantize`, calibration and bias correction.

    A model that its tracer does not take (transformers) is quantized layer by layer, without bias correction, which
    would ruin it.
    """
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize, quantize
    from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    model = copy.deepcopy(case.model).eval()
    if case.kind == "cnn":
        prepared = preprocess_for_quantize(
            model, equalize_iters=20, equalize_merge_bias=True, merge_bn=True, trace_model=True
        )
        made = quantize(prepared)
    else:
        settings = {
            "input_quant": Int8ActPerTensorFloat,
            "weight_quant": Int8WeightPerChannelFloat,
            "return_quant_tensor": False,
        }
        made = layerwise_quantize(model, compute_layer_map={nn.Linear: (qnn.QuantLinear, settings)})
    made.eval()
    with torch.no_grad(), calibration_mode(made):
        for batch in case.calibration:
            made(*batch)
    if case.kind == "cnn":
        with torch.no_grad(), bias_correction_mode(made):
            for batch in case.calibration:
                made(*batch)
    proxies = (ActQuantProxyFromInjector, WeightQuantProxyFromInjector)
    return made, len([m for m in made.modules() if isinstance(m, proxies) and m.is_quant_enabled])


def quiet() -> None:
    """Keeps the peers' warnings off the table."""
    warnings.simplefilter("ignore")
