"""The operations that kernels.py measures, each with its contenders: data tables and small closures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_harness import Contender
from torch import Tensor

from qdq import functional
from qdq.calib import HistogramCalibrator
from qdq.formats import E4M3, IntFormat
from qdq.kernels import engine, reference

# Shapes with 4 axes for channels; "64x64" is the small tensor whose start-up time the issue limits.
SIZES: dict[str, tuple[int, ...]] = {
    "64x64": (64, 64),
    "4096": (1, 16, 16, 16),
    "65536": (4, 64, 16, 16),
    "1M": (8, 128, 32, 32),
    "6.4M": (8, 256, 56, 56),
    "25M": (32, 256, 56, 56),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NUM_BINS = 2048
BLOCK = 32
_ROW = 256  # length of the last axis where it is cut into blocks
_FORMAT = IntFormat(8, False, True)
_LIMIT = 127
_BYTE = (0, 255)
_ALL_FOUR_AXES = ("4096", "65536", "1M", "6.4M", "25M")


@dataclass
class Data:
    """The tensors of one case; those that are not asked for are not made."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    compiled: bool = False
    channels_last: bool = False
    axis: int | None = None
    block: bool = False

    def _random(self, seed: int) -> Tensor:
        shape = (-1, _ROW) if self.block else self.shape
        values = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)).to(self.device, self.dtype)
        values = values.reshape(shape)
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values

    @functools.cached_property
    def x(self) -> Tensor:
        """Normal values."""
        return self._random(0)

    @functools.cached_property
    def grad(self) -> Tensor:
        """Another tensor like `x`."""
        return self._random(1)

    @functools.cached_property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of amax, step size and zero point."""
        if self.block:
            return (*self.x.shape[:-1], self.x.shape[-1] // BLOCK)
        return (
            tuple(size if axis == self.axis else 1 for axis, size in enumerate(self.shape))
            if self.axis is not None
            else ()
        )

    @functools.cached_property
    def amax(self) -> Tensor:
        """About 3, so that a few values in a thousand are clipped; no two channels have the same."""
        count = max(1, functools.reduce(lambda a, b: a * b, self.parameter_shape, 1))
        return torch.linspace(2.75, 3.25, count, device=self.device).reshape(self.parameter_shape).to(self.dtype)

    @functools.cached_property
    def wide_amax(self) -> Tensor:
        """`amax` in float32, as PyTorch's own operations want their parameters."""
        return self.amax.to(torch.float32)

    @functools.cached_property
    def step(self) -> Tensor:
        """The step size that belongs to `amax`, 8 bits, unsigned codes with zero point 128."""
        return self.wide_amax / 128

    @functools.cached_property
    def zero_point(self) -> Tensor:
        """128, in the shape of the step size."""
        return torch.full(self.parameter_shape, 128, dtype=torch.int32, device=self.device)

    def contenders(self, ours: Callable[[], Any], floor: str, **others: Any) -> list[Contender]:
        """Ours on both engines, the floor, and the others: role -> callable or (label, callable); None is left out."""
        x, grad = self.x, self.grad if floor == "add" else None
        floors: dict[str, Callable[[], Any]] = {
            "clone": x.clone,
            "add": lambda: torch.add(x, grad),  # pyright: ignore[reportArgumentType, reportCallIssue]
            "aminmax": lambda: torch.aminmax(x),
        }
        found = [Contender("qdq", "ours", ours), Contender("qdq reference", "reference", ours, "reference")]
        for role, given in others.items():
            label, run = given if isinstance(given, tuple) else (role, given)
            if run is not None:
                found.append(Contender(label, role, run))
        return [*found, Contender(floor, "floor", floors[floor])]

    def compile(self, function: Callable[..., Any], *arguments: Any) -> tuple[str, Callable[[], Any] | None]:
        """`torch.compile` of a function of the reference on these arguments; None where it was not asked for."""
        if not self.compiled:
            return "torch.compile", None
        torch.compiler.reset()
        made = torch.compile(function, fullgraph=True, dynamic=False)
        return "torch.compile", lambda: made(*arguments)


