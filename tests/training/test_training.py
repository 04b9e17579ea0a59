"""Training of quantized networks: gradients, learned ranges, autocast, and PyTorch's ways of calling a model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qdq.nn
from pytorch_quantization import calib
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.optim import helper
from qdq.descriptor import QuantDescriptor
from qdq.quantizer import TensorQuantizer
from training.layers import LAYERS, tensors_of


class CNN(nn.Module):
    """Convolution, norm, pool, linear; inputs of shape (batch, 2, 6, 6)."""

    def __init__(self, desc_input: QuantDescriptor | None = None) -> None:
        super().__init__()
        desc = QuantDescriptor() if desc_input is None else desc_input
        self.conv1 = quant_nn.QuantConv2d(2, 4, 3, quant_desc_input=desc)
        self.bn1 = nn.BatchNorm2d(4)
        self.pool = quant_nn.QuantAvgPool2d(2, quant_desc_input=desc)
        self.fc = quant_nn.QuantLinear(16, 3, quant_desc_input=desc)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(F.relu(self.bn1(self.conv1(x)))).flatten(1))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(12345)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(12, 2, 6, 6)
    return x, (x[:, 0].mean((1, 2)) > 0).long() + (x[:, 1].mean((1, 2)) > 0.1).long()


def train(model: nn.Module, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- straight-through gradients --------------------------------------------------------------------


def straight_through(x: Tensor, amax: Tensor, lowest: int = -128) -> Tensor:
    """The definition, from differentiable operations: what the gradient sees is the clamped input."""
    step = amax / 127
    quantized = torch.clamp(torch.round(x / step), lowest, 127) * step
    seen = torch.clamp(x, -amax, amax)
    return seen + (quantized - seen).detach()


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_gradients_of_an_mlp_are_straight_through(factor: float) -> None:
    """Against the same network in float64 from plain operations; with `factor` below 1 much is clipped."""
    first, second = qdq.nn.QuantLinear(4, 5).double(), qdq.nn.QuantLinear(5, 2).double()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        hidden = F.relu(F.linear(x, first.weight, first.bias))
    amax = [x.detach().abs().max() * factor, hidden.abs().max() * factor]
    for layer, value in zip((first, second), amax, strict=True):
        layer.input_quantizer.amax = value.item()
        layer.weight_quantizer.amax = (layer.weight.detach().abs().amax(1, keepdim=True) * factor).tolist()
    out = second(F.relu(first(x)))
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    found = [x.grad, *(p.grad for layer in (first, second) for p in layer.parameters())]
    twin = x.detach().clone().requires_grad_()
    leaves = [p.detach().clone().requires_grad_() for layer in (first, second) for p in layer.parameters()]
    h = twin
    for i, layer in enumerate((first, second)):
        w, b = leaves[2 * i : 2 * i + 2]
        inputs = straight_through(h, layer.input_quantizer.amax.double())
        h = F.linear(inputs, straight_through(w, layer.weight_quantizer.amax.double()), b)
        h = F.relu(h) if i == 0 else h
    torch.testing.assert_close(out, h)
    (h * weights).sum().backward()
    assert found[0] is not None
    assert (found[0] == 0).any() == (factor < 1)
    torch.testing.assert_close(found, [twin.grad, *(leaf.grad for leaf in leaves)])


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_passes_gradients(name: str) -> None:
    make, make_inputs = LAYERS[name]
    layer, inputs = make(), make_inputs()
    leaves = [tensor.requires_grad_() for tensor in tensors_of(inputs) if tensor.is_floating_point()]
    outputs = tensors_of(layer(*inputs))
    torch.stack([(o.double() ** 2).sum() for o in outputs]).sum().backward()
    for tensor in [*leaves, *layer.parameters()]:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert all((p.grad != 0).any() for n, p in layer.named_parameters() if n.endswith("weight"))


def test_qat_with_groups_of_parameters(batch: tuple[Tensor, Tensor]) -> None:
    """The published recipe: calibrate, then train weights with one rate, norms with another, and freeze a layer."""
    model = CNN(QuantDescriptor(calib_method="histogram"))
    quantizers = {n: m for n, m in model.named_modules() if isinstance(m, quant_nn.TensorQuantizer)}
    for q in quantizers.values():
        q.disable_quant()
        q.enable_calib()
    model(batch[0])
    for q in quantizers.values():
        if isinstance(q._calibrator, calib.MaxCalibrator):
            q.load_calib_amax()
        else:
            q.load_calib_amax("percentile", percentile=99.9)
        q.disable_calib()
        q.enable_quant()
    assert {k for k in model.state_dict() if k.endswith("_amax")} == {f"{n}._amax" for n in quantizers}
    helper.freeze_parameters(model, ["conv1.bias"])
    groups = helper.group_parameters(
        model, [["weight_quantizer", "conv1.weight", "fc"], ["bn1"]], [0.1, 0.01], [0.9, 0.0]
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    losses = train(model, batch, torch.optim.SGD(groups, lr=1.0), 15)
    assert losses[-1] < 0.7 * losses[0]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {"conv1.weight", "fc.weight", "fc.bias", "bn1.weight"} <= changed
    assert not {k for k in changed if "_amax" in k or k == "conv1.bias"}
    # What was trained is what is stored: quantized weights give the same outputs.
    model.eval()
    expected = model(batch[0])
    helper.quant_weight_inplace(model)
    torch.testing.assert_close(model(batch[0]), expected)


# -- learned ranges --------------------------------------------------------------------------------


def test_learned_ranges_train(batch: tuple[Tensor, Tensor]) -> None:
    model = CNN(QuantDescriptor(4, learn_amax=True))
    names = [n for n, _ in model.named_parameters() if "clip_value" in n]
    assert len(names) == 6
    start = {n: p.item() for n, p in model.named_parameters() if n in names}
    losses = train(model, batch, torch.optim.SGD(model.parameters(), lr=0.1), 15)
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if n in names and p.item() != start[n]}
    assert {f"conv1._input_quantizer.clip.clip_value_{end}" for end in ("min", "max")} <= moved
    assert "pool._input_quantizer.clip.clip_value_max" in moved
    # After a ReLU nothing lies below the lower end.
    assert not {f"{layer}._input_quantizer.clip.clip_value_min" for layer in ("pool", "fc")} & moved


def test_a_learned_range_that_starts_too_narrow_grows() -> None:
    x = torch.linspace(-1, 1, 201)
    q = TensorQuantizer(QuantDescriptor(4, learn_amax=True, amax=0.25))

    def error() -> Tensor:
        return ((q(x) - x) ** 2).mean()

    before = error().item()
    optimizer = torch.optim.SGD(q.parameters(), lr=0.5)
    for _ in range(50):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert -1.1 < q.clip.clip_value_min < -0.8
    assert 0.8 < q.clip.clip_value_max < 1.1
    assert error().item() < before / 10


# -- autocast --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("learned", [False, True])
def test_autocast_trains(dtype: torch.dtype, learned: bool, batch: tuple[Tensor, Tensor]) -> None:
    model = CNN(QuantDescriptor(learn_amax=learned, amax=3.0))
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            out = model(batch[0])
        assert out.dtype == dtype
        loss = F.cross_entropy(out.float(), batch[1])
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = train(reference, batch, torch.optim.SGD(reference.parameters(), lr=0.1), 1)[0]
    assert losses[0] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_runs_under_autocast(name: str, dtype: torch.dtype) -> None:
    make, make_inputs = LAYERS[name]
    layer, inputs = make(), make_inputs()
    expected = tensors_of(layer(*inputs))
    with torch.autocast("cpu", dtype=dtype):
        found = tensors_of(layer(*inputs))
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.float(), right, rtol=0.1, atol=0.1)
    for output in found:
        if output.requires_grad:
            output.float().sum().backward(retain_graph=True)
    gradients = [p.grad for p in layer.parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype(dtype: torch.dtype, batch: tuple[Tensor, Tensor]) -> None:
    model = CNN(QuantDescriptor(amax=3.0))
    expected = model(batch[0])
    model = model.to(dtype)
    out = model(batch[0].to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


# -- copies, functional calls, checkpoints of activations ------------------------------------------


def by_torch_save(model: nn.Module) -> nn.Module:
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("way", COPIES)
def test_copies_of_every_layer(name: str, way: str) -> None:
    make, make_inputs = LAYERS[name]
    layer, inputs = make(), make_inputs()
    expected = tensors_of(layer(*inputs))
    again = COPIES[way](layer)
    assert type(again) is type(layer)
    for left, right in zip(tensors_of(again(*inputs)), expected, strict=True):
        assert torch.equal(left, right)
    own = {p.data_ptr() for p in layer.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in again.parameters())
    quantizers = [m for m in again.modules() if isinstance(m, TensorQuantizer)]
    for q in quantizers:
        q.disable()
    assert not any(m._disabled for m in layer.modules() if isinstance(m, TensorQuantizer))


def test_a_state_dict_by_weights_only(batch: tuple[Tensor, Tensor]) -> None:
    model = CNN(QuantDescriptor(learn_amax=True, amax=2.0))
    model.conv1.weight_quantizer.amax = [[[[0.1]]]] * 4
    train(model, batch, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    again = CNN(QuantDescriptor(learn_amax=True))
    again.load_state_dict(torch.load(stored, weights_only=True))
    assert torch.equal(again.eval()(batch[0]), model.eval()(batch[0]))


def test_functional_call(batch: tuple[Tensor, Tensor]) -> None:
    model = CNN(QuantDescriptor(amax=2.0)).eval()
    state: dict[str, Any] = dict(model.named_parameters()) | dict(model.named_buffers())
    assert torch.equal(torch.func.functional_call(model, state, (batch[0],)), model(batch[0]))
    # Parameters and amax come from the call.
    other = {k: v * 0.5 if v.is_floating_point() else v for k, v in state.items()}
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*scaled.parameters(), *(b for b in scaled.buffers() if b.is_floating_point())]:
            tensor.mul_(0.5)
    assert torch.equal(torch.func.functional_call(model, other, (batch[0],)), scaled(batch[0]))

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    parameters = {k: v.detach() for k, v in model.named_parameters()}
    found = torch.func.grad(loss)(parameters, *batch)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, batch[0][:, None], batch[1][:, None])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].mean(0), parameter.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, learned: bool, batch: tuple[Tensor, Tensor]) -> None:
    model = CNN(QuantDescriptor(learn_amax=learned))
    x = batch[0].requires_grad_()
    grads = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        F.cross_entropy(call(x), batch[1]).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(model.parameters()))
    torch.testing.assert_close(grads[0], grads[1])
