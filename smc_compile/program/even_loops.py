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
import enum
import functools
import inspect
import itertools
import linecache
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn


class Kind(enum.Enum):
    """What is known of a value while the loop runs."""

    FIXED = "a Python value that is the same in every iteration"
    NONE = "None"
    SIZE = "a size of the text"
    CHOICE = "a truth value that depends on a size of the text"
    COUNT = "a number that changes from iteration to iteration"
    TEXT = "the prompt, or the text that grows from it"
    ROW = "a tensor whose shape is the same in every iteration"
    TENSOR = "another tensor"
    OUTPUT = "what a model returns"
    CACHE = "a cache of transformers"
    LIST = "a list that the function builds"
    UNKNOWN = "an object that code unknown here may change"


@dataclass(frozen=True)
class Known:
    """A module, function, class or plain object, the same in every iteration."""

    value: Any


Fact: TypeAlias = Kind | Known
_TENSORS = frozenset([Kind.TEXT, Kind.ROW, Kind.TENSOR, Kind.OUTPUT])
_SAME = frozenset([Kind.FIXED, Kind.NONE])
_ODD = frozenset([Kind.UNKNOWN, Kind.CACHE, Kind.CHOICE])  # no tensor code is known to take these
_STILL = frozenset([Kind.FIXED, Kind.NONE, Kind.ROW])
_PLAIN = (int, float, complex, bool, str, bytes, type(...), torch.dtype, torch.device, torch.Size)
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


def kind_of(value: Any) -> Fact:
    """The kind of a value that exists before the loop."""
    if value is None:
        return Kind.NONE
    if isinstance(value, Tensor):
        return Kind.ROW
    if isinstance(value, _PLAIN):
        return Kind.FIXED
    if hasattr(value, "get_seq_length"):
        return Known(value) if isinstance(value, type) else Kind.CACHE
    if isinstance(value, list | tuple | dict | set) or inspect.isgenerator(value):
        return Kind.UNKNOWN
    return Known(value)


# ---- source ----------------------------------------------------------------------------------------------------------


def source_of(function: types.FunctionType) -> tuple[ast.FunctionDef, list[str]] | None:
    """The syntax tree of a function and the lines of its file; None where the file does not hold its code any more."""
    code = function.__code__
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, function.__globals__)
    parsed = _parsed("".join(lines), code.co_filename) if lines else None
    if parsed is None:
        return None
    tree, whole = parsed
    if not any(_same_code(code, other) for other in _nested(whole)):
        return None
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name and _first_line(node) == code.co_firstlineno
    ]
    return (found[0], lines) if len(found) == 1 else None


