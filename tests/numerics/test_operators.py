"""`torch.ops.qdq`: what an exported program keeps of a quantizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdq.descriptor import QuantDescriptor
from qdq.functional import fake_tensor_quant, scaled_e4m3
from qdq.kernels import operations
from qdq.quantizer import TensorQuantizer

# PyTorch's compiler does so itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.filterwarnings("ignore")  # opcheck warns of its own fallbacks
@pytest.mark.parametrize(
    ("dtype", "strided", "per_channel"),
    [(torch.float32, False, False), (torch.float32, True, True), (torch.float16, False, True)],
)
def test_the_operators_pass_opcheck(dtype: torch.dtype, strided: bool, per_channel: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=dtype)
    x = (x.t() if strided else x).requires_grad_()
    amax = torch.rand(1, x.shape[1]) + 0.1 if per_channel else torch.tensor(1.5)
    for arguments in ((8, False, False), (4, True, True)):
        signed = x if not arguments[1] else x.detach().abs().requires_grad_()
        torch.library.opcheck(operations.fake_tensor_quant, (signed, amax, *arguments), test_utils=OPCHECKS)
    for scale in (amax, None):
        torch.library.opcheck(operations.scaled_e4m3, (x, scale), test_utils=OPCHECKS)


def test_value_and_gradient_are_those_of_the_functions() -> None:
    x = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.4, 1.0, 1.5], requires_grad=True)
    amax = torch.tensor(1.0)
    pairs: list[tuple[Any, Any]] = [
        (torch.ops.qdq.fake_tensor_quant(x, amax, 8, False, False), fake_tensor_quant(x, amax, 8, False, False)),
        (torch.ops.qdq.scaled_e4m3(x, amax), scaled_e4m3(x, amax)),
        (torch.ops.qdq.scaled_e4m3(x * 400, None), scaled_e4m3(x * 400)),
    ]
    for ours, expected in pairs:
        assert torch.equal(ours, expected)
        gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, expected)]
        assert torch.equal(*gradients)
        assert gradients[0].abs().sum() > 0


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.integer = TensorQuantizer(QuantDescriptor(amax=1.0))
        self.rows = TensorQuantizer(QuantDescriptor(num_bits=4, axis=1))
        self.e4m3 = TensorQuantizer(QuantDescriptor((4, 3), amax=2.0))
        self.learned = TensorQuantizer(QuantDescriptor(learn_amax=True, amax=0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.learned(self.e4m3(self.rows(self.integer(x))))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_one_node_per_quantizer(strict: bool) -> None:
    model, x = Quantized().eval(), torch.randn(3, 4)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict)
    nodes = [n for n in program.graph.nodes if str(n.target).startswith("qdq.")]
    assert [str(n.target) for n in nodes] == ["qdq.fake_tensor_quant.default"] * 2 + [
        "qdq.scaled_e4m3.default",
        "qdq.fake_tensor_quant.default",
    ]
    assert nodes[1].args[2:] == (4, False, False)
    other = torch.randn(5, 4)
    assert torch.equal(program.module()(other), model(other))


def test_bad_arguments_are_refused_while_capturing() -> None:
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fake_tensor_quant(x, torch.ones(3))

    with pytest.raises(ValueError, match=r"amax of shape \(3,\) does not broadcast"):
        torch.export.export(Bad(), (torch.randn(2, 4),))


def test_neither_eager_calls_nor_the_compiler_use_the_operators() -> None:
    model, x = Quantized().eval(), torch.randn(3, 4)
    seen: list[str] = []

    def keep(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph_module.graph.nodes)
        return graph_module

    compiled = torch.compile(model, fullgraph=True, backend=keep)
    assert torch.equal(compiled(x), model(x))
    assert seen and not [name for name in seen if "qdq" in name]
    for size in (x, torch.randn(100, 100)):
        y = fake_tensor_quant(size.requires_grad_(), torch.tensor(1.0))
        assert y.grad_fn is not None and "qdq" not in y.grad_fn.name()