@dataclass(frozen=True)
class Operation:
    """What is measured under one name; `options` are those of `Data`."""

    name: str
    build: Callable[[Data], list[Contender]]
    options: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[str, ...] = _ALL_FOUR_AXES
    dtypes: tuple[str, ...] = ("float32",)
    caches: tuple[str, ...] = ("warm", "cold")


def _formula(x: Tensor, amax: Tensor) -> Tensor:
    """The bare formula, as one writes it."""
    scale = _LIMIT / amax
    return torch.clamp(torch.round(x * scale), -_LIMIT, _LIMIT) / scale


def _torch_fake_quantize(data: Data, x: Tensor) -> Callable[[], Tensor]:
    if data.axis is None:
        step = float(data.wide_amax) / _LIMIT
        return lambda: torch.fake_quantize_per_tensor_affine(x, step, 0, -_LIMIT, _LIMIT)
    axis, steps = data.axis, (data.wide_amax / _LIMIT).reshape(-1)
    zeros = torch.zeros_like(steps, dtype=torch.int32)
    return lambda: torch.fake_quantize_per_channel_affine(x, steps, zeros, axis, -_LIMIT, _LIMIT)


def _forward(data: Data) -> list[Contender]:
    x, amax = data.x, data.amax
    return data.contenders(
        lambda: functional.fake_tensor_quant(x, amax),
        "clone",
        formula=lambda: _formula(x, amax),
        torch=("torch.fake_quantize", _torch_fake_quantize(data, x)),
        compiled=data.compile(reference.symmetric_fake_quantize, x, amax, _FORMAT),
    )


def _recorded(data: Data) -> list[Contender]:
    x, amax = data.x, data.amax
    leaf = x.detach().requires_grad_()
    return data.contenders(
        lambda: functional.fake_tensor_quant(leaf, amax),
        "clone",
        formula=("formula, no gradient", lambda: _formula(x, amax)),
        other=("formula, recorded", lambda: _formula(leaf, amax)),
        torch=("torch.fake_quantize", _torch_fake_quantize(data, leaf)),
    )


def _forward_blocks(data: Data) -> list[Contender]:
    x, amax = data.x, data.amax
    rows = x.view(*x.shape[:-1], -1, BLOCK)
    return data.contenders(
        lambda: engine.for_tensor(x).symmetric_fake_quantize(x, amax, _FORMAT, BLOCK),
        "clone",
        formula=lambda: _formula(rows, amax.unsqueeze(-1)),
        compiled=data.compile(reference.symmetric_fake_quantize, x, amax, _FORMAT, BLOCK),
    )


def _codes(data: Data) -> list[Contender]:
    x, amax = data.x, data.amax
    return data.contenders(
        lambda: functional.tensor_quant(x, amax),
        "clone",
        formula=lambda: torch.clamp(torch.round(x * (_LIMIT / amax)), -_LIMIT, _LIMIT),
    )


def _gradient(data: Data) -> list[Contender]:
    x, amax, grad = data.x, data.amax, data.grad
    mask = x.abs() <= amax
    # PyTorch stores the mask in the forward and multiplies in the backward: one read fewer than ours.
    backward = torch.ops.aten.fake_quantize_per_tensor_affine_cachemask_backward.default
    return data.contenders(
        lambda: engine.for_tensor(x).symmetric_gradient(grad, x, amax),
        "add",
        formula=lambda: torch.where(x.abs() <= amax, grad, 0.0),
        torch=("torch, stored mask", lambda: backward(grad, mask)),
        compiled=data.compile(reference.symmetric_gradient, grad, x, amax),
    )


def _gradient_blocks(data: Data) -> list[Contender]:
    x, amax, grad = data.x, data.amax, data.grad
    rows, grad_rows = x.view(*x.shape[:-1], -1, BLOCK), grad.view(*x.shape[:-1], -1, BLOCK)
    return data.contenders(
        lambda: engine.for_tensor(x).symmetric_gradient(grad, x, amax, BLOCK),
        "add",
        formula=lambda: torch.where(rows.abs() <= amax.unsqueeze(-1), grad_rows, 0.0),
    )