@functools.lru_cache(maxsize=32)
def _parsed(source: str, path: str) -> tuple[ast.Module, types.CodeType] | None:
    try:
        tree = ast.parse(source)
        return tree, compile(tree, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _same_code(code: types.CodeType, other: types.CodeType) -> bool:
    def identity(c: types.CodeType) -> tuple[Any, ...]:
        constants = tuple(repr(k) for k in c.co_consts if not isinstance(k, types.CodeType))
        return c.co_name, c.co_firstlineno, c.co_code, c.co_names, c.co_varnames, c.co_freevars, constants

    return identity(code) == identity(other)


def _first_line(node: ast.FunctionDef) -> int:
    return node.decorator_list[0].lineno if node.decorator_list else node.lineno


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
                if len(targets) == 1 and _pairs(targets[0], value):
                    self.assign_pairs(_pairs(targets[0], value))
                else:
                    found = self.value(value)
                    for target in targets:
                        self.assign(target, found, value)
                if not _is_sum(value, self.bent):
                    self.bent.update(name for target in targets for name in _names_stored(target))
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
                self.loop(body, {name: Kind.COUNT for name in _names_stored(target)})
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
                self.returned = found if self.returned is None else _joined(self.returned, found)
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
            self.kinds[name] = _joined(kind, self.kinds[name]) if name in self.kinds else kind

    def loop(self, body: Sequence[ast.stmt], targets: Mapping[str, Fact], test: ast.expr | None = None) -> None:
        """Read a loop until the kinds of what it hands on settle. What it assigns may change in every iteration."""
        stored = {name for statement in body for name in _names_stored(statement)}
        before = self.carried, self.copies
        self.carried, self.copies, self.looping = frozenset(stored & set(self.kinds)), set(), True
        for name in self.carried:
            self.kinds[name] = _changing(self.kinds[name])
        for _ in range(_PASSES):
            entry = dict(self.kinds)
            self.kinds.update(targets)
            if test is not None:
                self.test(test)
            self.block(body)
            self.kinds.update({name: _handed_on(entry[name], self.kinds[name]) for name in self.carried})
            if {name: self.kinds[name] for name in entry} == entry:
                self.carried, self.copies = before  # what follows the loop depends on all its iterations too
                self.after = True
                return
        raise self.doubt(body[0], "what the loop hands on does not settle")

    def refuse_copies(self, node: ast.Assign) -> None:
        """A value handed from variable to variable shows many iterations later."""
        targets = {name for target in node.targets for name in _names_stored(target)}
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
                if kind not in _TENSORS:
                    raise self.doubt(target, "a container is written to")
                self.index(target, kind, index)
            case _:
                raise self.doubt(target, "an attribute is written to")

    def note_length(self, targets: Sequence[ast.expr], value: ast.expr) -> None:
        """Remember a variable that is assigned before the loop and holds a length of the text."""
        names = {name for target in targets for name in _names_stored(target)}
        match value:
            case ast.Subscript(value=ast.Attribute(value=ast.Name(id=text), attr="shape"), slice=axis):
                pass
            case ast.Call(func=ast.Attribute(value=ast.Name(id=text), attr="size"), args=[axis]):
                pass
            case _:
                return
        if not self.looping and _number(axis) in (1, -1) and self.kinds.get(text) is Kind.TEXT:
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
        if not all(_is_sum(arg, self.bent) for arg in counted):
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
                return Kind.FIXED if self.value(operand) in _SAME else Kind.CHOICE
            case ast.UnaryOp(operand=operand):
                return self.value(operand)
            case ast.BoolOp(values=values):
                for value in values:
                    self.test(value)
                found = [self.value(value) for value in values]
                return Kind.CHOICE if {Kind.SIZE, Kind.CHOICE} & set(found) else functools.reduce(_joined, found)
            case ast.Compare():
                return self.compared(node)
            case ast.IfExp(test=test, body=body, orelse=other):
                self.test(test)
                return _joined(self.value(body), self.value(other))
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
        if all(part in _SAME for part in parts):
            return Kind.FIXED if isinstance(node, ast.Tuple) or parts else Kind.LIST
        parts = [part for part in parts if part not in _SAME]
        if any(part is Kind.COUNT for part in parts) and not any(part in _TENSORS for part in parts):
            return Kind.COUNT
        if any(part in (*_ODD, Kind.COUNT) or isinstance(part, Known) for part in parts):
            raise self.doubt(node, "a container is built")
        if all(part is Kind.SIZE for part in parts):
            return Kind.SIZE
        if isinstance(node, ast.List) or any(part is Kind.LIST for part in parts):
            return Kind.LIST
        tensors: list[Fact] = [part for part in parts if part in _TENSORS]
        return functools.reduce(_joined, tensors)

    def attribute(self, node: ast.expr, owner: Fact, name: str) -> Fact:
        if owner in _TENSORS:
            if name == "shape":
                return {Kind.TEXT: Kind.SIZE, Kind.ROW: Kind.FIXED}.get(owner, Kind.COUNT)  # type: ignore[arg-type]
            if name in ("device", "dtype", "ndim"):
                return Kind.FIXED
            if owner is not Kind.OUTPUT and name not in _TENSOR_PARTS:
                raise self.doubt(node, f"{name} of a tensor is read")
            return Kind.TENSOR if owner is Kind.TEXT else owner
        if not isinstance(owner, Known):
            raise self.doubt(node, f"an attribute of {_in_words(owner)} is read")
        static = inspect.getattr_static(type(owner.value), name, None)
        if isinstance(static, property | functools.cached_property) and not _is_of_library(owner.value):
            raise self.doubt(node, f"the property {name} is read")
        try:
            return kind_of(getattr(owner.value, name))
        except AttributeError:
            raise self.doubt(node, f"{name} is not known before the loop") from None

    def subscript(self, node: ast.Subscript, owner: Fact, index: ast.expr) -> Fact:
        if owner in _TENSORS:
            return self.index(node, owner, index)
        if owner is Kind.LIST and isinstance(index, ast.Constant | ast.UnaryOp) and _number(index) in (0, -1):
            return Kind.TENSOR
        if owner is Kind.SIZE:  # of the text [B, S], or of [S]
            return Kind.FIXED if _number(index) == 0 else Kind.SIZE
        if owner in (Kind.FIXED, Kind.COUNT) and not isinstance(index, ast.Slice) and self.value(index) in _SAME:
            return owner
        raise self.doubt(node, f"an entry of {_in_words(owner)} is read")

    def index(self, node: ast.AST, owner: Fact, index: ast.expr) -> Fact:
        """What a tensor holds at an index. A slice beyond the end is cut in silence: its bounds are looked at."""
        places = index.elts if isinstance(index, ast.Tuple) else [index]
        picks, moving = False, False
        for place in places:
            if isinstance(place, ast.Slice):
                picks |= _is_last(place)
                moving |= self.slice(place, owner)
            else:
                kind = self.value(place)
                if kind in (Kind.LIST, *_ODD) or isinstance(kind, Known):
                    raise self.doubt(node, f"a tensor is read at {_in_words(kind)}")
                picks |= kind in (Kind.FIXED, Kind.COUNT, Kind.SIZE) and not _is_whole(place)
                moving |= kind in (Kind.TENSOR, Kind.TEXT, Kind.OUTPUT)
        if owner is Kind.OUTPUT:
            return Kind.ROW if picks and len(places) > 1 else Kind.OUTPUT
        if owner is Kind.TEXT:
            return Kind.TENSOR if picks or moving else Kind.TEXT
        return owner if owner is Kind.ROW and not moving else Kind.TENSOR

    def slice(self, place: ast.Slice, owner: Fact) -> bool:
        """Whether the length of a slice may change from iteration to iteration."""
        bounds = [Kind.NONE if bound is None else self.value(bound) for bound in (place.lower, place.upper, place.step)]
        fixed = all(bound in _SAME for bound in bounds)
        symbolic = owner is Kind.ROW and all(bound in _SAME or bound is Kind.SIZE for bound in bounds)
        if owner is Kind.TEXT and self.after and place.upper is None and place.step is None:
            if isinstance(place.lower, ast.Name) and place.lower.id in self.lengths:
                return True  # all but the prompt
        elif symbolic or (owner is Kind.TEXT and fixed and not (self.after and bounds[:2] != [Kind.NONE, Kind.NONE])):
            # Where it meets a size of the text, which is a symbol, a cut leaves a guard.
            return not fixed or (owner is Kind.TEXT and place.upper is not None)
        if not self.looping:
            return True
        lower, upper = _number(place.lower), _number(place.upper)
        if bounds[2] is not Kind.NONE or (bounds[0] is not Kind.NONE and lower not in (0, 1, -1)):
            raise self.doubt(place, "a slice begins at a place that may be beyond the end")
        if bounds[1] is not Kind.NONE and bounds[1] is not Kind.COUNT and upper not in (0, 1, -1):
            raise self.doubt(place, "a slice ends at a place that may be beyond the end")
        return bounds[1] is Kind.COUNT or owner is Kind.TENSOR

    def combined(self, node: ast.AST, op: ast.operator, left: Fact, right: Fact) -> Fact:
        kinds = {left, right}
        if kinds & _TENSORS:
            if kinds & {Kind.LIST, *_ODD} or any(isinstance(kind, Known) for kind in kinds):
                raise self.doubt(node, "a tensor meets an object")
            return Kind.ROW if (kinds & _TENSORS) == {Kind.ROW} else Kind.TENSOR
        if kinds <= _SAME:
            return Kind.FIXED
        if kinds == {Kind.LIST} and isinstance(op, ast.Add):
            return Kind.LIST
        if kinds <= {Kind.FIXED, Kind.SIZE, Kind.COUNT}:
            changing = [kind for kind in (left, right) if kind is not Kind.FIXED]
            if isinstance(op, ast.Add | ast.Sub) or (isinstance(op, ast.Mult | ast.Div) and len(changing) == 1):
                # The difference of two sizes of the text counts iterations.
                return Kind.COUNT if Kind.COUNT in kinds or len(changing) > 1 or isinstance(op, ast.Div) else Kind.SIZE
        raise self.doubt(node, f"{_in_words(left)} and {_in_words(right)} are combined")

    def compared(self, node: ast.Compare) -> Fact:
        nothing = [isinstance(side, ast.Constant) and side.value is None for side in (node.left, *node.comparators)]
        kinds = [self.value(side) for side in (node.left, *node.comparators)]
        if all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops) and any(nothing):
            return Kind.FIXED  # what is None in the second iteration is None in all that follow
        if any(kind in (Kind.LIST, Kind.UNKNOWN, Kind.CACHE) for kind in kinds):
            raise self.doubt(node, "an object is compared")
        if any(kind in _TENSORS for kind in kinds):
            return Kind.ROW if {kind for kind in kinds if kind in _TENSORS} == {Kind.ROW} else Kind.TENSOR
        among = any(isinstance(op, ast.In | ast.NotIn) for op in node.ops) and Kind.SIZE in kinds
        if any(kind is Kind.COUNT for kind in kinds) or among or kinds.count(Kind.SIZE) > 1:
            raise self.doubt(node, "a number that changes with the iteration is compared")
        return Kind.FIXED if all(kind in _SAME or isinstance(kind, Known) for kind in kinds) else Kind.CHOICE

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
            raise self.doubt(node, f"{_in_words(function)} is called")
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
        return Kind.ROW if kinds and all(kind in _STILL for kind in kinds) else Kind.OUTPUT

    def pure(self, node: ast.Call, function: Any, kinds: Sequence[Fact]) -> Fact:
        if self.values and function in (int, bool) and len(kinds) == 1 and kinds[0] in (Kind.ROW, Kind.TENSOR):
            return Kind.TENSOR
        if function is len and len(kinds) == 1:
            if kinds[0] in (Kind.TEXT, Kind.ROW):
                return Kind.FIXED
            if kinds[0] in (Kind.LIST, Kind.TENSOR):
                return Kind.COUNT
        if all(kind in _SAME or isinstance(kind, Known) for kind in kinds):
            return Kind.FIXED
        raise self.doubt(node, f"{function.__name__}() of a value that changes with the iteration")

    def torch(self, node: ast.Call, function: Any, kinds: Sequence[Fact]) -> Fact:
        name = getattr(function, "__name__", "")
        odd = name.startswith(("sym_", "is_")) or name in _NO_TENSOR or any(kind in _ODD for kind in kinds)
        if odd or any(isinstance(kind, Known) and callable(kind.value) for kind in kinds):
            raise self.doubt(node, f"torch's {name} is called with an object, or gives a Python number")
        if name in ("cat", "concat", "concatenate", "hstack") and self.joins_text(node):
            return Kind.TEXT
        return Kind.ROW if all(kind in _STILL or isinstance(kind, Known) for kind in kinds) else Kind.TENSOR

    def joins_text(self, node: ast.Call) -> bool:
        """Whether a concatenation along the last axis, or axis 1, begins with the text."""
        parts = node.args[0] if node.args else None
        axes = [*node.args[1:], *(keyword.value for keyword in node.keywords)]
        starts = isinstance(parts, ast.List | ast.Tuple) and parts.elts and not isinstance(parts.elts[0], ast.Starred)
        if not starts or any(_number(axis) not in (1, -1) for axis in axes):
            return False
        assert isinstance(parts, ast.List | ast.Tuple)
        return self.value(parts.elts[0]) is Kind.TEXT

    def method(self, node: ast.Call, owner: Fact, name: str, kinds: Sequence[Fact]) -> Fact:
        if self.values and name in ("item", "tolist") and owner in (Kind.ROW, Kind.TENSOR) and not kinds:
            return Kind.TENSOR
        if owner is Kind.LIST and name == "append" and kinds[0] in _TENSORS:
            return Kind.FIXED
        if owner is Kind.CACHE and name == "get_seq_length":
            return Kind.COUNT
        if owner is Kind.OUTPUT and name == "get_seq_length":
            return Kind.COUNT
        known = hasattr(Tensor, name) or name in _OF_DISTRIBUTIONS
        odd = name.startswith(("is_", "__")) or name in _NO_TENSOR
        odd = odd or any(kind in _ODD or isinstance(kind, Known) for kind in kinds)
        if owner not in _TENSORS or not known or odd:
            raise self.doubt(node, f"{name}() of {_in_words(owner)} is called")
        if name == "size":
            whole = {Kind.TEXT: Kind.SIZE, Kind.ROW: Kind.FIXED}.get(owner, Kind.COUNT)  # type: ignore[arg-type]
            first = bool(node.args) and _number(node.args[0]) == 0
            return Kind.FIXED if whole is Kind.SIZE and first else whole
        if name in ("dim", "ndimension"):
            return Kind.FIXED
        if owner is Kind.TEXT and name in ("clone", "contiguous", "detach", "to", "long"):
            return Kind.TEXT
        return Kind.ROW if owner is Kind.ROW and all(kind in _STILL for kind in kinds) else Kind.TENSOR


