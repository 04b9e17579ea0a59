"""`qdq migrate` on texts: which imports are left, why, and what is listed beside them."""

from __future__ import annotations

import sys
from textwrap import dedent

import pytest

from qdq._cli.old_imports import Finding, migrate_text


def left(text: str) -> list[Finding]:
    """What is left, of a text that does not change."""
    result = migrate_text(dedent(text))
    assert result.text == dedent(text)
    return [finding for finding in result.findings if finding.kind == "left"]


T = "from pytorch_quantization import tensor_quant as t\nt.tensor_quant, t.QUANT_DESC_8BIT_PER_TENSOR\n"
NN = "from pytorch_quantization import nn\n"
Q = "from pytorch_quantization import nn as q\n"
DOCTEST = 'def f():\n    """Adds.\n\n    >>> {}\n    """\n'
LEFT = {
    "if 1:\n    import pytorch_quantization.nn as q\nelse:\n    import torch.nn as q\nq.Linear\n": "line 4 binds q to",
    "def f():\n    try:\n        " + Q + "    except ImportError:\n        from torch import nn as q\n"
    "    return q.Linear\n": "line 5 binds q to something else, and pytorch_quantization.nn.Linear has another name",
    Q + "q = other\nq.Linear\n": "line 2 binds q to something else",
    Q + "q.Linear\nclass C:\n    q = q.Clip\n": "line 4 reads the name in a class that binds it too",
    Q + "(q . Linear)\n": "line 2 writes the name with spaces",
    Q + "def f(a: 'q.Linear'): ...\n": "a string on line 2 names q.Linear, which qdq.nn does not have",
    Q + "eval('q.Linear(1, 2)')\n": "a string on line 2 names q.Linear, which",
    Q + "eval('q.modules.clip.Clip')\n": "a string on line 2 names q.modules.clip.Clip, which",
    Q + "eval(f'q.{k}')\n": "a string on line 2 names q.*, which",
    Q + "eval('q.%s' % k)\n": "a string on line 2 names q.*, which",
    Q + "eval('q.Li' + k)\n": "a string on line 2 names q.Li*, which",
    Q + DOCTEST.format("q.Linear(1, 2)"): "a doctest on line 5 names q.Linear, which qdq.nn does not have",
    "import pytorch_quantization as pq\neval('pq.quant_modules')\n": "names pq.quant_modules, which qdq does not have",
    "import pytorch_quantization as pq\neval('pq.__version__')\n": "names pq.__version__, which qdq does not have",
    "from pytorch_quantization import optim\neval('optim.helper')\n": "names optim.helper, which qdq.train does not",
    "from pytorch_quantization.nn import *\n": "a star import does not say which names it takes",
    "from pytorch_quantization.nn import QuantFoo\n": "not a published name of the old package",
    "from pytorch_quantization import __version__\n": "the version of the old interface, which only the old name has",
    NN + "nn.QuantFoo\n": "line 2 uses pytorch_quantization.nn.QuantFoo: not a published",
    "from pytorch_quantization.utils import quant_logging\nquant_logging.reset_logger_handler()\n": "the call can go",
    NN + "f(nn)\n": "line 2 uses the module itself as a value",
    NN + "if nn == None or nn.modules: pass\n": "line 2 uses the module itself as a value",
    NN + "del nn\n": "line 2 uses the module itself as a value",
    "import pytorch_quantization\nf(pytorch_quantization)\n": "line 2 uses the module itself as a value",
    "import pytorch_quantization\nif pytorch_quantization: pass\n": "line 2 uses the module itself as a value",
    NN + "nn.QuantLinear = 1\n": "line 2 assigns to or deletes an attribute of the module",
    "class C:\n    from pytorch_quantization import nn\n": "it is an attribute of a class",
    "from pytorch_quantization import nn as q, calib as q\n": "stands for several things",
    "from pytorch_quantization import tensor_quant\n": "nothing here uses it, and its names live in several",
    T + "t = None\n": "its names live in several modules of qdq, and line 3 binds t to something else",
    "def f():\n    global t\n    " + T: "a global or nonlocal statement moves t out of its scope",
    T + "(t . tensor_quant)\n": "line 3 writes the name with spaces or line breaks in it",
    T + "(t\n.tensor_quant)\n": "line 3 writes the name with spaces or line breaks in it",
    T + "def f(d: 't.QuantDescriptor'): ...\n": "a string on line 3 names t",
    T + DOCTEST.format("t.tensor_quant"): "a doctest on line 6 names t",
    T + "__all__ = ['t']\n": "a string on line 3 names t",
    "import pytorch_quantization\ndef f(d: 'pytorch_quantization.nn.Clip'): ...\n": "names pytorch_quantization",
    T + "qdq = 1\n": "the name qdq is bound to something else here",
    T + "def f(qdq): ...\n": "the name qdq is bound to something else here",
    T + "import torch as qdq\n": "the name qdq is bound to something else here",
    "import qdq\ndef f():\n    qdq.nn\n    " + T.replace("\n", "\n    ") + "\n": "would hide the one outside",
    "from pytorch_quantization import (\n    tensor_quant as t,  # c\n)\n"
    + T.partition("\n")[2]: "comments stand inside",
    NN + "sys.modules['pytorch_quantization.nn']\n": "line 2 looks the old package up by",
    NN + "'pytorch_quantization' in sys.modules\n": "line 2 looks the old package up by",
    NN + "sys.modules.get('pytorch_quantization')\n": "line 2 looks the old package up by",
    NN + "patch('pytorch_quantization.nn.Clip')\n": "line 2 looks the old package up by",
}


