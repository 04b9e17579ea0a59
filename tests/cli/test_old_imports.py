"""`qdq migrate` on texts: what each import and use becomes, and that the table is true."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import pkgutil
import subprocess
import sys
from textwrap import dedent
from types import ModuleType

import pytest

import pytorch_quantization
import qdq
from qdq._cli.import_table import NATIVE, NOT_LOADED_BY_QDQ, SAME_ROLE, WITHOUT_NATIVE_NAME, module_of
from qdq._cli.old_imports import migrate_text
from qdq._cli.scopes import Names


def migrated(text: str) -> str:
    """The text under native names; a second run must find nothing more to do."""
    result = migrate_text(dedent(text))
    again = migrate_text(result.text)
    assert again.text == result.text
    assert [finding for finding in again.findings if finding.kind in ("import", "use", "note")] == []
    return result.text


# The table.


@pytest.mark.parametrize("old", sorted(NATIVE))
def test_both_names_are_the_same_object(old: str) -> None:
    published = getattr(importlib.import_module(module_of(old)), old.rpartition(".")[2])
    for native in NATIVE[old]:
        assert getattr(importlib.import_module(module_of(native)), native.rpartition(".")[2]) is published


def test_the_table_is_complete() -> None:
    found = pkgutil.walk_packages(pytorch_quantization.__path__, "pytorch_quantization.")
    modules = {"pytorch_quantization", *(info.name for info in found)}
    assert modules == set(SAME_ROLE)
    names = {f"{module}.{name}" for module in modules for name in importlib.import_module(module).__all__}
    assert names - modules - set(WITHOUT_NATIVE_NAME) <= set(NATIVE)
    for old in WITHOUT_NATIVE_NAME:
        assert hasattr(importlib.import_module(module_of(old)), old.rpartition(".")[2])
    for natives in SAME_ROLE.values():
        for module in natives:
            importlib.import_module(module)


def test_attributes_of_the_native_package_lead_to_what_it_loads() -> None:
    """In a process of its own: here other tests may have imported the rest."""
    names = {name for natives in NATIVE.values() for name in natives if module_of(name) not in NOT_LOADED_BY_QDQ}
    reach = "import functools, qdq; [functools.reduce(getattr, name.split('.')[1:], qdq) for name in {}]"
    subprocess.run([sys.executable, "-c", reach.format(sorted(names))], check=True)


# What imports and uses become.

T = "from pytorch_quantization import tensor_quant as t\nt.tensor_quant, t.QUANT_DESC_8BIT_PER_TENSOR\n"
CASES = {
    "aliased module": (
        "from pytorch_quantization import nn as quant_nn\nquant_nn.QuantConv2d\n",
        "from qdq import nn as quant_nn\nquant_nn.QuantConv2d\n",
    ),
    "module with another name": (
        "from pytorch_quantization import quant_modules\nquant_modules.deactivate()\n",
        "from qdq.nn import replacement as quant_modules\nquant_modules.deactivate()\n",
    ),
    "dotted import with a name": (
        "import torch, pytorch_quantization.nn as qnn  # both\nqnn.Clip\n",
        "import torch, qdq.nn as qnn  # both\nqnn.Clip\n",
    ),
    "object": (
        "from pytorch_quantization.tensor_quant import QuantDescriptor\n",
        "from qdq import QuantDescriptor\n",
    ),
    "object with another name": (
        "from pytorch_quantization.nn import Linear, Conv2d as C\n",
        "from qdq.nn import QuantLinear as Linear, QuantConv2d as C\n",
    ),
    "one module for all objects of a statement": (
        "from pytorch_quantization.tensor_quant import QuantDescriptor, QUANT_DESC_8BIT_PER_TENSOR\n",
        "from qdq.descriptor import QuantDescriptor, QUANT_DESC_8BIT_PER_TENSOR\n",
    ),
    "several modules for the objects of a statement": (
        "from pytorch_quantization.tensor_quant import QuantDescriptor, tensor_quant\n",
        "from qdq import QuantDescriptor\nfrom qdq.functional import tensor_quant\n",
    ),
    "one of several modules is enough": (
        "from pytorch_quantization import tensor_quant\ntensor_quant.tensor_quant(x, a)\n",
        "from qdq import functional as tensor_quant\ntensor_quant.tensor_quant(x, a)\n",
    ),
    "several modules: full names": (
        "from pytorch_quantization import tensor_quant as t\nt.tensor_quant(x, t.QuantDescriptor().amax)  # t\n",
        "import qdq.functional\nqdq.functional.tensor_quant(x, qdq.QuantDescriptor().amax)  # t\n",
    ),
    "several modules: columns are counted in bytes by the parser": (
        "import pytorch_quantization.tensor_quant as t\né = 'é'; t.tensor_quant; t.QUANT_DESC_8BIT_PER_TENSOR\n",
        "import qdq.descriptor\nimport qdq.functional\n"
        "é = 'é'; qdq.functional.tensor_quant; qdq.descriptor.QUANT_DESC_8BIT_PER_TENSOR\n",
    ),
    "the package itself": (
        "import pytorch_quantization\nimport pytorch_quantization.calib\n"
        "pytorch_quantization.initialize()\npytorch_quantization.calib.MaxCalibrator\n",
        "import qdq.nn.replacement\nimport qdq.calib\nqdq.nn.replacement.initialize()\nqdq.calib.MaxCalibrator\n",
    ),
    "the package under another name": (
        "import pytorch_quantization as pq\npq.tensor_quant.tensor_quant; pq.nn.modules.clip.Clip\n",
        "import qdq as pq\npq.functional.tensor_quant; pq.nn.Clip\n",
    ),
    "the package under another name, and something that qdq does not load": (
        "import pytorch_quantization as pq\npq.quant_modules.initialize()\n",
        "import qdq.nn.replacement\nqdq.nn.replacement.initialize()\n",
    ),
    "unused imports": (
        "import pytorch_quantization\nimport pytorch_quantization.nn\nfrom pytorch_quantization import calib\n",
        "import qdq\nimport qdq.nn\nfrom qdq import calib\n",
    ),
    "private places": (
        "from pytorch_quantization import nn as q\nq.modules._utils.QuantMixin; q.Linear; q.modules.quant_rnn.LSTM\n",
        "from qdq import nn as q\nq.quantized_module.QuantMixin; q.QuantLinear; q.QuantLSTM\n",
    ),
    "class attributes of an object may be set": (
        "from pytorch_quantization import nn as q\nq.TensorQuantizer.use_fb_fake_quant = True\n",
        "from qdq import nn as q\nq.TensorQuantizer.use_fb_fake_quant = True\n",
    ),
    "inside a function, on one line": (
        "def f(): from pytorch_quantization import tensor_quant as t; return t.tensor_quant, t.QuantDescriptor\n",
        "def f(): import qdq.functional; return qdq.functional.tensor_quant, qdq.QuantDescriptor\n",
    ),
    "split on one line": (
        "if 1: from pytorch_quantization import nn, quant_modules; quant_modules.initialize\n",
        "if 1: from qdq import nn; from qdq.nn import replacement as quant_modules; quant_modules.initialize\n",
    ),
    "try and except, and a test of the name": (
        """\
        try:
            from pytorch_quantization import nn as quant_nn
        except ImportError:
            quant_nn = None
        if quant_nn is not None and not quant_nn:
            quant_nn.QuantLinear
        """,
        """\
        try:
            from qdq import nn as quant_nn
        except ImportError:
            quant_nn = None
        if quant_nn is not None and not quant_nn:
            quant_nn.QuantLinear
        """,
    ),
    "or None, where the uses change": (
        "try:\n    import pytorch_quantization.nn as q\nexcept ImportError:\n    q = None\nq.Linear\n",
        "try:\n    import qdq.nn as q\nexcept ImportError:\n    q = None\nq.QuantLinear\n",
    ),
    "or None with an annotation": (
        "q: object\nif 1: from pytorch_quantization import nn as q\nelse: q: object = None\nq.Linear\n",
        "q: object\nif 1: from qdq import nn as q\nelse: q: object = None\nq.QuantLinear\n",
    ),
    "or another module with the same names": (
        "if 1: from pytorch_quantization import nn as q\nelse: import other as q\nq.QuantLinear\n",
        "if 1: from qdq import nn as q\nelse: import other as q\nq.QuantLinear\n",
    ),
    "a comment after a statement that is split": (
        "from pytorch_quantization import nn, quant_modules  # why\nquant_modules.initialize\n",
        "from qdq import nn\nfrom qdq.nn import replacement as quant_modules  # why\nquant_modules.initialize\n",
    ),
    "comments around single items": (
        """\
        from pytorch_quantization import (  # why
            nn,
            quant_modules,
            # end
            )
        quant_modules.initialize
        """,
        """\
        from qdq import (  # why
            nn,
            )
        from qdq.nn import (
            replacement as quant_modules,
            # end
            )
        quant_modules.initialize
        """,
    ),
    "a comment before the closing parenthesis": (
        """\
        from pytorch_quantization.tensor_quant import (
            QuantDescriptor,  # a
            tensor_quant,
            # end
        )
        """,
        """\
        from qdq import (
            QuantDescriptor,  # a
        )
        from qdq.functional import (
            tensor_quant,
            # end
        )
        """,
    ),
    "parentheses with comments": (
        """\
        from pytorch_quantization.tensor_quant import (  # why
            QuantDescriptor,  # é
            # about it
            fake_tensor_quant as ftq,
            tensor_quant,
            scaled_e4m3  # last
        )
        """,
        """\
        from qdq import (  # why
            QuantDescriptor,  # é
        )
        from qdq.functional import (
            # about it
            fake_tensor_quant as ftq,
            tensor_quant,
            scaled_e4m3  # last
        )
        """,
    ),
    "parentheses, one module": (
        "from pytorch_quantization.nn import (\n    Clip,  # a\n    Linear,\n)\n",
        "from qdq.nn import (\n    Clip,  # a\n    QuantLinear as Linear,\n)\n",
    ),
    "parentheses on one line": (
        "from pytorch_quantization import (nn, quant_modules, calib)\nquant_modules.initialize\n",
        "from qdq import (nn, calib)\nfrom qdq.nn import replacement as quant_modules\nquant_modules.initialize\n",
    ),
    "a backslash": (
        "from pytorch_quantization.nn.modules \\\n    import tensor_quantizer as tq, _utils\n"
        "tq.TensorQuantizer; _utils.QuantMixin\n",
        "from qdq import quantizer as tq\nfrom qdq.nn import quantized_module as _utils\n"
        "tq.TensorQuantizer; _utils.QuantMixin\n",
    ),
    "carriage returns": (
        "if 1:\r\n    from pytorch_quantization import nn, quant_modules\r\n    quant_modules.initialize\r\n",
        "if 1:\r\n    from qdq import nn\r\n    from qdq.nn import replacement as quant_modules\r\n"
        "    quant_modules.initialize\r\n",
    ),
    "no line end": (
        "from pytorch_quantization import calib, tensor_quant as t;t.tensor_quant",
        "from qdq import calib, functional as t;t.tensor_quant",
    ),
    "part of a statement": (
        "from pytorch_quantization import nn, __version__, calib\n",
        "from qdq import nn, calib\nfrom pytorch_quantization import __version__\n",
    ),
    "annotations that are evaluated": (
        "from pytorch_quantization import tensor_quant as t\n"
        "def f(d: t.QuantDescriptor = t.tensor_quant) -> t.QuantDescriptor: ...\n",
        "import qdq.functional\n"
        "def f(d: qdq.QuantDescriptor = qdq.functional.tensor_quant) -> qdq.QuantDescriptor: ...\n",
    ),
    "docstrings and comments stay": (
        '"""Uses pytorch_quantization.nn."""\nfrom pytorch_quantization import nn  # of pytorch_quantization\n',
        '"""Uses pytorch_quantization.nn."""\nfrom qdq import nn  # of pytorch_quantization\n',
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_imports_and_uses_become_native(name: str) -> None:
    before, after = CASES[name]
    assert migrated(before) == dedent(after)


def test_names_are_followed_through_scopes() -> None:
    """The same name is a parameter, a loop variable, a class attribute and a torch module elsewhere."""
    before = """\
        from pytorch_quantization import tensor_quant, calib
        from torch import nn
        def a(tensor_quant, *calib, **more): return tensor_quant.shape, calib.index
        def b():
            def inner(): return tensor_quant.tensor_quant, nn.Linear
            return inner, [calib.x for calib in ()], [c for c in calib.MaxCalibrator(8, 0, False).amaxs]
        class C:
            tensor_quant = tensor_quant.QUANT_DESC_8BIT_PER_TENSOR if 0 else 1
        class D(tensor_quant.TensorQuantFunction):
            d = lambda self, x=tensor_quant.QUANT_DESC_8BIT_PER_TENSOR: (x, tensor_quant.QuantDescriptor)
        def e():
            with open(0) as tensor_quant: tensor_quant.read()
            try: pass
            except OSError as calib: calib.args
            def deeper():
                nonlocal tensor_quant
                tensor_quant = 1
        def f(x):
            match x:
                case {"a": tensor_quant, **calib}: tensor_quant.y, calib.z
                case [*nn]: nn.v
                case tensor_quant: tensor_quant.w
        def g():
            from pytorch_quantization import nn
            return nn.QuantLinear, [(y := tensor_quant.scaled_e4m3) for _ in ()]
        async def h(q=calib.HistogramCalibrator): return {k: tensor_quant.k for k, tensor_quant in q}
        """
    # The attribute of class C has the name of the module: inside the class it is that attribute.
    text = migrated(before.replace("tensor_quant = tensor_quant.QUANT", "other = tensor_quant.QUANT"))
    assert text.splitlines()[:5] == [
        "import qdq.descriptor",
        "import qdq.functional",
        "from qdq import calib",
        "from torch import nn",
        "def a(tensor_quant, *calib, **more): return tensor_quant.shape, calib.index",
    ]
    changed = {
        "def inner(): return tensor_quant.tensor_quant": "def inner(): return qdq.functional.tensor_quant",
        "other = tensor_quant.QUANT_DESC": "other = qdq.descriptor.QUANT_DESC",
        "class D(tensor_quant.Tensor": "class D(qdq.functional.Tensor",
        "x=tensor_quant.QUANT_DESC": "x=qdq.descriptor.QUANT_DESC",
        "(x, tensor_quant.Quant": "(x, qdq.Quant",
        "from pytorch_quantization import nn": "from qdq import nn",
        "tensor_quant.scaled_e4m3": "qdq.functional.scaled_e4m3",
    }
    expected = dedent(before).replace("tensor_quant = tensor_quant.QUANT", "other = tensor_quant.QUANT")
    for old, new in changed.items():
        assert old in expected
        expected = expected.replace(old, new)
    assert text.splitlines()[5:] == expected.splitlines()[3:]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="syntax of Python 3.12")
def test_type_parameters_are_followed() -> None:
    after = (
        "def f[X: t.QuantDescriptor](x: X): ...\nclass C[X: t.QuantDescriptor]: ...\ntype A = t.TensorQuantFunction\n"
    )
    text = migrated(T + after)
    assert text.splitlines()[3:] == [
        "def f[X: qdq.QuantDescriptor](x: X): ...",
        "class C[X: qdq.QuantDescriptor]: ...",
        "type A = qdq.functional.TensorQuantFunction",
    ]


@pytest.mark.parametrize("module", [ast, dataclasses, inspect, pkgutil, qdq.nn.quantized_module, qdq.quantizer])
def test_no_name_of_a_text_is_missed(module: ModuleType) -> None:
    tree = ast.parse(inspect.getsource(module))
    names = Names(tree)
    seen = {node for node, _ in names._loads}
    seen |= {node for scope in names._scopes for nodes in scope.bindings.values() for node in nodes}
    everything = {node for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert len(everything) > 100
    assert everything <= seen


def test_global_statements_keep_the_name_where_it_is() -> None:
    before = "def f():\n    global q\n    from pytorch_quantization import nn as q\ndef g(): return q.QuantLinear\n"
    assert migrated(before) == before.replace("pytorch_quantization", "qdq")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="positions inside f-strings are not known before 3.12")
def test_uses_inside_f_strings_are_rewritten() -> None:
    assert migrated(T + "f'{t.tensor_quant}'\n").endswith("f'{qdq.functional.tensor_quant}'\n")


def test_every_use_is_listed() -> None:
    text = dedent("""\
        from pytorch_quantization import quant_modules, nn as q
        from pytorch_quantization.tensor_quant import QuantDescriptor
        quant_modules.initialize()
        q.Linear(1, 2, quant_desc_input=QuantDescriptor())
        """)
    old = "pytorch_quantization"
    assert [(f.line, f.kind, f.old, f.new) for f in migrate_text(text).findings if f.kind != "note"] == [
        (1, "import", f"from {old} import quant_modules", "from qdq.nn import replacement as quant_modules"),
        (1, "import", f"from {old} import nn as q", "from qdq import nn as q"),
        (2, "import", f"from {old}.tensor_quant import QuantDescriptor", "from qdq import QuantDescriptor"),
        (3, "use", f"{old}.quant_modules.initialize", "qdq.nn.replacement.initialize"),
        (4, "use", f"{old}.nn.Linear", "qdq.nn.QuantLinear"),
        (4, "use", f"{old}.tensor_quant.QuantDescriptor", "qdq.QuantDescriptor"),
    ]
    (note,) = (f for f in migrate_text(text).findings if f.kind == "note")
    assert (note.line, note.old) == (3, f"{old}.quant_modules.initialize()")
    assert "qdq.nn.quantize_modules(model)" in note.new
    assert callable(qdq.nn.quantize_modules)


@pytest.mark.parametrize("text", ["from pytorch_quantization import (\n", "pytorch_quantization\0"])
def test_what_is_not_python_is_refused(text: str) -> None:
    with pytest.raises((SyntaxError, ValueError)):
        migrate_text(text)


# Whole programs compute the same before and after.

PTQ = """
import torch
from torch import nn
from pytorch_quantization import calib, quant_modules
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
torch.manual_seed(0)
quant_nn.QuantLinear.set_default_quant_desc_input(QuantDescriptor(calib_method="histogram"))
quant_modules.initialize()
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
quant_modules.deactivate()
quantizers = [m for m in model.modules() if isinstance(m, quant_nn.TensorQuantizer)]
for quantizer in quantizers:
    quantizer.disable_quant(); quantizer.enable_calib()