# ---- kinds -----------------------------------------------------------------------------------------------------------


def _is_sum(node: ast.expr, bent: Set[str]) -> bool:
    """Whether a number is a sum or difference of numbers and sizes; names in ``bent`` are none."""
    match node:
        case ast.Name(id=name):
            return name not in bent
        case ast.Constant() | ast.Attribute() | ast.Subscript():
            return True
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
            return _is_sum(left, bent) and _is_sum(right, bent)
        case ast.Call(func=ast.Attribute(attr="size")) | ast.Call(func=ast.Name(id="len" | "int")):
            return not any(isinstance(inner, ast.Name) and inner.id in bent for inner in ast.walk(node))
        case _:
            return False


def _joined(one: Fact, other: Fact) -> Fact:
    """What is known of a value that is one or the other."""
    if one == other:
        return one
    kinds = {one, other}
    for kind in (Kind.UNKNOWN, Kind.CACHE, Kind.CHOICE, Kind.LIST):
        if kind in kinds:
            return kind if kinds - {kind} <= {Kind.NONE} else Kind.UNKNOWN
    if any(isinstance(kind, Known) for kind in kinds):
        return Kind.UNKNOWN
    tensors = kinds & _TENSORS
    if tensors:
        return tensors.pop() if len(tensors) == 1 and kinds - _TENSORS <= {Kind.NONE} else Kind.TENSOR
    return next(kind for kind in (Kind.COUNT, Kind.SIZE, Kind.FIXED) if kind in kinds)


