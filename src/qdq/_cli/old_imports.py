"""What one source text takes from the old package, and what each of it becomes under native names."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from qdq._cli.import_table import (
    NATIVE,
    OLD_PACKAGE,
    SAME_ROLE,
    WITHOUT_NATIVE_NAME,
    is_lost,
    is_old_module,
    module_of,
    native_below,
)
from qdq._cli.mentions import Mentions
from qdq._cli.scopes import BoundImport, Names, Scope
from qdq._cli.source_text import FromImport, NewImport, SourceText, WholeImport

_ADVICE = "new code converts one model, without a change to torch.nn: qdq.nn.quantize_modules(model)"
_INITIALIZE = {f"{OLD_PACKAGE}.initialize", f"{OLD_PACKAGE}.quant_modules.initialize"}


@dataclass(frozen=True)
class Finding:
    """Something that a file takes from the old package."""

    line: int
    kind: Literal["import", "use", "left", "note"]
    old: str
    new: str
    """What it becomes; the reason where it is left; the advice of a note."""


@dataclass(frozen=True)
class Migration:
    """A source text under native names, as far as that is safe, and everything that was found."""

    text: str
    findings: list[Finding]


@dataclass(frozen=True, eq=False)
class _Use:
    """A read of a bound name, with the attributes after it that belong to the dotted name of the old package."""

    node: ast.expr
    base: ast.Name
    old: str


class _Left(Exception):
    """Why a name cannot be rewritten safely."""


def migrate_text(text: str, taken: Collection[str] = ()) -> Migration:
    """Finds the imports and uses of the old package in a source text, and rewrites what can be rewritten safely.

    Args:
        text: Python source, with any line ends.
        taken: module-level names that other files take from this one; they stay bound to what they are.

    Raises:
        SyntaxError: not Python.
        ValueError: not Python (null bytes).
    """
    return _File(text, taken).migrate()


class _File:
    def __init__(self, text: str, taken: Collection[str]) -> None:
        self.source = SourceText(text)
        self.tree = self.source.tree
        self.names = Names(self.tree)
        self.parents = self.names.parents
        self.taken = frozenset(taken)
        self.findings: list[Finding] = []
        self.new_imports: dict[ast.alias, NewImport] = {}
        self.mentions = Mentions(self.tree, self.parents)
        self.read_in_classes: dict[str, int] = {}  # names that classes bind too, and a line

    def migrate(self) -> Migration:
        groups = self._groups()
        uses = self._uses(groups)
        by_name = self.mentions.lookup()
        for key, group in groups.items():
            try:
                if by_name is not None:
                    raise _Left(f"line {by_name} looks the old package up by its name at run time")
                self._rewrite(key, group, uses[key])
            except _Left as reason:
                self._leave(group, uses[key], str(reason))
        self._stars()
        self._note_mentions()
        self.source.replace_imports(self.new_imports)
        text = self.source.edited()
        return Migration(text, sorted(self.findings, key=lambda finding: finding.line))

    # What is there.

    def _groups(self) -> dict[tuple[Scope, str], list[BoundImport]]:
        """The imports of the old package, by the name that they bind and where."""
        groups: dict[tuple[Scope, str], list[BoundImport]] = defaultdict(list)
        for bound in self.names.imports:
            if _target(bound) is not None:
                groups[bound.scope, bound.name].append(bound)
        return dict(groups)

    def _uses(self, groups: dict[tuple[Scope, str], list[BoundImport]]) -> dict[tuple[Scope, str], list[_Use]]:
        uses: dict[tuple[Scope, str], list[_Use]] = {key: [] for key in groups}
        for name, scope in self.names.uses():
            group = groups.get((scope, name.id))
            if group is None:
                if scope.kind == "class":  # where the class has not bound it yet, it is that of the module
                    self.read_in_classes.setdefault(name.id, name.lineno)
                continue
            node: ast.expr = name
            old = _target(group[0]) or ""
            while is_old_module(old):
                parent = self.parents.get(node)
                if not (isinstance(parent, ast.Attribute) and parent.value is node):
                    break
                node, old = parent, f"{old}.{parent.attr}"
            uses[scope, name.id].append(_Use(node, name, old))
        return uses

    # What becomes of it.

    def _rewrite(self, key: tuple[Scope, str], group: list[BoundImport], uses: list[_Use]) -> None:
        targets = {_target(bound) or "" for bound in group}
        if all(target in NATIVE for target in targets):
            self._rewrite_objects(group, uses)
            return
        if len(targets) > 1:
            raise _Left(f"the name {key[1]} stands for several things of the old package")
        (target,) = targets
        if not is_old_module(target):
            raise _Left(_why_unknown(target))
        self._check_uses(uses)
        if key[0].kind == "class":
            raise _Left("it is an attribute of a class")
        if key[0] is self.names.module and key[1] in self.taken:
            raise _Left("another of the files takes this name from here")
        if key[0] is self.names.module and key[1] in self.read_in_classes:
            raise _Left(f"line {self.read_in_classes[key[1]]} reads the name in a class that binds it too")
        for module in SAME_ROLE[target]:
            if self._keep_name(key, group, uses, module):
                return
        self._write_full_names(key, group, uses)

    def _rewrite_objects(self, group: list[BoundImport], uses: list[_Use]) -> None:
        """Classes, functions and constants: the bound name stays, so only the import changes."""
        natives: dict[str, str] = {}
        for bound in group:
            target = _target(bound) or ""
            native = self._chosen(bound)
            natives[target] = native
            module, _, leaf = native.rpartition(".")
            self._import(bound, FromImport(module, leaf, bound.name))
        for use in uses:
            self._use(use, " or ".join(natives.values()))

    def _chosen(self, bound: BoundImport) -> str:
        """The native name of an imported object: in a module that has all objects of the statement, if there is one."""
        target = _target(bound) or ""
        together = [f"{bound.statement.module}.{alias.name}" for alias in bound.statement.names]  # type: ignore[union-attr]
        objects = [name for name in together if name in NATIVE]
        for native in NATIVE[objects[0]]:
            homes = [[module_of(candidate) for candidate in NATIVE[name]] for name in objects]
            if all(module_of(native) in modules for modules in homes):
                return next(name for name in NATIVE[target] if module_of(name) == module_of(native))
        return NATIVE[target][0]

    def _check_uses(self, uses: list[_Use]) -> None:
        """Refuses uses of a module that are more than the reading of a published name of it."""
        for use in uses:
            line = use.node.lineno
            if is_old_module(use.old):
                if use.node is not use.base or not self._is_test(use.node):
                    raise _Left(f"line {line} uses the module itself as a value")
            elif use.old not in NATIVE:
                raise _Left(f"line {line} uses {use.old}: {_why_unknown(use.old)}")
            elif not isinstance(use.node.ctx, ast.Load):  # type: ignore[attr-defined]
                raise _Left(f"line {line} assigns to or deletes an attribute of the module")

    def _is_test(self, node: ast.AST) -> bool:
        """Whether only the truth of a name is asked for, or whether it is None."""
        parent = self.parents.get(node)
        if isinstance(parent, ast.Compare):
            others = parent.comparators
            return len(others) == 1 and isinstance(others[0], ast.Constant) and others[0].value is None
        if isinstance(parent, ast.BoolOp):
            return self._is_test(parent)
        if isinstance(parent, ast.UnaryOp):
            return isinstance(parent.op, ast.Not)
        return isinstance(parent, (ast.If, ast.While, ast.IfExp, ast.Assert)) and parent.test is node

    def _keep_name(self, key: tuple[Scope, str], group: list[BoundImport], uses: list[_Use], module: str) -> bool:
        """The bound name comes to mean a native module, where one module has all that is used."""
        name, target = key[1], _target(group[0]) or ""
        renamed = any(isinstance(bound.statement, ast.Import) and not bound.alias.asname for bound in group)
        if renamed or (len(SAME_ROLE[target]) > 1 and not uses):
            return False
        new_texts: dict[_Use, str] = {}
        for use in uses:
            if use.node is not use.base:
                native = native_below(use.old, module)
                if native is None:
                    return False
                new_texts[use] = name + native.removeprefix(module)
        changed = {use: new for use, new in new_texts.items() if new != self.source.segment(use.node)}
        self._check_changes(key, group, changed, target, module)
        for bound in group:
            parent, _, leaf = module.rpartition(".")
            whole = isinstance(bound.statement, ast.Import)
            self._import(bound, WholeImport((module,), name) if whole else FromImport(parent, leaf, name))
        for use in uses:
            self._use(use, module + new_texts.get(use, name).removeprefix(name), changed.get(use))
        return True

    def _check_changes(
        self, key: tuple[Scope, str], group: list[BoundImport], changed: Iterable[_Use], target: str, module: str
    ) -> None:
        """Refuses uses that cannot change together with the import, and texts that would no longer be true."""
        others = [node for node in self._other_bindings(key, group) if not self._binds_none(node)]
        for use in changed:
            why = self._unwritable(use, target)
            if why:
                raise _Left(f"line {use.node.lineno} {why}")
            if others:
                raise _Left(f"line {_line(others[0])} binds {key[1]} to something else, and {use.old} has another name")
        mention = self.mentions.of_lost_attribute(
            key[1], lambda path, begins: is_lost(path, target, module, begins=begins)
        )
        if mention:
            raise _Left(f"{mention}, which {module} does not have")

    def _write_full_names(self, key: tuple[Scope, str], group: list[BoundImport], uses: list[_Use]) -> None:
        """Every use becomes a full native name (`qdq.train.freeze_parameters`), and the import that of its modules."""
        scope, name = key
        target = _target(group[0]) or ""
        if not uses and target != OLD_PACKAGE:
            raise _Left("nothing here uses it, and its names live in several modules of qdq")
        self._check_full_names(scope, name, group, uses, target)
        homes: dict[BoundImport, set[str]] = {bound: set() for bound in group}
        for use in uses:
            home = module_of(NATIVE[use.old][0])
            for bound in _serving(use, group) if target == OLD_PACKAGE else group:
                homes[bound].add(home)
            self._use(use, NATIVE[use.old][0], NATIVE[use.old][0])
        for bound, modules in homes.items():
            if not modules:
                modules.update(SAME_ROLE.get(bound.alias.name, ())[:1] or ("qdq",))
            needed = [m for m in modules if not any(other.startswith(f"{m}.") for other in modules)]
            self._import(bound, WholeImport(tuple(sorted(needed)), None))

    def _check_full_names(
        self, scope: Scope, name: str, group: list[BoundImport], uses: list[_Use], target: str
    ) -> None:
        several = "its names live in several modules of qdq, and " if target != OLD_PACKAGE else ""
        others = self._other_bindings((scope, name), group)
        if others:
            raise _Left(f"{several}line {_line(others[0])} binds {name} to something else")
        if any(bound.within is not scope for bound in group):
            raise _Left(f"{several}a global or nonlocal statement moves {name} out of its scope")
        for use in uses:
            if use.node is use.base:
                raise _Left(f"{several}line {use.node.lineno} uses the module itself as a value")
            why = self._unwritable(use, target)
            if why:
                raise _Left(f"{several}line {use.node.lineno} {why}")
        mention = self.mentions.of_name(name, attributes=target == OLD_PACKAGE)
        if mention:
            raise _Left(f"{several}{mention}")
        bindings = self.names.bindings_of("qdq")
        if any(node not in self.names.module.bindings.get("qdq", ()) or not _imports_qdq(node) for node in bindings):
            raise _Left(f"{several}the name qdq is bound to something else here")
        if scope is not self.names.module and self.names.read_anywhere("qdq"):
            raise _Left(f"{several}an import of qdq inside a function would hide the one outside")
        if any(self.source.holds_comments(bound.statement) for bound in group):
            raise _Left(f"{several}comments stand inside the import statement")

    def _other_bindings(self, key: tuple[Scope, str], group: list[BoundImport]) -> list[ast.AST]:
        """What binds the name besides the imports of the old package."""
        aliases = {bound.alias for bound in group}
        return [node for node in key[0].bindings[key[1]] if node not in aliases]

    def _binds_none(self, node: ast.AST) -> bool:
        """Whether a binding is to None, or only an annotation."""
        parent = self.parents.get(node)
        if not isinstance(parent, (ast.Assign, ast.AnnAssign)):
            return False
        return parent.value is None or (isinstance(parent.value, ast.Constant) and parent.value.value is None)

    def _unwritable(self, use: _Use, target: str) -> str | None:
        """Why the text of a use cannot be replaced."""
        node: ast.AST | None = use.node
        while node is not None:
            if isinstance(node, ast.JoinedStr) and sys.version_info < (3, 12):
                return "is inside an f-string"  # whose positions Python only knows since 3.12
            node = self.parents.get(node)
        if self.source.segment(use.node) != use.base.id + use.old.removeprefix(target):
            return "writes the name with spaces or line breaks in it"
        return None

    # What is reported and recorded.

    def _import(self, bound: BoundImport, new: NewImport) -> None:
        self.new_imports[bound.alias] = new
        self._report(bound.alias.lineno, "import", _import_text(bound), str(new))

    def _use(self, use: _Use, native: str, new_text: str | None = None) -> None:
        if new_text is not None:
            self.source.replace(use.node, new_text)
        self._report(use.node.lineno, "use", use.old, native)
        self._advise(use)

    def _advise(self, use: _Use) -> None:
        parent = self.parents.get(use.node)
        if use.old in _INITIALIZE and isinstance(parent, ast.Call) and parent.func is use.node:
            self._report(use.node.lineno, "note", f"{use.old}()", _ADVICE)

    def _leave(self, group: list[BoundImport], uses: list[_Use], reason: str) -> None:
        for bound in group:
            self._report(bound.alias.lineno, "left", _import_text(bound), reason)
        for use in uses:
            self._report(use.node.lineno, "left", use.old, f"its import on line {group[0].alias.lineno} is left")
            self._advise(use)

    def _stars(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*" and _is_old(node.module, node.level):
                reason = "a star import does not say which names it takes"
                self._report(node.lineno, "left", f"from {node.module} import *", reason)

    def _note_mentions(self) -> None:
        for line, text, reason in self.mentions.of_old_package():
            self._report(line, "left", text, reason)

    def _report(self, line: int, kind: Literal["import", "use", "left", "note"], old: str, new: str) -> None:
        self.findings.append(Finding(line, kind, old, new))


def _is_old(module: str | None, level: int = 0) -> bool:
    return level == 0 and module is not None and f"{module}.".startswith(f"{OLD_PACKAGE}.")


def _target(bound: BoundImport) -> str | None:
    """What the bound name stands for, if it is something of the old package."""
    statement, alias = bound.statement, bound.alias
    if isinstance(statement, ast.ImportFrom):
        return f"{statement.module}.{alias.name}" if _is_old(statement.module, statement.level) else None
    if not _is_old(alias.name):
        return None
    return alias.name if alias.asname else OLD_PACKAGE


def _serving(use: _Use, group: list[BoundImport]) -> list[BoundImport]:
    """Those of several `import pytorch_quantization.x` whose path leads closest to what is used."""
    closest = ""
    for bound in group:
        path = bound.alias.name
        if f"{use.old}.".startswith(f"{path}.") and len(path) > len(closest):
            closest = path
    return [bound for bound in group if bound.alias.name == closest] or group


def _import_text(bound: BoundImport) -> str:
    alias, statement = bound.alias, bound.statement
    name = alias.name + (f" as {alias.asname}" if alias.asname else "")
    return f"from {statement.module} import {name}" if isinstance(statement, ast.ImportFrom) else f"import {name}"


def _why_unknown(old: str) -> str:
    return WITHOUT_NATIVE_NAME.get(old, "not a published name of the old package")


def _imports_qdq(node: ast.AST) -> bool:
    return isinstance(node, ast.alias) and node.asname is None and f"{node.name}.".startswith("qdq.")


def _line(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)
