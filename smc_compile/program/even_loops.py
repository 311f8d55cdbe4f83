"""Whether the Python code of a loop does the same in every iteration: read off its source, without running it.

Three iterations are traced. They stand for all others if no Python value that changes from iteration to iteration
decides anything. Sizes of the text may decide: Dynamo traces them as symbols, so what they decide leaves guards. Loop
counters, growing lists and sizes of other tensors leave no trace; where one of them meets a condition, a slice, a
container or a call of unknown code, there is a *doubt*. A doubt refuses nothing: the loop is then traced whole (see
`rehearsal`). What is not known to be harmless is a doubt.

Models are taken as functions of what they are called with. That they keep no count of their own is seen in the trace.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import itertools
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smc_compile.program.function_source import source_of
from smc_compile.program.kinds import (
    ODD,
    SAME,
    STILL,
    TENSORS,
    Fact,
    Kind,
    Known,
    changing,
    handed_on,
    in_words,
    joined_kind,
    kind_of,
)
from smc_compile.program.syntax import is_last, is_sum, is_whole, names_stored, number, pairs_of

_BARS = ("tqdm", "rich")  # packages that show how far a loop is
_LIBRARIES = ("torch", "transformers")  # properties of their objects are read
_DEPTH = 5  # functions that call functions
_PASSES = 8  # over a loop, until the kinds of its variables settle
# Methods and functions that give no tensor: what they say of a shape leaves no trace.
_NO_TENSOR = frozenset(
    ["item", "tolist", "numpy", "apply_", "map_", "register_hook", "nelement", "numel", "storage_offset", "stride",
     "element_size", "data_ptr", "storage", "untyped_storage", "type", "equal", "allclose", "dense_dim", "dim_order",
     "broadcast_shapes", "result_type", "backward", "layout", "names", "nbytes", "itemsize", "get_device", "is_nonzero"]
)  # fmt: skip
_TENSOR_PARTS = frozenset(["T", "mT", "H", "mH", "data", "real", "logits", "probs", "values", "indices", "mean"])
_OF_DISTRIBUTIONS = frozenset(["sample", "rsample", "log_prob", "probs", "mean", "logits", "loss", "entropy"])
_PURE = ("min", "max", "int", "float", "bool", "abs", "round", "len", "isinstance", "hasattr", "getattr", "str", "pow")
_PURE_BUILTINS = frozenset(getattr(builtins, name) for name in _PURE)
_TORCH_ROOT = os.path.dirname(torch.__file__) + os.sep


@dataclass(frozen=True)
class Doubt:
    """A line of the loop that may do something else in another iteration, and why."""

    why: str
    line: str = ""

    def __str__(self) -> str:
        return f"{self.why}, at {self.line}" if self.line else self.why


class _Doubtful(Exception):
    """Brings a doubt out of the analysis."""

    def __init__(self, doubt: Doubt) -> None:
        super().__init__(doubt)
        self.doubt = doubt


def find_doubt(
    function: Callable[..., Any], arguments: Mapping[str, Any], prompt: str | None, counter: str, values: bool = False
) -> Doubt | None:
    """The first line of a loop that may do something else in an iteration that was not traced; None without one.

    Args:
        arguments: those of a call, by name.
        prompt: the name of the one that is the text.
        counter: the name of the one that counts the iterations; it was another number when three were traced.
        values: whether the trace takes Python values of tokens for tensors, and prints and bars for nothing (see
            `twin`): they decide nothing then but where a text ends.
    """
    kinds = {name: kind_of(value) for name, value in arguments.items()}
    kinds.update({name: Kind.TEXT for name in (prompt,) if name is not None}, **{counter: Kind.COUNT})
    try:
        _Reader(function, kinds, _DEPTH, looping=False, values=values).read()
    except _Doubtful as found:
        return found.doubt
    return None


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads one function, with the kinds of its arguments; functions that it calls are read too."""

    def __init__(
        self, function: Callable[..., Any], kinds: Mapping[str, Fact], depth: int, looping: bool, values: bool
    ) -> None:
        while hasattr(function, "__wrapped__") and _is_torch_file(function):  # as under @torch.no_grad()
            function = function.__wrapped__
        source = source_of(function) if isinstance(function, types.FunctionType) else None
        if source is None or depth == 0:
            name = getattr(function, "__qualname__", type(function).__name__)
            raise _Doubtful(Doubt(f"the source of {name} cannot be read" if depth else f"{name} calls too deep"))
        assert isinstance(function, types.FunctionType)
        self.tree, self.lines = source
        self.path, self.depth, self.function = function.__code__.co_filename, depth, function
        self.kinds: dict[str, Fact] = dict(kinds)
        self.returned: Fact | None = None
        self.values = values
        self.looping = looping  # whether this code runs in every iteration
        self.carried: frozenset[str] = frozenset()  # variables that the innermost loop hands on
        self.copies: set[str] = set()  # of such variables
        self.bent: set[str] = set()  # names of numbers that are more than sums
        self.after = False  # whether a loop lies behind: the text has the length that all iterations gave it
        self.lengths: set[str] = set()  # variables that hold a length which the text has had
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self.outer = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}

    def read(self) -> Fact:
        """What the function returns."""
        self.block(self.tree.body)
        return Kind.FIXED if self.returned is None else self.returned

    def doubt(self, node: ast.AST, why: str) -> _Doubtful:
        number = getattr(node, "lineno", self.tree.lineno)
        code = self.lines[number - 1].strip() if number <= len(self.lines) else ""
        return _Doubtful(Doubt(why, f"{os.path.basename(self.path)}:{number}: {code}"))

    # ---- statements

    def block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Expr(value=value):
                self.value(value)
            case ast.Assign(targets=targets, value=value):
                self.refuse_copies(node)
                if len(targets) == 1 and pairs_of(targets[0], value):
                    self.assign_pairs(pairs_of(targets[0], value))
                else:
                    found = self.value(value)
                    for target in targets:
                        self.assign(target, found, value)
                if not is_sum(value, self.bent):
                    self.bent.update(name for target in targets for name in names_stored(target))
                self.note_length(targets, value)
            case ast.AnnAssign(target=target, value=value):
                if value is not None:
                    self.assign(target, self.value(value), value)
            case ast.AugAssign(target=target, op=op, value=value):
                self.assign(target, self.combined(node, op, self.value(target), self.value(value)), node)
            case ast.If(test=test, body=body, orelse=other):
                self.test(test)
                self.branch(body, other)
            case ast.For(target=target, iter=counted, body=body, orelse=[]):
                self.range(counted)
                self.loop(body, {name: Kind.COUNT for name in names_stored(target)})
            case ast.While(test=test, body=body, orelse=[]):
                self.loop(body, {}, test)
            case ast.With(items=items, body=body):
                for item in items:
                    self.value(item.context_expr)
                    if item.optional_vars is not None or not isinstance(item.context_expr, ast.Call):
                        raise self.doubt(node, "a context is entered")
                self.block(body)
            case ast.Return(value=value):
                found = Kind.FIXED if value is None else self.value(value)
                self.returned = found if self.returned is None else joined_kind(self.returned, found)
            case ast.Assert(test=test):
                self.test(test)
            case ast.Raise() | ast.Pass() | ast.Break() | ast.Continue():
                pass
            case _:
                raise self.doubt(node, f"a statement ({type(node).__name__.lower()}) that is not followed")

    def branch(self, body: Sequence[ast.stmt], other: Sequence[ast.stmt]) -> None:
        before = dict(self.kinds)
        self.block(body)
        taken, self.kinds = self.kinds, before
        self.block(other)
        for name, kind in taken.items():
            self.kinds[name] = joined_kind(kind, self.kinds[name]) if name in self.kinds else kind

    def loop(self, body: Sequence[ast.stmt], targets: Mapping[str, Fact], test: ast.expr | None = None) -> None:
        """Read a loop until the kinds of what it hands on settle. What it assigns may change in every iteration."""
        stored = {name for statement in body for name in names_stored(statement)}
        before = self.carried, self.copies
        self.carried, self.copies, self.looping = frozenset(stored & set(self.kinds)), set(), True
        for name in self.carried:
            self.kinds[name] = changing(self.kinds[name])
        for _ in range(_PASSES):
            entry = dict(self.kinds)
            self.kinds.update(targets)
            if test is not None:
                self.test(test)
            self.block(body)
            self.kinds.update({name: handed_on(entry[name], self.kinds[name]) for name in self.carried})
            if {name: self.kinds[name] for name in entry} == entry:
                self.carried, self.copies = before  # what follows the loop depends on all its iterations too
                self.after = True
                return
        raise self.doubt(body[0], "what the loop hands on does not settle")

    def refuse_copies(self, node: ast.Assign) -> None:
        """A value handed from variable to variable shows many iterations later."""
        targets = {name for target in node.targets for name in names_stored(target)}
        values = node.value.elts if isinstance(node.value, ast.Tuple | ast.List) else [node.value]
        choices = [[value.body, value.orelse] if isinstance(value, ast.IfExp) else [value] for value in values]
        for value in itertools.chain(*choices):
            if isinstance(value, ast.Name) and value.id in self.carried | self.copies:
                if targets & self.carried:
                    raise self.doubt(node, f"{value.id} of one iteration is kept for a later one")
                self.copies |= targets

    def assign(self, target: ast.expr, found: Fact, source: ast.AST) -> None:
        match target:
            case ast.Name(id=name):
                self.kinds[name] = found
                self.lengths.discard(name)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    self.assign(part, self.part(source, found), part)
            case ast.Subscript(value=container, slice=index):
                kind = self.value(container)
                if kind not in TENSORS:
                    raise self.doubt(target, "a container is written to")
                self.index(target, kind, index)
            case _:
                raise self.doubt(target, "an attribute is written to")

    def note_length(self, targets: Sequence[ast.expr], value: ast.expr) -> None:
        """Remember a variable that is assigned before the loop and holds a length of the text."""
        names = {name for target in targets for name in names_stored(target)}
        match value:
            case ast.Subscript(value=ast.Attribute(value=ast.Name(id=text), attr="shape"), slice=axis):
                pass
            case ast.Call(func=ast.Attribute(value=ast.Name(id=text), attr="size"), args=[axis]):
                pass
            case _:
                return
        if not self.looping and number(axis) in (1, -1) and self.kinds.get(text) is Kind.TEXT:
            self.lengths |= names

    def assign_pairs(self, pairs: Sequence[tuple[ast.expr, ast.expr]]) -> None:
        """``a, b = x, y``: all values are taken before any is assigned."""
        for (target, source), found in [(pair, self.value(pair[1])) for pair in pairs]:
            self.assign(target, found, source)
            self.note_length([target], source)

    def part(self, node: ast.AST, whole: Fact) -> Fact:
        """One of several results."""
        if whole in (Kind.TEXT, Kind.LIST, Kind.CACHE) or isinstance(whole, Known):
            raise self.doubt(node, "a value is unpacked")
        return whole

    def test(self, node: ast.expr) -> None:
        """A condition: what decides it must be the same in every iteration, or leave a guard."""
        found = self.value(node)
        if found in (Kind.COUNT, Kind.LIST, Kind.UNKNOWN, Kind.CACHE):
            raise self.doubt(node, "a condition depends on the iteration")
        if self.after and found in (Kind.SIZE, Kind.CHOICE):
            raise self.doubt(node, "a condition depends on the length of the whole text")

    def range(self, node: ast.expr) -> None:
        """What a loop runs over must be a range; its bounds must be the same whenever it is reached."""
        node = self.without_bar(node) if self.values else node
        is_range = isinstance(node, ast.Call) and self.value(node.func) == Known(range) and not node.keywords
        bounds = [self.value(arg) for arg in node.args] if is_range and isinstance(node, ast.Call) else [Kind.UNKNOWN]
        same = (Kind.FIXED, Kind.SIZE, *(() if self.looping else (Kind.COUNT,)))
        if not bounds or any(bound not in same for bound in bounds):
            raise self.doubt(node, "a loop that runs over something else than a plain range")
        counted = [arg for arg, bound in zip(node.args, bounds, strict=True) if bound is Kind.COUNT]  # type: ignore[attr-defined]
        if not all(is_sum(arg, self.bent) for arg in counted):
            raise self.doubt(node, "a loop whose number of iterations is computed by more than sums")

    def without_bar(self, node: ast.expr) -> ast.expr:
        """``range(n)`` of ``tqdm(range(n))``."""
        if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Name | ast.Attribute):
            bar = self.value(node.func)
            module = getattr(bar.value, "__module__", "") if isinstance(bar, Known) else ""
            if str(module).partition(".")[0] in _BARS:
                return node.args[0]
        return node

    # ---- expressions

    def value(self, node: ast.expr) -> Fact:
        match node:
            case ast.Constant(value=value):
                return Kind.NONE if value is None else Kind.FIXED
            case ast.Name(id=name):
                return self.name(node, name)
            case ast.Attribute(value=value, attr=name):
                return self.attribute(node, self.value(value), name)
            case ast.Subscript(value=value, slice=index):
                return self.subscript(node, self.value(value), index)
            case ast.Call():
                return self.call(node)
            case ast.BinOp(left=left, op=op, right=right):
                return self.combined(node, op, self.value(left), self.value(right))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                self.test(operand)
                return Kind.FIXED if self.value(operand) in SAME else Kind.CHOICE
            case ast.UnaryOp(operand=operand):
                return self.value(operand)
            case ast.BoolOp(values=values):
                for value in values:
                    self.test(value)
                found = [self.value(value) for value in values]
                return Kind.CHOICE if {Kind.SIZE, Kind.CHOICE} & set(found) else functools.reduce(joined_kind, found)
            case ast.Compare():
                return self.compared(node)
            case ast.IfExp(test=test, body=body, orelse=other):
                self.test(test)
                return joined_kind(self.value(body), self.value(other))
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return self.sequence(node, [self.value(p.value if isinstance(p, ast.Starred) else p) for p in parts])
            case _:
                raise self.doubt(node, f"an expression ({type(node).__name__.lower()}) that is not followed")

    def name(self, node: ast.expr, name: str) -> Fact:
        if name in self.kinds:
            return self.kinds[name]
        for scope in (self.outer, self.function.__globals__, vars(builtins)):
            if name in scope:
                return kind_of(scope[name])
        raise self.doubt(node, f"{name} is not known before the loop")

    def sequence(self, node: ast.expr, parts: Sequence[Fact]) -> Fact:
        if all(part in SAME for part in parts):
            return Kind.FIXED if isinstance(node, ast.Tuple) or parts else Kind.LIST
        parts = [part for part in parts if part not in SAME]
        if any(part is Kind.COUNT for part in parts) and not any(part in TENSORS for part in parts):
            return Kind.COUNT
        if any(part in (*ODD, Kind.COUNT) or isinstance(part, Known) for part in parts):
            raise self.doubt(node, "a container is built")
        if all(part is Kind.SIZE for part in parts):
            return Kind.SIZE
        if isinstance(node, ast.List) or any(part is Kind.LIST for part in parts):
            return Kind.LIST
        tensors: list[Fact] = [part for part in parts if part in TENSORS]
        return functools.reduce(joined_kind, tensors)

    def attribute(self, node: ast.expr, owner: Fact, name: str) -> Fact:
        if owner in TENSORS:
            if name == "shape":
                return {Kind.TEXT: Kind.SIZE, Kind.ROW: Kind.FIXED}.get(owner, Kind.COUNT)  # type: ignore[arg-type]
            if name in ("device", "dtype", "ndim"):
                return Kind.FIXED
            if owner is not Kind.OUTPUT and name not in _TENSOR_PARTS:
                raise self.doubt(node, f"{name} of a tensor is read")
            return Kind.TENSOR if owner is Kind.TEXT else owner
        if not isinstance(owner, Known):
            raise self.doubt(node, f"an attribute of {in_words(owner)} is read")
        static = inspect.getattr_static(type(owner.value), name, None)
        if isinstance(static, property | functools.cached_property) and not _is_of_library(owner.value):
            raise self.doubt(node, f"the property {name} is read")
        try:
            return kind_of(getattr(owner.value, name))
        except AttributeError:
            raise self.doubt(node, f"{name} is not known before the loop") from None

    def subscript(self, node: ast.Subscript, owner: Fact, index: ast.expr) -> Fact:
        if owner in TENSORS:
            return self.index(node, owner, index)
        if owner is Kind.LIST and isinstance(index, ast.Constant | ast.UnaryOp) and number(index) in (0, -1):
            return Kind.TENSOR
        if owner is Kind.SIZE:  # of the text [B, S], or of [S]
            return Kind.FIXED if number(index) == 0 else Kind.SIZE
        if owner in (Kind.FIXED, Kind.COUNT) and not isinstance(index, ast.Slice) and self.value(index) in SAME:
            return owner
        raise self.doubt(node, f"an entry of {in_words(owner)} is read")

    def index(self, node: ast.AST, owner: Fact, index: ast.expr) -> Fact:
        """What a tensor holds at an index. A slice beyond the end is cut in silence: its bounds are looked at."""
        places = index.elts if isinstance(index, ast.Tuple) else [index]
        picks, moving = False, False
        for place in places:
            if isinstance(place, ast.Slice):
                picks |= is_last(place)
                moving |= self.slice(place, owner)
            else:
                kind = self.value(place)
                if kind in (Kind.LIST, *ODD) or isinstance(kind, Known):
                    raise self.doubt(node, f"a tensor is read at {in_words(kind)}")
                picks |= kind in (Kind.FIXED, Kind.COUNT, Kind.SIZE) and not is_whole(place)
                moving |= kind in (Kind.TENSOR, Kind.TEXT, Kind.OUTPUT)
        if owner is Kind.OUTPUT:
            return Kind.ROW if picks and len(places) > 1 else Kind.OUTPUT
        if owner is Kind.TEXT:
            return Kind.TENSOR if picks or moving else Kind.TEXT
        return owner if owner is Kind.ROW and not moving else Kind.TENSOR

    def slice(self, place: ast.Slice, owner: Fact) -> bool:
        """Whether the length of a slice may change from iteration to iteration."""
        bounds = [Kind.NONE if bound is None else self.value(bound) for bound in (place.lower, place.upper, place.step)]
        fixed = all(bound in SAME for bound in bounds)
        symbolic = owner is Kind.ROW and all(bound in SAME or bound is Kind.SIZE for bound in bounds)
        if owner is Kind.TEXT and self.after and place.upper is None and place.step is None:
            if isinstance(place.lower, ast.Name) and place.lower.id in self.lengths:
                return True  # all but the prompt
        elif symbolic or (owner is Kind.TEXT and fixed and not (self.after and bounds[:2] != [Kind.NONE, Kind.NONE])):
            # Where it meets a size of the text, which is a symbol, a cut leaves a guard.
            return not fixed or (owner is Kind.TEXT and place.upper is not None)
        if not self.looping:
            return True
        lower, upper = number(place.lower), number(place.upper)
        if bounds[2] is not Kind.NONE or (bounds[0] is not Kind.NONE and lower not in (0, 1, -1)):
            raise self.doubt(place, "a slice begins at a place that may be beyond the end")
        if bounds[1] is not Kind.NONE and bounds[1] is not Kind.COUNT and upper not in (0, 1, -1):
            raise self.doubt(place, "a slice ends at a place that may be beyond the end")
        return bounds[1] is Kind.COUNT or owner is Kind.TENSOR

    def combined(self, node: ast.AST, op: ast.operator, left: Fact, right: Fact) -> Fact:
        kinds = {left, right}
        if kinds & TENSORS:
            if kinds & {Kind.LIST, *ODD} or any(isinstance(kind, Known) for kind in kinds):
                raise self.doubt(node, "a tensor meets an object")
            return Kind.ROW if (kinds & TENSORS) == {Kind.ROW} else Kind.TENSOR
        if kinds <= SAME:
            return Kind.FIXED
        if kinds == {Kind.LIST} and isinstance(op, ast.Add):
            return Kind.LIST
        if kinds <= {Kind.FIXED, Kind.SIZE, Kind.COUNT}:
            changing = [kind for kind in (left, right) if kind is not Kind.FIXED]
            if isinstance(op, ast.Add | ast.Sub) or (isinstance(op, ast.Mult | ast.Div) and len(changing) == 1):
                # The difference of two sizes of the text counts iterations.
                return Kind.COUNT if Kind.COUNT in kinds or len(changing) > 1 or isinstance(op, ast.Div) else Kind.SIZE
        raise self.doubt(node, f"{in_words(left)} and {in_words(right)} are combined")

    def compared(self, node: ast.Compare) -> Fact:
        nothing = [isinstance(side, ast.Constant) and side.value is None for side in (node.left, *node.comparators)]
        kinds = [self.value(side) for side in (node.left, *node.comparators)]
        if all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops) and any(nothing):
            return Kind.FIXED  # what is None in the second iteration is None in all that follow
        if any(kind in (Kind.LIST, Kind.UNKNOWN, Kind.CACHE) for kind in kinds):
            raise self.doubt(node, "an object is compared")
        if any(kind in TENSORS for kind in kinds):
            return Kind.ROW if {kind for kind in kinds if kind in TENSORS} == {Kind.ROW} else Kind.TENSOR
        among = any(isinstance(op, ast.In | ast.NotIn) for op in node.ops) and Kind.SIZE in kinds
        if any(kind is Kind.COUNT for kind in kinds) or among or kinds.count(Kind.SIZE) > 1:
            raise self.doubt(node, "a number that changes with the iteration is compared")
        return Kind.FIXED if all(kind in SAME or isinstance(kind, Known) for kind in kinds) else Kind.CHOICE

    # ---- calls

    def call(self, node: ast.Call) -> Fact:
        if self.values and isinstance(node.func, ast.Name) and self.name(node, node.func.id) == Known(print):
            return Kind.NONE
        given = [self.value(arg.value if isinstance(arg, ast.Starred) else arg) for arg in node.args]
        named = {keyword.arg: self.value(keyword.value) for keyword in node.keywords}
        if None in named:
            raise self.doubt(node, "a call with **")
        if isinstance(node.func, ast.Attribute):
            owner = self.value(node.func.value)
            if not isinstance(owner, Known):
                return self.method(node, owner, node.func.attr, [*given, *named.values()])
        function = self.value(node.func)
        if not isinstance(function, Known):
            raise self.doubt(node, f"{in_words(function)} is called")
        return self.called(node, function.value, given, named)  # type: ignore[arg-type]

    def called(self, node: ast.Call, function: Any, given: Sequence[Fact], named: Mapping[str, Fact]) -> Fact:
        kinds = [*given, *named.values()]
        if isinstance(function, nn.Module):
            return self.model(node, kinds)
        if function in _PURE_BUILTINS if isinstance(function, types.BuiltinFunctionType | type) else False:
            return self.pure(node, function, kinds)
        if is_torch(function):
            return self.torch(node, function, kinds)
        if isinstance(function, type) and hasattr(function, "get_seq_length"):
            return Kind.CACHE
        if isinstance(function, types.MethodType):
            given, function = [kind_of(function.__self__), *given], function.__func__
        if not isinstance(function, types.FunctionType) or any(isinstance(arg, ast.Starred) for arg in node.args):
            name = getattr(function, "__qualname__", type(function).__qualname__)
            raise self.doubt(node, f"{name} is called, which may keep count")
        return self.user_function(node, function, given, named)

    def user_function(
        self, node: ast.Call, function: types.FunctionType, given: Sequence[Fact], named: Mapping[str, Fact]
    ) -> Fact:
        try:
            bound = inspect.signature(function, follow_wrapped=not _is_torch_file(function)).bind(*given, **named)
        except (TypeError, ValueError):
            raise self.doubt(node, f"{function.__qualname__} is called in a way that is not followed") from None
        bound_kinds: dict[str, Fact] = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                raise self.doubt(node, f"{function.__qualname__} takes any arguments")
            if name not in bound_kinds:
                bound_kinds[name] = kind_of(parameter.default)
        reader = _Reader(function, bound_kinds, self.depth - 1, self.looping, self.values)
        reader.after = self.after
        return reader.read()

    def model(self, node: ast.Call, kinds: Sequence[Fact]) -> Fact:
        unclear = any(kind in (Kind.COUNT, Kind.UNKNOWN, Kind.CHOICE) or isinstance(kind, Known) for kind in kinds)
        if unclear or any(isinstance(arg, ast.Starred) for arg in node.args):
            raise self.doubt(node, "a model is called with a number or an object that changes with the iteration")
        return Kind.ROW if kinds and all(kind in STILL for kind in kinds) else Kind.OUTPUT

    def pure(self, node: ast.Call, function: Any, kinds: Sequence[Fact]) -> Fact:
        if self.values and function in (int, bool) and len(kinds) == 1 and kinds[0] in (Kind.ROW, Kind.TENSOR):
            return Kind.TENSOR
        if function is len and len(kinds) == 1:
            if kinds[0] in (Kind.TEXT, Kind.ROW):
                return Kind.FIXED
            if kinds[0] in (Kind.LIST, Kind.TENSOR):
                return Kind.COUNT
        if all(kind in SAME or isinstance(kind, Known) for kind in kinds):
            return Kind.FIXED
        raise self.doubt(node, f"{function.__name__}() of a value that changes with the iteration")

    def torch(self, node: ast.Call, function: Any, kinds: Sequence[Fact]) -> Fact:
        name = getattr(function, "__name__", "")
        odd = name.startswith(("sym_", "is_")) or name in _NO_TENSOR or any(kind in ODD for kind in kinds)
        if odd or any(isinstance(kind, Known) and callable(kind.value) for kind in kinds):
            raise self.doubt(node, f"torch's {name} is called with an object, or gives a Python number")
        if name in ("cat", "concat", "concatenate", "hstack") and self.joins_text(node):
            return Kind.TEXT
        return Kind.ROW if all(kind in STILL or isinstance(kind, Known) for kind in kinds) else Kind.TENSOR

    def joins_text(self, node: ast.Call) -> bool:
        """Whether a concatenation along the last axis, or axis 1, begins with the text."""
        parts = node.args[0] if node.args else None
        axes = [*node.args[1:], *(keyword.value for keyword in node.keywords)]
        starts = isinstance(parts, ast.List | ast.Tuple) and parts.elts and not isinstance(parts.elts[0], ast.Starred)
        if not starts or any(number(axis) not in (1, -1) for axis in axes):
            return False
        assert isinstance(parts, ast.List | ast.Tuple)
        return self.value(parts.elts[0]) is Kind.TEXT

    def method(self, node: ast.Call, owner: Fact, name: str, kinds: Sequence[Fact]) -> Fact:
        if self.values and name in ("item", "tolist") and owner in (Kind.ROW, Kind.TENSOR) and not kinds:
            return Kind.TENSOR
        if owner is Kind.LIST and name == "append" and kinds[0] in TENSORS:
            return Kind.FIXED
        if owner is Kind.CACHE and name == "get_seq_length":
            return Kind.COUNT
        if owner is Kind.OUTPUT and name == "get_seq_length":
            return Kind.COUNT
        known = hasattr(Tensor, name) or name in _OF_DISTRIBUTIONS
        odd = name.startswith(("is_", "__")) or name in _NO_TENSOR
        odd = odd or any(kind in ODD or isinstance(kind, Known) for kind in kinds)
        if owner not in TENSORS or not known or odd:
            raise self.doubt(node, f"{name}() of {in_words(owner)} is called")
        if name == "size":
            whole = {Kind.TEXT: Kind.SIZE, Kind.ROW: Kind.FIXED}.get(owner, Kind.COUNT)  # type: ignore[arg-type]
            first = bool(node.args) and number(node.args[0]) == 0
            return Kind.FIXED if whole is Kind.SIZE and first else whole
        if name in ("dim", "ndimension"):
            return Kind.FIXED
        if owner is Kind.TEXT and name in ("clone", "contiguous", "detach", "to", "long"):
            return Kind.TEXT
        return Kind.ROW if owner is Kind.ROW and all(kind in STILL for kind in kinds) else Kind.TENSOR


# ---- whose code it is ------------------------------------------------------------------------------------------------


def is_torch(function: Any) -> bool:
    """Whether a function or class is torch's own."""
    if str(getattr(function, "__module__", "") or "").partition(".")[0] == "torch":
        return True
    name = getattr(function, "__name__", "")
    spaces = (torch, torch.nn.functional, torch._C._nn)
    return isinstance(function, types.BuiltinFunctionType) and any(getattr(s, name, None) is function for s in spaces)


def _is_of_library(value: Any) -> bool:
    return any(cls.__module__.partition(".")[0] in _LIBRARIES for cls in type(value).__mro__)


def _is_torch_file(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(_TORCH_ROOT)