@pytest.mark.parametrize("text", LEFT)
def test_left_with_the_reason(text: str) -> None:
    found = left(text)
    assert any(LEFT[text] in finding.new for finding in found), found


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="positions inside f-strings are known since 3.12")
def test_uses_inside_f_strings_are_left() -> None:
    assert any("line 3 is inside an f-string" in finding.new for finding in left(T + "f'{t.tensor_quant}'\n"))


def test_names_that_other_files_take_are_left() -> None:
    result = migrate_text("from pytorch_quantization import nn as quant_nn, calib\n", taken={"quant_nn"})
    assert result.text == "from pytorch_quantization import nn as quant_nn\nfrom qdq import calib\n"
    assert [f.new for f in result.findings if f.kind == "left"] == ["another of the files takes this name from here"]


def test_strings_are_named_and_do_not_stop_the_rest() -> None:
    before = """\
        import importlib, logging
        from pytorch_quantization import nn
        importlib.import_module("pytorch_quantization.calib")
        logging.getLogger("pytorch_quantization.nn")
        install_requires = ["pytorch_quantization"]
        """
    result = migrate_text(dedent(before))
    assert result.text == dedent(before).replace("from pytorch_quantization", "from qdq")
    assert [(f.line, f.old, f.new) for f in result.findings if f.kind == "left"] == [
        (3, "'pytorch_quantization.calib'", "imported by a string at run time"),
        (4, "'pytorch_quantization.nn'", "the name of a logger: those of qdq begin with qdq"),
        (5, "'pytorch_quantization'", "a string: look at it yourself"),
    ]


@pytest.mark.parametrize(
    "after",
    [
        "eval('q.QuantLinear(1, 2)')\n",
        "eval(f'q.Quant{k}')\n",
        "open('q.txt'), 'see q.'\n",
        "f('torch.q.Linear', 'quant_q.Linear')\n",
        '"""q.Linear is faster."""\n',
        DOCTEST.format("q.QuantLinear(1, 2)"),
    ],
)
def test_mentions_that_stay_true_do_not_stop_it(after: str) -> None:
    result = migrate_text(Q + after)
    assert result.text == Q.replace("pytorch_quantization", "qdq") + after
    assert [finding.kind for finding in result.findings] == ["import"]


def test_doctests_with_imports_of_their_own_are_listed() -> None:
    example = DOCTEST.format("import pytorch_quantization.nn as q\n    >>> q.Linear(1, 2)")
    result = migrate_text(Q + example)
    assert result.text == Q.replace("pytorch_quantization", "qdq") + example
    assert [f for f in result.findings if f.kind == "left"] == [
        Finding(5, "left", "import pytorch_quantization.nn as q", "a doctest: look at it yourself")
    ]
    escaped = migrate_text("x = 1\n'\\n\\n>>> pytorch_quantization.nn'\n")
    assert [(f.line, f.old) for f in escaped.findings] == [(2, "pytorch_quantization.nn")]


def test_other_packages_and_relative_imports_are_not_touched() -> None:
    text = "from .pytorch_quantization import nn\nimport pytorch_quantization_extras.nn\nfrom . import calib\n"
    assert migrate_text(text).findings == []
