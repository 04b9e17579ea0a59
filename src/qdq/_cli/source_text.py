"""Python source as text and syntax tree together, and edits by position that leave everything else as it is."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FromImport:
    """`from module import leaf as name`."""

    module: str
    leaf: str
    name: str

    @property
    def item(self) -> str:
        """What stands after `import`."""
        return self.leaf if self.leaf == self.name else f"{self.leaf} as {self.name}"

    def __str__(self) -> str:
        return f"from {self.module} import {self.item}"


@dataclass(frozen=True)
class WholeImport:
    """`import a, b`, or `import a as name`."""

    modules: tuple[str, ...]
    name: str | None

    @property
    def item(self) -> str:
        """What stands after `import`."""
        return ", ".join(self.modules) + (f" as {self.name}" if self.name else "")

    def __str__(self) -> str:
        return f"import {self.item}"


NewImport = FromImport | WholeImport
_Token = tuple[int, int, str, int]  # start, end, text, type


class SourceText:
    """A source text, its syntax tree, and the edits made to it so far.

    Raises:
        SyntaxError, ValueError: not Python.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strings such as "\d", which are none of our business
            self.tree = ast.parse(text)
        self._lines = list(io.StringIO(text, newline=""))
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))
        self._edits: list[tuple[int, int, str]] = []

    def segment(self, node: ast.AST) -> str:
        """The text of a node."""
        start, end = self._span(node)
        return self.text[start:end]

    def replace(self, node: ast.AST, new: str) -> None:
        """Puts `new` where the node stands."""
        self._edits.append((*self._span(node), new))

    def edited(self) -> str:
        """The text with all edits.

        Raises:
            SyntaxError: the edits do not make a Python source.
        """
        pieces, position = [], 0
        for start, end, new in sorted(self._edits):
            pieces += [self.text[position:start], new]
            position = end
        text = "".join([*pieces, self.text[position:]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
        return text

    def holds_comments(self, statement: ast.stmt) -> bool:
        """Whether comments stand between the first and the last token of a statement."""
        return any(kind == tokenize.COMMENT for *_, kind in self._tokens(statement))

    def replace_imports(self, new: Mapping[ast.alias, NewImport]) -> None:
        """Replaces imported names, statement by statement; names that are not in `new` stay as they are."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import) and any(alias in new for alias in node.names):
                self._replace_import(node, new)
            elif isinstance(node, ast.ImportFrom) and any(alias in new for alias in node.names):
                self._replace_from_import(node, new)

    def _replace_import(self, node: ast.Import, new: Mapping[ast.alias, NewImport]) -> None:
        alone = new[node.names[0]] if len(node.names) == 1 else None
        if isinstance(alone, WholeImport) and len(alone.modules) > 1:
            self.replace(node, self._separator(node).join(f"import {module}" for module in alone.modules))
            return
        for alias in node.names:
            if alias in new:
                self.replace(alias, new[alias].item)

    def _replace_from_import(self, node: ast.ImportFrom, new: Mapping[ast.alias, NewImport]) -> None:
        becomes = [new.get(alias) for alias in node.names]
        modules = {item.module if isinstance(item, FromImport) else None for item in becomes}
        if len(modules) == 1 and None not in modules:
            self._edits.append((*self._module_span(node), modules.pop() or ""))
            for alias, item in zip(node.names, becomes, strict=True):
                if isinstance(item, FromImport) and item.leaf != alias.name:
                    self.replace(alias, item.item)
            return
        groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for index, (alias, item) in enumerate(zip(node.names, becomes, strict=True)):
            if item is None:
                groups[f"from {node.module} import "].append((index, self.segment(alias)))
            elif isinstance(item, FromImport):
                groups[f"from {item.module} import "].append((index, item.item))
            else:
                for module in item.modules:
                    groups[f"import {module}"] = []
        self.replace(node, self._separator(node).join(self._statement(node, *group) for group in groups.items()))

    def _statement(self, node: ast.ImportFrom, head: str, items: list[tuple[int, str]]) -> str:
        """One of the statements that an import becomes; items in parentheses keep their lines and comments."""
        texts = [text for _, text in items]
        opening, closing = self._parentheses(node)
        if opening is None or closing is None or not items:
            return head + ", ".join(texts)
        spans = [self._span(alias) for alias in node.names]
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        gaps = [self.text[end:start] for end, start in zip([opening + 1, *ends], [*starts, closing], strict=True)]
        # The rest of a line belongs to the item before it, the lines that follow to the item after it.
        rests, leads = zip(*(_split_after_line(gap) for gap in gaps), strict=True)
        first = rests[0] if items[0][0] == 0 else ""
        # Of the lines after the last item, the other statements get only the indentation of the parenthesis.
        end = leads[-1] if items[-1][0] == len(node.names) - 1 else re.split(r"[\r\n]", leads[-1])[-1]
        body = "".join(leads[index] + text + rests[index + 1] for index, text in items)
        if len(items) == 1 and "#" not in first + body + end:
            return head + texts[0]
        if not body.endswith(("\n", "\r")):
            return f"{head}({first}{body.rstrip(', ')})"
        if items[0][0] != 0 and rests[0]:
            first = self._newline(node)
        return f"{head}({first}{body}{end})"

    def _parentheses(self, node: ast.ImportFrom) -> tuple[int | None, int | None]:
        tokens = self._tokens(node)
        if tokens[-1][2] != ")":
            return None, None
        return next(start for start, _, text, _ in tokens if text == "("), tokens[-1][0]

    def _module_span(self, node: ast.ImportFrom) -> tuple[int, int]:
        """Where the dotted name after `from` stands."""
        tokens = self._tokens(node)
        last = next(index for index, token in enumerate(tokens) if token[2] == "import")
        names = [token for token in tokens[1:last] if token[2].strip() and token[3] in (tokenize.NAME, tokenize.OP)]
        return names[0][0], names[-1][1]

    def _separator(self, node: ast.stmt) -> str:
        """What goes between two statements that take the place of one."""
        start = self._starts[node.lineno - 1]
        before = self.text[start : self._span(node)[0]]
        return "; " if before.strip() else self._newline(node) + before

    def _newline(self, node: ast.stmt) -> str:
        """The line end that the file uses where a node stands."""
        for line in (self._lines[node.lineno - 1], self._lines[0]):
            if line.endswith(("\n", "\r")):
                return line[len(line.rstrip("\r\n")) :]
        return "\n"

    def _tokens(self, node: ast.stmt) -> list[_Token]:
        """The tokens of a statement, with their positions in the text."""
        start, end = self._span(node)
        lines = list(io.StringIO(self.text[start:end], newline=""))
        starts = [start]
        for line in lines:
            starts.append(starts[-1] + len(line))
        found = []
        for token in tokenize.generate_tokens(iter(lines).__next__):
            if token.type not in (tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER, tokenize.INDENT, tokenize.DEDENT):
                first = starts[token.start[0] - 1] + token.start[1]
                found.append((first, starts[token.end[0] - 1] + token.end[1], token.string, token.type))
        return found

    def _span(self, node: ast.AST) -> tuple[int, int]:
        """Where a node starts and ends; the tree counts columns in bytes of UTF-8."""
        line, column, end_line, end_column = node.lineno, node.col_offset, node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]
        return self._offset(line, column), self._offset(end_line, end_column)

    def _offset(self, line: int, column: int) -> int:
        text = self._lines[line - 1] if line <= len(self._lines) else ""
        if text.isascii():  # known without a look at the line
            return self._starts[line - 1] + min(column, len(text))
        return self._starts[line - 1] + len(text.encode()[:column].decode(errors="ignore"))


def _split_after_line(text: str) -> tuple[str, str]:
    """The text up to and with its first line end, and what follows."""
    lines = list(io.StringIO(text, newline=""))
    if not lines or not lines[0].endswith(("\n", "\r")):
        return text, ""
    return lines[0], "".join(lines[1:])