with torch.no_grad():
    model(torch.randn(8, 1, 4, 4))
for quantizer in quantizers:
    kind = isinstance(quantizer._calibrator, calib.MaxCalibrator)
    quantizer.load_calib_amax() if kind else quantizer.load_calib_amax("mse")
    quantizer.enable_quant(); quantizer.disable_calib()
print(model, [type(m).__name__ for m in model.modules()])
print(model(torch.randn(2, 1, 4, 4)).tolist(), sorted(model.state_dict()))
quant_nn.QuantLinear.set_default_quant_desc_input(QuantDescriptor())
"""
FUNCTIONS = """
import torch
import pytorch_quantization
from pytorch_quantization import tensor_quant, utils
from pytorch_quantization.optim import helper
from pytorch_quantization.nn.modules import _utils, tensor_quantizer
torch.manual_seed(1)
x = torch.randn(3, 4, requires_grad=True)
tensor_quant.fake_tensor_quant(x, utils.reduce_amax(x)).sum().backward()
print(x.grad.tolist(), tensor_quant.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW, tensor_quant.QuantDescriptor(4).dict())
class Scaled(torch.nn.Linear, _utils.QuantMixin):
    default_quant_desc_weight = tensor_quant.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
    def __init__(self, *args, **kwargs):
        super().__init__(*args)
        self.init_quantizer(*_utils.pop_quant_desc_in_kwargs(type(self), **kwargs))
    def forward(self, x):
        return torch.nn.functional.linear(self._input_quantizer(x), self._weight_quantizer(self.weight))
layer = Scaled(4, 2)
print(layer(x).tolist(), [isinstance(m, tensor_quantizer.TensorQuantizer) for m in layer.modules()])
helper.freeze_parameters(layer, ["bias"])
print([p.requires_grad for p in layer.parameters()], pytorch_quantization.nn.Linear(2, 2, bias=False))
"""


@pytest.mark.parametrize("program", [PTQ, FUNCTIONS], ids=["ptq", "functions"])
def test_programs_compute_the_same(program: str) -> None:
    native = migrated(program)
    assert native != program
    assert "pytorch_quantization" not in native
    printed = []
    for text in (program, native):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(text, "program.py", "exec"), {"__name__": "__main__"})
        printed.append(out.getvalue())
    assert printed[0] == printed[1]
    assert len(printed[0]) > 200
