"""What the strings and doctests of a source file say: of the old package, and of the names that its imports bind."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from qdq._cli.import_table import OLD_PACKAGE

_PATH = re.compile(rf"{OLD_PACKAGE}(\.\w+)*\.?")  # of a string's value
_DOCTEST = re.compile(r"\s*(?:>>>|\.\.\.) (.*)")
_IMPORTS_BY_NAME = {"import_module", "__import__", "find_spec", "importorskip"}


@dataclass(frozen=True)
class _Text:
    """A string, or a line of a doctest, that may be code."""

    line: int
    what: str
    text: str
    goes_on: bool = False  # more is put after it at run time
    imports: str = ""  # the imports of the same doctest

    def imports_itself(self, name: str) -> bool:
        return re.search(rf"\bimport\b.*(?<![\w.]){name}(?!\w)", self.imports) is not None


class Mentions:
    """The strings and doctests of a syntax tree.

    Args:
        tree: the tree.
        parents: the parent of each of its nodes.
    """

    def __init__(self, tree: ast.Module, parents: Mapping[ast.AST, ast.AST]) -> None:
        self._parents = parents
        self._strings: list[ast.Constant] = []
        self._doctests: list[_Text] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if isinstance(parents.get(node), ast.Expr):  # a docstring, or another string that stands alone
                    self._doctests += _doctest(node)
                else:
                    self._strings.append(node)
        self._code = [self._text(node) for node in self._strings if self._harmless(node) is None]
        self._code += [text for text in self._doctests if not _is_import(text.text)]

    def of_name(self, name: str, *, attributes: bool) -> str | None:
        """Where `name` (with `attributes`: an attribute of it) is mentioned, if it is."""
        pattern = re.compile(rf"(?<![\w.]){name}" + (r"\.\w" if attributes else r"(?!\w)"))
        for code in self._code:
            if pattern.search(code.text) and not code.imports_itself(name):
                return f"{code.what} on line {code.line} names {name}"
        return None

    def of_lost_attribute(self, name: str, is_lost: Callable[[str, bool], bool]) -> str | None:
        """Where an attribute of `name` is mentioned that would be lost, if one is.

        Args:
            name: the name.
            is_lost: says of `.dotted.path` after the name whether it would be lost; its second argument says that only
                the beginning of the path is known, as in `f"nn.{kind}"`.
        """
        pattern = re.compile(rf"(?<![\w.]){name}((?:\.\w+)*\.?)")
        for code in self._code:
            for match in pattern.finditer(code.text):
                path, after = match[1], code.text[match.end() : match.end() + 1]
                begins = after in ("{", "%") or (code.goes_on and not after)
                if path and is_lost(path if begins else path.rstrip("."), begins) and not code.imports_itself(name):
                    return f"{code.what} on line {code.line} names {name}{path}{'*' if begins else ''}"
        return None

    def lookup(self) -> int | None:
        """The line of a string through which code reaches into the old package as a module object, if there is one."""
        for node in self._strings:
            if _PATH.fullmatch(str(node.value)):
                parent = self._parents.get(node)
                dotted_argument = isinstance(parent, ast.Call) and "." in str(node.value)
                if (dotted_argument and self._harmless(node) is None) or _in_sys_modules(parent):
                    return node.lineno
        return None

    def of_old_package(self) -> Iterator[tuple[int, str, str]]:
        """Line, text and kind of everything that names the old package."""
        for node in self._strings:
            if _PATH.fullmatch(str(node.value)):
                yield node.lineno, repr(node.value), self._harmless(node) or "a string: look at it yourself"
        for code in self._doctests:
            if re.search(rf"(?<![\w.]){OLD_PACKAGE}(?!\w)", code.text):
                yield code.line, code.text.strip(), "a doctest: look at it yourself"

    def _text(self, node: ast.Constant) -> _Text:
        goes_on = isinstance(self._parents.get(node), (ast.JoinedStr, ast.BinOp))
        return _Text(node.lineno, "a string", str(node.value), goes_on)

    def _harmless(self, node: ast.Constant) -> str | None:
        """What a string is, where it names the old package without reaching into it through other code's imports."""
        parent = self._parents.get(node)
        function = parent.func if isinstance(parent, ast.Call) else None
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name == "getLogger":
            return "the name of a logger: those of qdq begin with qdq"
        return "imported by a string at run time" if name in _IMPORTS_BY_NAME else None


def _doctest(node: ast.Constant) -> list[_Text]:
    """The lines of code in a docstring."""
    found = []
    for index, line in enumerate(str(node.value).split("\n")):
        match = _DOCTEST.match(line)
        if match:
            # An escaped line end is a line of the value only.
            found.append((min(node.lineno + index, node.end_lineno or node.lineno), match[1]))
    imports = "\n".join(code for _, code in found if _is_import(code))
    return [_Text(line, "a doctest", code, imports=imports) for line, code in found]


def _is_import(code: str) -> bool:
    return code.lstrip().startswith(("import ", "from "))


def _in_sys_modules(parent: ast.AST | None) -> bool:
    """Whether a string is looked up in `sys.modules`."""
    places: list[ast.AST] = []
    if isinstance(parent, ast.Subscript):
        places = [parent.value]
    elif isinstance(parent, ast.Compare):
        places = [*parent.comparators]
    elif isinstance(parent, ast.Call) and isinstance(parent.func, ast.Attribute):
        places = [parent.func.value]
    return any(isinstance(place, ast.Attribute) and place.attr == "modules" for place in places)
