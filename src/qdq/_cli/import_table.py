"""Where the names of the `pytorch_quantization` toolkit live in qdq: the table behind `qdq migrate`."""

from __future__ import annotations

OLD_PACKAGE = "pytorch_quantization"

_LAYERS = (
    *(f"Conv{d}d" for d in (1, 2, 3)),
    *(f"ConvTranspose{d}d" for d in (1, 2, 3)),
    *("Linear", "LSTM", "LSTMCell"),
    *(f"{kind}Pool{d}d" for kind in ("Max", "Avg", "AdaptiveAvg") for d in (1, 2, 3)),
)
_NORMS = tuple(f"InstanceNorm{d}d" for d in (1, 2, 3))
_FILE_OF_LAYER = {"Conv": "quant_conv", "Linear": "quant_linear", "LSTM": "quant_rnn"}
_FUNCTIONS = (
    "tensor_quant fake_tensor_quant legacy_fake_tensor_quant fake_affine_tensor_quant scaled_e4m3 TensorQuantFunction "
    "FakeTensorQuantFunction LegacyFakeTensorQuantFunction FakeAffineTensorQuantFunction ScaledE4M3Function"
).split()
_PREDEFINED = (
    "QUANT_DESC_8BIT_PER_TENSOR QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW "
    "QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL "
    "QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL "
    "QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL"
).split()


def _table() -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {}

    def put(old: str, *native: str) -> None:
        table[f"{OLD_PACKAGE}.{old}"] = tuple(f"qdq.{name}" for name in native)

    for name in _FUNCTIONS:
        put(f"tensor_quant.{name}", f"functional.{name}")
    for name in _PREDEFINED:
        put(f"tensor_quant.{name}", f"descriptor.{name}")
    put("tensor_quant.QuantDescriptor", "QuantDescriptor", "descriptor.QuantDescriptor")
    put("tensor_quant.ScaledQuantDescriptor", "QuantDescriptor", "descriptor.ScaledQuantDescriptor")

    for layer in (*_LAYERS, *_NORMS):
        kind = "Conv" if layer.startswith("Conv") else layer.removesuffix("Cell")
        file = _FILE_OF_LAYER.get(kind, "quant_instancenorm" if layer in _NORMS else "quant_pooling")
        # The norms never had a second name without the prefix.
        for name in (f"Quant{layer}", layer) if layer in _LAYERS else (f"Quant{layer}",):
            put(f"nn.{name}", f"nn.Quant{layer}")
            put(f"nn.modules.{file}.{name}", f"nn.Quant{layer}")
    put("nn.modules.quant_conv._QuantConvNd", "nn.conv.QuantConvNd")
    put("nn.modules.quant_conv._QuantConvTransposeNd", "nn.conv_transpose.QuantConvTransposeNd")
    put("nn.TensorQuantizer", "nn.TensorQuantizer", "quantizer.TensorQuantizer", "TensorQuantizer")
    put(
        "nn.modules.tensor_quantizer.TensorQuantizer",
        "TensorQuantizer",
        "quantizer.TensorQuantizer",
        "nn.TensorQuantizer",
    )
    put("nn.Clip", "nn.Clip", "clip.Clip")
    put("nn.modules.clip.Clip", "nn.Clip", "clip.Clip")
    put("nn.functional.clip", "clip.clip")
    put("nn.functional.ClipFunction", "clip.ClipFunction")
    for name in ("QuantMixin", "QuantInputMixin", "pop_quant_desc_in_kwargs"):
        put(f"nn.modules._utils.{name}", f"nn.quantized_module.{name}")

    for name in ("MaxCalibrator", "HistogramCalibrator", "calibrate_weights"):
        put(f"calib.{name}", f"calib.{name}")
    put("calib.max.MaxCalibrator", "calib.MaxCalibrator")
    for name in ("HistogramCalibrator", "calibrate_weights"):
        put(f"calib.histogram.{name}", f"calib.{name}")
    put("calib.calibrator._Calibrator", "calib.calibrator.Calibrator")

    for name in ("initialize", "deactivate"):
        put(name, f"nn.replacement.{name}")
        put(f"quant_modules.{name}", f"nn.replacement.{name}")
    put("quant_modules.QuantModuleReplacementHelper", "nn.replacement.QuantModuleReplacementHelper")
    for name in ("enable_onnx_export", "quant_modules.enable_onnx_export"):
        put(name, "export.readiness.enable_onnx_export")
    for name in ("match_parameters", "group_parameters", "freeze_parameters", "quant_weight_inplace"):
        put(f"optim.helper.{name}", f"train.{name}")
    put("utils.reduce_amax", "calib.calibrator.reduce_amax")
    return table


