"""A function's twin: the same code, in which Python that needs the value of a token can be traced.

    if token == eos: break          becomes     if truth(token == eos, 0): break
    token.item() in stop_ids                    contains(item(token), stop_ids)
    print(token)                                if not tracing(): print(token)
    for _ in tqdm(range(n)):                    for _ in (TracedBar if tracing() else tqdm)(range(n)):

The functions that are called so stand in twin_calls.py. Nothing else changes: the twin has the globals, the free
variables and the lines of the function. So it needs the function's source.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import logging
import os
import sys
import textwrap
import time
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from smc_compile.program import twin_calls
from smc_compile.program.callables import cells_of, function_like, innermost, wrapped

_CALLS = "__smc_compile__"  # the twin's name for twin_calls
_VALUES = {"item": "item", "tolist": "as_list"}  # methods that ask for values -> what is called instead
_DEPTH = 3  # functions that call functions
_CLOCKS = [time.time, time.perf_counter, time.monotonic, time.process_time]


@dataclass(frozen=True)
class Twin:
    """A twin and its branches.

    Attributes:
        branches: the line of each branch, ``file.py:12: token == eos``, by its number.
        plan: which way each branch goes while the loop goes on.
        quiet: the lines that are not traced, as they write for a person or take the time.
    """

    function: types.FunctionType
    branches: dict[int, str]
    plan: twin_calls.Plan
    quiet: tuple[str, ...] = ()


def twin_of(function: types.FunctionType, end: int | None = None) -> Twin | None:
    """The twin of a function; None where its source is not known, or is not that of its code.

    With ``end``, what is traced ends before the statement of that line.
    """
    branches = _Branches()
    twin = _twin(function, branches, end)
    if twin is None:
        return None
    return Twin(twin, branches.lines, branches.plan, tuple(dict.fromkeys(branches.quiet)))


@dataclass
class _Branches:
    """What is known of the branches of a function and of those that it calls."""

    lines: dict[int, str] = field(default_factory=dict)
    plan: dict[int, bool] = field(default_factory=dict)
    quiet: list[str] = field(default_factory=list)
    under_way: list[types.FunctionType] = field(default_factory=list)


def _twin(function: types.FunctionType, branches: _Branches, end: int | None = None) -> types.FunctionType | None:
    inner = wrapped(function)
    if inner is not None:  # by a decorator: the same around the twin of what it decorates
        twin = _twin(inner, branches, end)
        contents = {name: cell for name, cell in cells_of(function).items()}
        closure = [types.CellType(twin) if cell.cell_contents is inner else cell for cell in contents.values()]
        return function_like(function, function.__code__, tuple(closure)) if twin is not None else None
    tree = _source(function)
    if tree is None or (end is not None and not _cut(tree.body, end)):
        return None
    branches.under_way.append(function)
    rewriter = _Rewriter(function, branches)
    cells = {**cells_of(function), _CALLS: types.CellType(twin_calls)}
    code = _compiled(function, rewriter.rewrite(tree), list(rewriter.called))
    branches.under_way.pop()
    if code is None:
        return None
    cells |= {name: types.CellType(pair) for name, pair in rewriter.called.items()}
    return function_like(function, code, tuple(cells[name] for name in code.co_freevars))


def _source(function: types.FunctionType) -> ast.FunctionDef | None:
    """The definition of a function."""
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.name != function.__code__.co_name:
        return None
    ast.increment_lineno(tree, first - 1)
    return definition


def _cut(body: list[ast.stmt], line: int) -> bool:
    """Let the trace return before the statement of a line, with what the rest of the function reads. In place.

    Of a line in a loop, before the loop: that is right behind the decode loop. Returns whether there is such a line.
    """
    for at, statement in enumerate(body):
        assert statement.end_lineno is not None
        if statement.end_lineno < line:
            continue
        if statement.lineno > line:
            return False
        nested = () if isinstance(statement, ast.For | ast.While) else _BLOCKS
        blocks = [block for block in (getattr(statement, name, []) for name in nested) if isinstance(block, list)]
        if any(_cut(block, line) for block in blocks):
            return True
        both = sorted(_names(body[:at], ast.Store) & _names(body[at:], ast.Load))
        names: list[ast.expr] = [ast.Name(name, ast.Load()) for name in both]
        calls = ast.Name(_CALLS, ast.Load())
        end = ast.If(
            ast.Call(ast.Attribute(calls, "tracing", ast.Load()), [], []),
            [ast.Return(ast.Call(ast.Attribute(calls, "kept", ast.Load()), names, []))],
            [],
        )
        body.insert(at, ast.fix_missing_locations(ast.copy_location(end, statement)))
        return True
    return False


_BLOCKS = ("body", "orelse", "finalbody")


def _names(statements: Sequence[ast.stmt], context: type[ast.expr_context]) -> set[str]:
    nodes = (node for statement in statements for node in ast.walk(statement))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


def _compiled(function: types.FunctionType, definition: ast.FunctionDef, more: Sequence[str]) -> types.CodeType | None:
    """The code of a definition that has the free variables of ``function``, ``_CALLS`` and ``more``."""
    own = function.__code__
    names = [*own.co_freevars, _CALLS, *more]
    module = ast.parse(f"def __smc_outer__({', '.join(names)}): pass")
    outer = module.body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body = [definition]
    ast.fix_missing_locations(module)
    code = compile(module, own.co_filename, "exec", flags=own.co_flags & _FUTURES, dont_inherit=True)
    found = next(_codes_named(code, own.co_name), None)
    same = found is not None and found.co_varnames[: own.co_argcount] == own.co_varnames[: own.co_argcount]
    return found if same else None


_FUTURES = 0x1000000  # from __future__ import annotations


def _codes_named(code: types.CodeType, name: str) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_name == name:
                yield constant
            yield from _codes_named(constant, name)


class _Rewriter(ast.NodeTransformer):
    """Rewrites one definition and numbers its branches."""

    def __init__(self, function: types.FunctionType, branches: _Branches) -> None:
        self.function, self.code, self.found = function, function.__code__, branches
        self.names = {name: cell.cell_contents for name, cell in cells_of(function).items()}
        self.outermost = len(branches.under_way) == 1
        self.called: dict[str, tuple[types.FunctionType, types.FunctionType]] = {}  # name -> function, its twin

    def rewrite(self, definition: ast.FunctionDef) -> ast.FunctionDef:
        definition.decorator_list, definition.returns = [], None
        for argument in ast.walk(definition.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        definition.args.defaults = [ast.Constant(None) for _ in definition.args.defaults]
        definition.args.kw_defaults = [default and ast.Constant(None) for default in definition.args.kw_defaults]
        definition.body = [self.visit(statement) for statement in definition.body]
        return definition

    # ---- branches ------------------------------------------------------------------------------------------------

    def truth(self, test: ast.expr, wanted: bool = False) -> ast.expr:
        """A condition whose parts are each asked for by themselves, as Python does; the loop goes on if it is
        ``wanted``."""
        if isinstance(test, ast.BoolOp):
            values = [self.truth(value, wanted) for value in test.values]
            return ast.copy_location(ast.BoolOp(test.op, values), test)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return ast.copy_location(ast.UnaryOp(test.op, self.truth(test.operand, not wanted)), test)
        if isinstance(test, ast.Constant):
            return test
        return self.call("truth", test, self.visit(test), self.numbered(test, wanted))

    def numbered(self, test: ast.expr, wanted: bool) -> ast.expr:
        """The number of a new branch."""
        number = len(self.found.lines)
        self.found.lines[number] = self.line(test)
        self.found.plan[number] = wanted
        return ast.Constant(number)

    def line(self, node: ast.expr | ast.stmt) -> str:
        """``file.py:12: code``."""
        return f"{self.code.co_filename.rpartition('/')[2]}:{node.lineno}: {ast.unparse(node)}"

    def call(self, name: str, at: ast.AST, *args: ast.expr) -> ast.expr:
        called = ast.Attribute(ast.Name(_CALLS, ast.Load()), name, ast.Load())
        return ast.copy_location(ast.Call(called, list(args), []), at)  # type: ignore[type-var]

    def visit_If(self, node: ast.If) -> ast.AST:
        node.test = self.truth(node.test, _leaves(node.orelse) and not _leaves(node.body))
        node.body = [self.visit(statement) for statement in node.body]
        node.orelse = [self.visit(statement) for statement in node.orelse]
        return node

    def visit_While(self, node: ast.While) -> ast.AST:
        node.test = self.truth(node.test, True)
        node.body = [self.visit(statement) for statement in node.body]
        node.orelse = [self.visit(statement) for statement in node.orelse]
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        node.test = self.truth(node.test)
        node.body, node.orelse = self.visit(node.body), self.visit(node.orelse)
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return self.unless_tracing(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        """``a or b`` as a value: ``(lambda x: x if truth(x) else b)(a)``."""
        first, *rest = node.values
        other = rest[0] if len(rest) == 1 else ast.copy_location(ast.BoolOp(node.op, rest), node)
        name = f"__smc_value_{len(self.found.lines)}"
        value: ast.expr = ast.Name(name, ast.Load())
        test = self.call("truth", node, value, self.numbered(first, isinstance(node.op, ast.And)))
        after = self.visit(other)
        chosen = (value, after) if isinstance(node.op, ast.Or) else (after, value)
        arguments = ast.arguments(posonlyargs=[], args=[ast.arg(name)], kwonlyargs=[], kw_defaults=[], defaults=[])
        choice = ast.Lambda(arguments, ast.IfExp(test, *chosen))
        return ast.copy_location(ast.Call(choice, [self.visit(first)], []), node)

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        if node.value is not None and self.outermost:
            node.value = ast.IfExp(self.call("tracing", node), self.call("kept", node, node.value), node.value)
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        return self.truth(node) if isinstance(node.op, ast.Not) else self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) == 1 and isinstance(node.ops[0], ast.In | ast.NotIn):
            name = "contains" if isinstance(node.ops[0], ast.In) else "contains_not"
            return self.call(name, node, node.left, node.comparators[0])
        return node

    # ---- calls ---------------------------------------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> ast.AST:
        bare = isinstance(node.func, ast.Attribute) and not node.args and not node.keywords
        if bare and node.func.attr in _VALUES:  # type: ignore[attr-defined]
            return self.call(_VALUES[node.func.attr], node, self.visit(node.func.value))  # type: ignore[attr-defined]
        called = self.known(node.func)
        if called in (int, bool) and not node.keywords:
            return self.call(f"as_{called.__name__}", node, *(self.visit(argument) for argument in node.args))
        self.generic_visit(node)
        if isinstance(called, types.FunctionType) and (name := self.twin_name(called)) is not None:
            node.func = self.call("twin_or", node, node.func, ast.Name(name, ast.Load()))
        if called is torch.tensor:
            node.func = self.call("as_tensor", node, node.func)
        stand_in = _stand_in(called)
        if stand_in is not None:
            self.found.quiet.append(self.line(node))
            traced = ast.Attribute(ast.Name(_CALLS, ast.Load()), stand_in, ast.Load())
            node.func = ast.copy_location(ast.IfExp(self.call("tracing", node), traced, node.func), node)
        for keyword in node.keywords:
            if keyword.arg == "generator":  # draws are the compiler's own
                given = ast.Dict([ast.Constant("generator")], [keyword.value])
                keyword.arg, keyword.value = None, ast.IfExp(self.call("tracing", node), ast.Dict([], []), given)
        return node

    def twin_name(self, called: types.FunctionType) -> str | None:
        """The name of (function, its twin) for a function of the user's that holds loops or branches."""
        for name, (function, _) in self.called.items():
            if function is called:
                return name
        known = self.found.under_way
        if called in known or len(known) >= _DEPTH or not _is_own(innermost(called)):
            return None
        twin = _twin(called, self.found)
        if twin is None:
            return None
        name = f"__smc_called_{len(self.called)}"
        self.called[name] = (called, twin)
        return name

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        """``buffer[0, i] = token.item()`` writes a tensor while it is traced."""
        self.generic_visit(node)
        if any(isinstance(target, ast.Subscript) for target in node.targets):
            node.value = self.call("plain", node, node.value)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        """What is called for what it writes is not called while the loop is traced."""
        if isinstance(node.value, ast.Call) and self.writes(node.value.func):
            self.found.quiet.append(self.line(node))
            return self.unless_tracing(node)
        return self.generic_visit(node)

    def unless_tracing(self, node: ast.stmt) -> ast.stmt:
        test = ast.UnaryOp(ast.Not(), self.call("tracing", node))
        return ast.copy_location(ast.If(test, [node], []), node)

    def writes(self, called: ast.expr) -> bool:
        """Whether a call writes for a person: print, logging, warnings."""
        known = self.known(called)
        if known in (print, warnings.warn):
            return True
        owner = self.known(called.value) if isinstance(called, ast.Attribute) else None
        if isinstance(owner, logging.Logger) or owner in (logging, warnings):
            return True
        module = getattr(owner, "__module__", "") or ""
        return owner in (sys.stdout, sys.stderr) or module.split(".")[0] == "tqdm"

    def known(self, expression: ast.expr) -> Any:
        """What a name, or an attribute of a module, stands for; None for what the function computes."""
        if isinstance(expression, ast.Name):
            name = expression.id
            if name in self.code.co_varnames or name in self.code.co_cellvars:
                return None
            found = self.names.get(name, self.function.__globals__.get(name))
            return found if found is not None else getattr(builtins, name, None)
        if isinstance(expression, ast.Attribute):
            owner = self.known(expression.value)
            if isinstance(owner, types.ModuleType | types.FunctionType | type):
                return getattr(owner, expression.attr, None)
        return None


def _leaves(statements: list[ast.stmt]) -> bool:
    """Whether statements leave a loop."""
    return any(isinstance(statement, ast.Break | ast.Return | ast.Raise) for statement in statements)


def _is_own(function: types.FunctionType) -> bool:
    """Whether a function is the user's own, not one of a library."""
    library = os.sep + "site-packages" + os.sep in function.__code__.co_filename
    return not library and function.__module__.split(".")[0] not in ("torch", "smc_compile")


def _stand_in(called: Any) -> str | None:
    """The function of twin_calls that is traced in the place of one that Dynamo cannot trace."""
    if any(called is clock for clock in _CLOCKS):
        return "clock"
    module = getattr(called, "__module__", None) or ""
    if module.split(".")[0] != "tqdm":
        return None
    return (
        "TracedBar" if isinstance(called, type) else "range_bar" if called.__name__ in ("trange", "tnrange") else None
    )