def _affine(data: Data) -> list[Contender]:
    x, step, zero = data.x, data.step, data.zero_point
    if data.axis is None:
        number, zero_number = float(step), int(zero)

        def of_torch() -> Tensor:
            return torch.fake_quantize_per_tensor_affine(x, number, zero_number, *_BYTE)
    else:
        axis, steps, zeros = data.axis, step.reshape(-1), zero.reshape(-1)

        def of_torch() -> Tensor:
            return torch.fake_quantize_per_channel_affine(x, steps, zeros, axis, *_BYTE)

    return data.contenders(
        lambda: functional.fake_quantize_affine(x, step, zero, *_BYTE),
        "clone",
        formula=lambda: (torch.clamp(torch.round(x / step) + zero, *_BYTE) - zero) * step,
        torch=("torch.fake_quantize", of_torch),
        compiled=data.compile(reference.affine_fake_quantize, x, step, zero, *_BYTE),
    )


def _affine_gradient(data: Data) -> list[Contender]:
    x, grad, step, zero = data.x, data.grad, data.step, data.zero_point
    low, high = (0 - zero) * step, (255 - zero) * step
    return data.contenders(
        lambda: engine.for_tensor(x).affine_gradient(grad, x, step, zero, *_BYTE),
        "add",
        formula=lambda: torch.where((x >= low) & (x <= high), grad, 0.0),
    )


def _range(data: Data) -> list[Contender]:
    x, high = data.x, data.amax
    low = -high
    return data.contenders(lambda: functional.fake_affine_tensor_quant(x, low, high), "clone")


def _range_gradient(data: Data) -> list[Contender]:
    x, grad, high = data.x, data.grad, data.amax
    low = -high
    return data.contenders(
        lambda: engine.for_tensor(x).range_gradient(grad, x, low, high),
        "add",
        formula=lambda: (
            torch.where((x >= low) & (x <= high), grad, 0.0),
            torch.where(x < low, grad, 0.0).sum(),
            torch.where(x > high, grad, 0.0).sum(),
        ),
    )


def _clip_gradient(data: Data) -> list[Contender]:
    x, grad, high = data.x, data.grad, data.amax
    low = -high
    return data.contenders(lambda: engine.for_tensor(x).clip_gradient(grad, x, low, high), "add")


def _reduced(data: Data) -> list[int]:
    return [axis for axis in range(data.x.dim()) if axis != data.axis]


def _absmax(data: Data) -> list[Contender]:
    x, axis, axes = data.x, data.axis, _reduced(data)
    return data.contenders(
        lambda: engine.for_tensor(x).absmax(x, axis),
        "aminmax",
        formula=lambda: x.abs().amax(axes),
        torch=("torch vector_norm", lambda: torch.linalg.vector_norm(x, torch.inf, axes)),
        compiled=data.compile(reference.absmax, x, axis),
    )


def _minmax(data: Data) -> list[Contender]:
    x, axis, axes = data.x, data.axis, _reduced(data)
    return data.contenders(
        lambda: engine.for_tensor(x).minmax(x, axis),
        "aminmax",
        formula=("amin, amax", lambda: (x.amin(axes), x.amax(axes))),
    )


def _histogram_abs(data: Data) -> list[Contender]:
    x, prepared = data.x, data.x.abs()
    largest = float(prepared.max())
    width = largest / NUM_BINS
    return data.contenders(
        lambda: engine.for_tensor(x).abs_histogram(x, width, NUM_BINS),
        "aminmax",
        formula=lambda: _bincount(x, width),
        torch=("torch.histc of |x|", lambda: torch.histc(prepared, NUM_BINS, 0.0, largest)),
        other=("abs, torch.histc", lambda: torch.histc(x.abs(), NUM_BINS, 0.0, largest)),
    )