NATIVE: dict[str, tuple[str, ...]] = _table()
"""Every published name, and the native names of the same object; the first is what a `from` import becomes."""

SAME_ROLE: dict[str, tuple[str, ...]] = {
    OLD_PACKAGE: ("qdq",),
    **{
        f"{OLD_PACKAGE}.{old}": tuple(f"qdq.{name}" for name in native)
        for old, native in {
            "tensor_quant": ("functional", "descriptor"),
            "nn": ("nn",),
            "nn.modules": ("nn",),
            "nn.functional": ("clip",),
            "nn.modules.tensor_quantizer": ("quantizer",),
            "nn.modules.quant_conv": ("nn",),
            "nn.modules.quant_linear": ("nn",),
            "nn.modules.quant_pooling": ("nn",),
            "nn.modules.quant_instancenorm": ("nn",),
            "nn.modules.quant_rnn": ("nn",),
            "nn.modules.clip": ("clip",),
            "nn.modules._utils": ("nn.quantized_module",),
            "calib": ("calib",),
            "calib.calibrator": ("calib.calibrator",),
            "calib.max": ("calib",),
            "calib.histogram": ("calib",),
            "quant_modules": ("nn.replacement", "export.readiness"),
            "optim": ("train",),
            "optim.helper": ("train",),
            "utils": ("calib.calibrator",),
            "utils.quant_logging": (),
        }.items()
    },
}
"""Every published module, and the native modules that may stand in its place where they hold all that is used."""

NOT_LOADED_BY_QDQ = frozenset({"qdq.export.readiness", "qdq.nn.replacement", "qdq.train"})
"""Native modules that are no attributes of `qdq` or a part of it until they are imported themselves."""

WITHOUT_NATIVE_NAME: dict[str, str] = {
    f"{OLD_PACKAGE}.__version__": "the version of the old interface, which only the old name has",
    f"{OLD_PACKAGE}.utils.quant_logging.reset_logger_handler": "qdq installs no log handler: the call can go",
}
"""Published names that stay with the old package, and why."""

_PUBLISHED = frozenset({*NATIVE, *SAME_ROLE, *WITHOUT_NATIVE_NAME})


def is_old_module(name: str) -> bool:
    """Whether the dotted name is a module of the old package."""
    return name in SAME_ROLE


def module_of(name: str) -> str:
    """`a.b` of `a.b.c`; empty for a name without a dot."""
    return name.rpartition(".")[0]


def native_below(old: str, module: str) -> str | None:
    """The native name of an old one that attributes of a native module lead to, if there is one."""
    for name in NATIVE[old]:
        home = module_of(name)
        if name.startswith(f"{module}.") and (home == module or home not in NOT_LOADED_BY_QDQ):
            return name
    return None


def is_lost(path: str, target: str, module: str, *, begins: bool = False) -> bool:
    """Whether something of an old module is not found under the same dotted path of a native one.

    Args:
        path: `.dotted.path` below `target`; what follows a published name in it does not matter.
        target: the old module.
        module: the native module that takes its place.
        begins: `path` is only the beginning of one.
    """
    if begins:
        return any(_is_lost(name, target, module) for name in _PUBLISHED if name.startswith(target + path))
    old = target + path
    while old not in _PUBLISHED:
        old = module_of(old)
    return old != target and _is_lost(old, target, module)


def _is_lost(old: str, target: str, module: str) -> bool:
    expected = module + old.removeprefix(target)
    if old in SAME_ROLE:
        return expected not in SAME_ROLE[old]
    reachable = module_of(expected) == module or module_of(expected) not in NOT_LOADED_BY_QDQ
    return not reachable or expected not in NATIVE.get(old, ())
