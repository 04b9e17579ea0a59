"""Which binding every name of a source file refers to: Python's rules of scope, applied to a syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass(eq=False)
class Scope:
    """A module, class, function or comprehension, and what is bound in it."""

    kind: Literal["module", "class", "function", "comprehension"]
    parent: Scope | None = None
    bindings: dict[str, list[ast.AST]] = field(default_factory=dict)
    declared: dict[str, str] = field(default_factory=dict)  # names of global and nonlocal statements


@dataclass(frozen=True, eq=False)
class BoundImport:
    """One name of an import statement."""

    statement: ast.Import | ast.ImportFrom
    alias: ast.alias
    name: str
    scope: Scope  # where the name is bound
    within: Scope  # where the statement stands; another scope after `global`


class Names(ast.NodeVisitor):
    """The scopes, imports and uses of names of a module."""

    def __init__(self, tree: ast.Module) -> None:
        self.module = Scope("module")
        self.imports: list[BoundImport] = []
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self._scope = self.module
        self._loads: list[tuple[ast.Name, Scope]] = []
        self._scopes = [self.module]
        self.generic_visit(tree)

    def uses(self) -> Iterator[tuple[ast.Name, Scope]]:
        """Every name that is read or deleted, in the order of the text, with the scope that binds it."""
        for node, scope in sorted(self._loads, key=lambda use: (use[0].lineno, use[0].col_offset)):
            found = self.resolve(node.id, scope)
            if found is not None:
                yield node, found

    def resolve(self, name: str, scope: Scope) -> Scope | None:
        """The scope whose binding `name` means in `scope`; None for builtins and names that are not bound."""
        current: Scope | None = scope
        while current is not None:
            if current is scope or current.kind != "class":
                if current.declared.get(name) == "global":
                    return self.module
                if name in current.bindings and name not in current.declared:
                    return current
            current = current.parent
        return None

    def bindings_of(self, name: str) -> list[ast.AST]:
        """What binds `name`, in any scope."""
        return [node for scope in self._scopes for node in scope.bindings.get(name, ())]

    def read_anywhere(self, name: str) -> bool:
        """Whether `name` is read in any scope."""
        return any(node.id == name for node, _ in self._loads)

    # Bindings.

    def _bind(self, name: str, node: ast.AST, scope: Scope | None = None) -> Scope:
        target = scope or self._scope
        how = target.declared.get(name)
        if how == "global":
            target = self.module
        elif how == "nonlocal":
            outer = target.parent
            while outer is not None and not (outer.kind == "function" and name not in outer.declared):
                outer = outer.parent
            target = outer or self.module
        target.bindings.setdefault(name, []).append(node)
        return target

    def visit_Global(self, node: ast.Global) -> None:
        self._scope.declared.update(dict.fromkeys(node.names, "global"))

    def visit_Nonlocal(self, node: ast.Nonlocal) -> None:
        self._scope.declared.update(dict.fromkeys(node.names, "nonlocal"))

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self._bind(node.id, node)
        else:
            self._loads.append((node, self._scope))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        scope = self._scope
        while scope.kind == "comprehension" and scope.parent is not None:
            scope = scope.parent
        self._bind(node.target.id, node.target, scope)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):  # read as well as bound
            self._loads.append((node.target, self._scope))
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self._visit_import(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._visit_import(node)

    def _visit_import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name == "*":
                continue
            first = alias.name.partition(".")[0]
            name = alias.asname or first
            self.imports.append(BoundImport(node, alias, name, self._bind(name, alias), self._scope))

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name:
            self._bind(node.name, node)
        self.generic_visit(node)

    def visit_MatchAs(self, node: ast.MatchAs) -> None:
        if node.name:
            self._bind(node.name, node)
        self.generic_visit(node)

    def visit_MatchStar(self, node: ast.MatchStar) -> None:
        if node.name:
            self._bind(node.name, node)

    def visit_MatchMapping(self, node: ast.MatchMapping) -> None:
        if node.rest:
            self._bind(node.rest, node)
        self.generic_visit(node)

    # Scopes. What is evaluated outside (decorators, defaults, annotations, bases) is visited before the scope opens.

    def _inside(
        self,
        kind: Literal["class", "function", "comprehension"],
        nodes: Iterable[ast.AST],
        bound: Iterable[ast.arg] = (),
    ) -> None:
        outer = self._scope
        self._scope = Scope(kind, outer)
        self._scopes.append(self._scope)
        for argument in bound:
            self._bind(argument.arg, argument)
        for node in nodes:
            self.visit(node)
        self._scope = outer

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._bind(node.name, node)
        arguments = _arguments(node.args)
        annotations = [argument.annotation for argument in arguments]
        for part in (*node.decorator_list, *_bounds(node), *_defaults(node.args), *annotations, node.returns):
            if part is not None:
                self.visit(part)
        self._inside("function", node.body, arguments)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for default in _defaults(node.args):
            self.visit(default)
        self._inside("function", [node.body], _arguments(node.args))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._bind(node.name, node)
        for part in (*node.decorator_list, *_bounds(node), *node.bases, *node.keywords):
            self.visit(part)
        self._inside("class", node.body)

    def _visit_comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        first, *others = node.generators
        self.visit(first.iter)
        results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        self._inside("comprehension", [first.target, *first.ifs, *others, *results])

    def visit_ListComp(self, node: ast.ListComp) -> None:
        self._visit_comprehension(node)

    def visit_SetComp(self, node: ast.SetComp) -> None:
        self._visit_comprehension(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        self._visit_comprehension(node)

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self._visit_comprehension(node)


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    found = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return found + [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]


def _bounds(node: ast.AST) -> list[ast.AST]:
    """The type parameters, which Python has since 3.12, for the names in their bounds."""
    return getattr(node, "type_params", [])


def _defaults(arguments: ast.arguments) -> list[ast.expr]:
    return [default for default in (*arguments.defaults, *arguments.kw_defaults) if default is not None]