def _histogram_signed(data: Data) -> list[Contender]:
    x, largest = data.x, float(data.x.abs().max())
    half, width = NUM_BINS // 2, 2 * largest / NUM_BINS
    return data.contenders(
        lambda: engine.for_tensor(x).histogram(x, width, -half, NUM_BINS),
        "aminmax",
        torch=("torch.histc", lambda: torch.histc(x, NUM_BINS, -largest, largest)),
    )


def _histogram_collect(data: Data) -> list[Contender]:
    x, prepared = data.x, data.x.abs()
    largest = float(prepared.max())
    calibrator = HistogramCalibrator(8, None, False, num_bins=NUM_BINS)
    calibrator.collect(x)  # from here on every value lies in the range already seen
    return data.contenders(
        lambda: calibrator.collect(x),
        "aminmax",
        torch=("torch.histc of |x|", lambda: torch.histc(prepared, NUM_BINS, 0.0, largest)),
        other=("max, abs, torch.histc", lambda: torch.histc(x.abs(), NUM_BINS, 0.0, float(x.abs().max()))),
    )


def _bincount(x: Tensor, width: float) -> Tensor:
    return torch.bincount((x.reshape(-1).abs() / width).to(torch.int64).clamp_(max=NUM_BINS - 1), minlength=NUM_BINS)


def _e4m3(data: Data) -> list[Contender]:
    x, largest, dtype = data.x, E4M3.max_value, data.dtype
    return data.contenders(
        lambda: engine.for_tensor(x).round_to_float_format(x, E4M3),
        "clone",
        torch=("clamp, cast, cast", lambda: x.clamp(-largest, largest).to(torch.float8_e4m3fn).to(dtype)),
        compiled=data.compile(reference.round_to_float_format, x, E4M3),
    )


def _scaled_e4m3(data: Data) -> list[Contender]:
    x, amax, largest, dtype = data.x, data.amax, E4M3.max_value, data.dtype
    scale = largest / amax
    return data.contenders(
        lambda: functional.scaled_e4m3(x, amax),
        "clone",
        torch=(
            "scale, cast, cast",
            lambda: (x * scale).clamp(-largest, largest).to(torch.float8_e4m3fn).to(dtype) / scale,
        ),
    )


_HALVES = ("float32", "bfloat16", "float16")
_WARM = ("warm",)


def _channels(name: str, build: Callable[[Data], list[Contender]], axes: tuple[int, ...] = (0, 1)) -> list[Operation]:
    """Per channel of each axis, NCHW and channels-last."""
    return [
        Operation(f"{name} axis {axis}{suffix}", build, {"axis": axis, "channels_last": last})
        for axis in axes
        for suffix, last in (("", False), (" channels-last", True))
    ]


OPERATIONS: tuple[Operation, ...] = (
    Operation("recorded per tensor", _recorded, sizes=("64x64", *_ALL_FOUR_AXES)),
    Operation("recorded axis 1", _recorded, {"axis": 1}),
    Operation("forward per tensor", _forward, dtypes=_HALVES),
    *(Operation(o.name, o.build, o.options, dtypes=_HALVES) for o in _channels("forward", _forward)),
    Operation("forward per block", _forward_blocks, {"block": True}),
    Operation("codes per tensor", _codes),
    Operation("gradient per tensor", _gradient),
    *_channels("gradient", _gradient),
    Operation("gradient per block", _gradient_blocks, {"block": True}),
    Operation("affine forward per tensor", _affine),
    Operation("affine forward axis 1", _affine, {"axis": 1}),
    Operation("affine gradient per tensor", _affine_gradient),
    Operation("range forward per tensor", _range),
    Operation("range gradient per tensor", _range_gradient),
    Operation("clip gradient per tensor", _clip_gradient),
    Operation("absmax per tensor", _absmax),
    *_channels("absmax", _absmax),
    Operation("minmax per tensor", _minmax),
    *_channels("minmax", _minmax, (1,)),
    Operation("histogram abs", _histogram_abs),
    Operation("histogram signed", _histogram_signed),
    Operation("histogram collect", _histogram_collect),
    Operation("e4m3 rounding", _e4m3),
    Operation("e4m3 scaled per tensor", _scaled_e4m3),
)