def _changing(kind: Fact) -> Fact:
    """A variable that a loop assigns, at the beginning of an iteration."""
    if kind is Kind.ROW:
        return Kind.TENSOR
    if isinstance(kind, Known) or kind is Kind.CHOICE:
        return Kind.UNKNOWN
    return Kind.COUNT if kind in (Kind.FIXED, Kind.SIZE) else kind


def _handed_on(before: Fact, after: Fact) -> Fact:
    """A variable at the beginning of an iteration: as it was before the loop, or as the last iteration left it."""
    if before is Kind.COUNT and after in (*_TENSORS, Kind.CACHE):
        return _changing(after)  # a None at first; that the first iteration differs is seen
    return _joined(before, _changing(after))


def _in_words(kind: Fact) -> str:
    if isinstance(kind, Known):
        return f"{getattr(kind.value, '__name__', type(kind.value).__name__)}"
    return kind.value


def _names_stored(node: ast.AST) -> set[str]:
    """The names that a statement assigns, or whose objects it writes to by a method or an entry."""
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


def _pairs(target: ast.expr, source: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """The single assignments that ``a, b = x, y`` stands for; none of any other."""
    if not isinstance(target, ast.Tuple) or not isinstance(source, ast.Tuple) or len(target.elts) != len(source.elts):
        return []
    starred = any(isinstance(part, ast.Starred) for part in (*target.elts, *source.elts))
    return [] if starred else list(zip(target.elts, source.elts, strict=True))


def _number(node: ast.expr | None) -> int | None:
    """An integer that is written out."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _number(node.operand)
        return None if inner is None else -inner
    return node.value if isinstance(node, ast.Constant) and type(node.value) is int else None


def _is_last(place: ast.Slice) -> bool:
    return place.upper is None and _number(place.lower) == -1


def _is_whole(place: ast.expr) -> bool:
    return isinstance(place, ast.Constant) and place.value in (None, ...)


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
