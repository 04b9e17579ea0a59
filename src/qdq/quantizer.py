"""TensorQuantizer: the module that calibrates, clips and quantizes one tensor."""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .calib.calibrator import reduce_blocks, reduce_keeping
from .clip import Clip
from .descriptor import QuantDescriptor
from .functional import fake_tensor_quant, scaled_e4m3, tensor_quant
from .kernels.checks import is_tracing, unreadable
from .loaded_amax import check_loaded_amax
from .onnx_form import channel_axis, exports_to_onnx, require, sizes_of
from .quantizer_settings import QuantizerSettings

_log = logging.getLogger(__name__)

_BUFFERS = ("_amax", "_pre_quant_scale")
_BLOCKS_IN_ONNX = "a quantizer with block_size cannot be exported by torch.onnx.export: qdq.export_onnx writes it"
_NOT_CALIBRATED = "a quantizer without amax cannot be exported to ONNX: calibrate it first"


class TensorQuantizer(QuantizerSettings):
    """Quantizes one tensor by a :class:`QuantDescriptor`.

    amax is the descriptor's, else the calibrated one, else that of each input (*dynamic*). With ``block_size`` it has
    the shape [rows, blocks], and inputs are matrices. The buffer ``_amax`` exists,
    and is in ``state_dict``, once amax is set. ``forward`` runs the stages that are on, in this order: calibrate,
    clip, quantize.

    Args:
        quant_desc: how to quantize.
        disabled: let tensors through as they are.
        if_quant: quantize.
        if_clip: clip to the learned range.
        if_calib: collect calibration data.

    Raises:
        ValueError: ``if_clip`` without ``learn_amax``; an amax that is negative, NaN or infinite; a floating-point
            format without fake quantization; ``block_size`` with an ``axis`` other than 0, with a floating-point
            format or a histogram.
        NotImplementedError: a histogram calibrator with an axis.
    """

    # Set by enable_onnx_export(): forward then refuses what cannot be exported.
    _enable_onnx_export = False

    _amax: Tensor
    _pre_quant_scale: Tensor

    def __init__(
        self,
        quant_desc: QuantDescriptor | None = None,
        disabled: bool = False,
        if_quant: bool = True,
        if_clip: bool = False,
        if_calib: bool = False,
    ) -> None:
        desc = QuantDescriptor() if quant_desc is None else quant_desc
        super().__init__(desc, disabled, if_quant, if_clip, if_calib)
        self._scale: Tensor | None = None
        self._warned = False
        self._device = torch.empty(0).device
        if desc.amax is not None:
            self.amax = desc.amax
        if desc.learn_amax:
            start = 1.0 if desc.amax is None else float(desc.amax.max())
            self.clip = Clip(-start, start, learn_min=True, learn_max=True)

    @property
    def scale(self) -> Tensor | None:
        """The last scale, where codes are given out (``fake_quant=False``); None before."""
        return self._scale

    @property
    def step_size(self) -> Tensor | None:
        """amax over the largest code; None, with a log entry, without amax."""
        amax = self.amax
        if amax is None:
            _log.error("step_size is not defined: amax is dynamic")
            return None
        return amax / self.maxbound if self.maxbound > 0 else torch.ones_like(amax)

    @property
    def amax(self) -> Tensor | None:
        """The absolute maximum, None until it is set or calibrated.

        Takes a float, list or array, or (with a warning) a tensor. Setting None changes nothing and logs an error.

        Raises:
            ValueError: negative, NaN or infinite values.
            RuntimeError: a shape other than the present one.
        """
        return getattr(self, "_amax", None)

    @amax.setter
    def amax(self, value: float | list[Any] | np.ndarray | Tensor | None) -> None:
        self._set("_amax", value)

    @property
    def pre_quant_scale(self) -> Tensor | None:
        """A factor on every input, applied also while disabled; set like :attr:`amax`."""
        return getattr(self, "_pre_quant_scale", None)

    @pre_quant_scale.setter
    def pre_quant_scale(self, value: float | list[Any] | np.ndarray | Tensor | None) -> None:
        self._set("_pre_quant_scale", value)

    def _set(self, buffer: str, value: Any) -> None:
        name = buffer[1:]
        if value is None:
            _log.error("%s cannot be set to None: nothing is changed", name)
            return
        with torch.inference_mode(False):  # a tensor of inference mode could not be trained with later
            if isinstance(value, Tensor):
                warnings.warn(f"{name} should be a float, list or array; the tensor is copied", stacklevel=3)
                tensor = value.detach().to(self._device, torch.float32).clone()
            else:
                tensor = torch.as_tensor(np.array(value, dtype=np.float32), device=self._device)
        if tensor.device.type != "meta":
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} must be finite, got {value}: NaN or infinity in the data?")
            if buffer == "_amax" and bool((tensor < 0).any()):
                raise ValueError(f"Negative values in amax: {value}")
        present = getattr(self, buffer, None)
        if present is None:
            self.register_buffer(buffer, tensor)
        elif present.shape != tensor.shape:
            raise RuntimeError(
                f"{name} has shape {tuple(present.shape)} and cannot take {tuple(tensor.shape)}: shapes are fixed"
            )
        else:
            with torch.no_grad():
                present.copy_(tensor)

    def init_learn_amax(self) -> None:
        """Start the learned range at the largest amax.

        Raises:
            RuntimeError: the descriptor does not have ``learn_amax``, or there is no amax.
        """
        if not self._learn_amax:
            raise RuntimeError("init_learn_amax needs a descriptor with learn_amax=True")
        if self.amax is None:
            raise RuntimeError("init_learn_amax needs an amax: calibrate first")
        with torch.no_grad():
            self.clip.clip_value_max.copy_(self._amax.max())
            self.clip.clip_value_min.copy_(-self._amax.max())

    def load_calib_amax(self, *args: Any, strict: bool = True, **kwargs: Any) -> None:
        """Take amax from the calibrator; may be repeated with other arguments.

        Args:
            *args: passed to the calibrator's ``compute_amax``, as are keywords.
            strict: refuse where nothing was seen; else amax becomes NaN, which marks *never calibrated*.
            **kwargs: see above.

        Raises:
            RuntimeError: there is no calibrator, or it has seen nothing and ``strict`` is set.
            ValueError: amax is NaN, infinite or negative, so the data were.
        """
        if self._calibrator is None:
            raise RuntimeError("Calibrator returned None: the quantizer has no calibrator")
        amax = self._calibrator.compute_amax(*args, **kwargs)
        if amax is None:
            message = "Calibrator returned None: no data reached this quantizer while calibration was enabled"
            if strict:
                raise RuntimeError(f"{message}. With strict=False amax becomes NaN")
            warnings.warn(f"{message}: amax is NaN", stacklevel=2)
            amax = torch.tensor(math.nan, device=self._device)
        elif not bool(torch.isfinite(amax).all()):
            raise ValueError("the calibrated amax is NaN or infinite: the calibration data hold such values")
        elif bool((amax < 0).any()):
            raise ValueError(f"Negative values in amax: the calibrator computed {amax}")
        with torch.inference_mode(False):
            amax = amax.detach().clone().to(torch.float32)
        present = self.amax
        if present is not None and present.shape == amax.shape:
            with torch.no_grad():
                present.copy_(amax)
        else:
            self.register_buffer("_amax", amax if present is None else amax.to(present.device))

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` after the stages that are on; codes where ``fake_quant`` is off.

        Raises:
            RuntimeError: calibration is on without a calibrator.
            ValueError: ``block_size``, and inputs of other than two dimensions.
            AssertionError: inside ``enable_onnx_export()``, where the quantizer cannot be exported.
        """
        if self._enable_onnx_export:
            self._check_onnx_readiness()
        if hasattr(self, "_pre_quant_scale"):
            inputs = inputs * self._pre_quant_scale.detach().to(inputs)
        if self._disabled:
            return inputs
        if self._block_size is not None and inputs.dim() != 2:
            raise ValueError(
                f"block_size={self._block_size} is for matrices, such as the weight of a linear; the quantizer got a "
                f"tensor of {inputs.dim()} dimensions: set block_size=None in its descriptor"
            )
        outputs = inputs
        if self._if_calib:
            if self._calibrator is None:
                raise RuntimeError("calibration is enabled, but the quantizer has no calibrator")
            self._calibrator.collect(inputs)
        if self._if_clip:
            if not self._learn_amax:
                raise RuntimeError("clipping is enabled, but the descriptor does not have learn_amax=True")
            outputs = self.clip(inputs)
        if self._if_quant:
            outputs = self._quantize(outputs)
        return outputs

    def _quantize(self, inputs: Tensor) -> Tensor:
        exporting = self._fake_quant and exports_to_onnx()
        # The exporter's second attempt, through the compiler, does not show that it is for ONNX; the block does.
        if exporting or (self._enable_onnx_export and self._fake_quant and torch.compiler.is_exporting()):
            self._check_onnx_form(inputs)
        if self._learn_amax:
            inputs = self.clip(inputs)
        amax = self._get_amax(inputs)
        if exporting and is_tracing():
            amax = amax.data  # apart from the trace of the older exporter, a tensor is a constant of it
        if isinstance(self._num_bits, tuple):
            return scaled_e4m3(inputs, amax, *self._num_bits)
        if self._fake_quant:
            return fake_tensor_quant(
                inputs, amax, self._num_bits, self._unsigned, self._narrow_range, block_size=self._block_size
            )
        outputs, scale = tensor_quant(
            inputs, amax, self._num_bits, self._unsigned, self._narrow_range, block_size=self._block_size
        )
        # An exported program may not change its module.
        if not torch.compiler.is_exporting():
            self._scale = scale
        return outputs

    def _check_onnx_form(self, inputs: Tensor) -> None:
        """Asked outside of ``enable_onnx_export()``, too: no file is written that computes something else."""
        require(not self._learn_amax, "a quantizer with learn_amax cannot be exported to ONNX: its range is learned")
        amax = self.amax
        require(amax is not None, _NOT_CALIBRATED)
        require(self._block_size is None, _BLOCKS_IN_ONNX)
        if amax is not None:
            channel_axis(inputs.dim(), sizes_of(amax), self._num_bits, self._unsigned, self._narrow_range)

    def _get_amax(self, inputs: Tensor) -> Tensor:
        """The amax to quantize ``inputs`` with: learned, set or dynamic, times ``scale_amax``; no gradient."""
        if self._learn_amax:
            amax = torch.maximum(-self.clip.clip_value_min, self.clip.clip_value_max).detach()
        elif hasattr(self, "_amax"):
            amax = self._amax.detach()
        else:
            blocks = self._block_size
            amax = reduce_keeping(inputs, self._axis) if blocks is None else reduce_blocks(inputs, blocks)
            self._warn_once_if_not_finite(amax)
        amax = amax.to(inputs.device)
        return amax if self._scale_amax is None else amax * self._scale_amax

    def _warn_once_if_not_finite(self, amax: Tensor) -> None:
        # Reading the value would stop a compiler, and make the host wait for another device.
        if self._warned or amax.device.type != "cpu" or unreadable(amax):
            return
        try:
            finite = bool(torch.isfinite(amax).all())
        except RuntimeError:  # a fake tensor or one wrapped by torch.func: it has no value
            return
        if not finite:
            self._warned = True
            warnings.warn("dynamic amax: the input holds NaN or infinite values, and so does the output", stacklevel=4)

    def _check_onnx_readiness(self) -> None:
        amax = self.amax
        require(amax is not None, _NOT_CALIBRATED)
        require(self._block_size is None, _BLOCKS_IN_ONNX)
        if amax is not None and isinstance(self._num_bits, tuple):
            require(math.prod(sizes_of(amax)) == 1, "E4M3 can only be exported to ONNX with one amax per tensor")

    def _apply(self, fn: Any, recurse: bool = True) -> TensorQuantizer:
        super()._apply(fn, recurse)
        # The module's device, also while it holds no tensor: amax is created there.
        self._device = fn(torch.empty(0, device=self._device)).device
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for buffer in _BUFFERS:
            value = state_dict.get(prefix + buffer)
            if value is None:
                continue
            if buffer == "_amax":
                check_loaded_amax(self, value, prefix)
            if getattr(self, buffer, None) is None:
                self.register_buffer(buffer, torch.empty_like(value, device=self._device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __repr__(self) -> str:
        # One line, also with the submodule that a learned range is.
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """Bits, granularity, amax, calibrator and stages, in one line."""
        if self._disabled:
            return "disabled"
        signs = ("unsigned " if self._unsigned else "") + ("narrow " if self._narrow_range else "")
        kind = "fake" if self._fake_quant else "codes"
        where = "per-tensor" if self._axis is None else f"axis={self._axis}"
        where += "" if self._block_size is None else f" block_size={self._block_size}"
        calibrator = "none" if self._calibrator is None else type(self._calibrator).__name__
        factor = "" if self._scale_amax is None else f"*{self._scale_amax:g}"
        stages = [name for name in ("quant", "clip", "calib") if getattr(self, f"_if_{name}")]
        parts = [f"{signs}{self._num_bits}bit {kind} {where}", f"amax={self._short_amax()}{factor}"]
        parts += [f"calibrator={calibrator}", "+".join(stages) or "off"]
        return " ".join(parts)

    def _short_amax(self) -> str:
        amax = self.amax
        if self._learn_amax:
            return f"learned[{_short(self.clip.clip_value_min)}, {_short(self.clip.clip_value_max)}]"
        if amax is None:
            return "dynamic"
        if amax.numel() == 1:
            return _short(amax)
        if amax.numel() == 0:
            return "[](0)"
        return f"[{_short(amax.min())}, {_short(amax.max())}]({amax.numel()})"


def _short(value: Tensor) -> str:
    return "meta" if value.device.type == "meta" else f"{value.item():.4g}"
