"""What Python code depends on, as a key: equal for two objects, or for one object at two times, that do the same.

An object is taken apart into tokens: its class, its attributes, the items of containers; of a function its code, its
defaults, what it closes over and the globals that it names. ``fingerprint`` gives the tokens. A ``Snapshot`` is taken
along the way: it says much faster than a second walk that nothing has changed since.

The values of a model's parameters and buffers are no part: they are inputs of what is compiled. Their shapes, dtypes,
devices and ties are.

Code of libraries is not followed as far as the user's own: of a library's class the forward counts, with the functions
of its file and the names that they use. What torch and the standard library hold is fixed.
"""

from __future__ import annotations

import array
import contextlib
import contextvars
import dis
import enum
import functools
import hashlib
import importlib
import operator
import os
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

LARGE = 10_000  # items of a container that is not taken apart
DEEPEST = 100  # levels of objects in objects; what lies below is equal to itself alone
NOT_READ = ("generation_config", "warnings_issued")  # attributes of a model of transformers that no forward reads
PLAIN: tuple[type, ...] = (
    type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format,
)  # fmt: skip
WRITTEN = (float, complex, slice, range, np.generic)  # compared as they are written: nan is itself, -0.0 is not 0.0
FIXED = {*sys.stdlib_module_names, "torch", "numpy", "triton", "sympy", "rich", "tqdm"}  # packages
FIXED_CODE = {*FIXED, __name__.partition(".")[0]}  # and this one
STORES = ("types", "collections", "argparse")  # modules whose objects hold what the user put into them
BUFFERS = (bytearray, array.array, memoryview)
ENVIRONMENT = type(os.environ)
GENERATORS = (np.random.Generator, np.random.RandomState, random.Random)
OF_A_THREAD = (threading.local, contextvars.ContextVar)
BY_ANY_NAME = ("getattr", "vars", "globals", "__dict__")  # code that names these may read what it does not name
MISSING = object()
Replaced = TypeVar("Replaced", bound=Callable[..., Any])


def fingerprint(value: Any) -> Hashable:
    """A key for a processor or a part of it. A library builds new but equal processors at every call.

    Tensors count by their content. What cannot be taken apart is equal to itself alone.
    """
    walk = StateWalk(by_content=True)
    walk.visit(value)
    return tuple(walk.tokens)


def forget_traced(value: Any) -> None:
    """Empty the caches of functions that ``value`` names: a trace leaves tensors without data in them."""
    walk = StateWalk()
    walk.visit(value)
    for cached in walk.snapshot.caches:
        cached.cache_clear()


def as_stand_in(function: Replaced) -> Replaced:
    """Mark a function that takes the place of a model's forward for a while: all such functions are one to a key."""
    function.stands_in = True  # type: ignore[attr-defined]
    return function


def is_stand_in(function: Any) -> bool:
    """Whether a function was marked so."""
    return bool(getattr(function, "__dict__", {}).get("stands_in", False))


class OwnMemory:
    """An object of ours that remembers its calls: what it remembers changes nothing that it computes."""


class Same:
    """A token that is equal to itself alone, for what has no parts to compare; it keeps the object alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"{type(self.value).__name__} at {id(self.value):#x}"


class Snapshot:
    """Every place that a walk has read, with what was there."""

    def __init__(self) -> None:
        self.mappings: list[tuple[dict[Any, Any], tuple[Any, ...], tuple[Any, ...]]] = []
        self.sequences: list[tuple[Any, tuple[Any, ...]]] = []
        self.empty: list[Any] = []  # containers
        self.attributes: list[tuple[Any, str, Any]] = []
        self.names: list[tuple[dict[str, Any], str, Any]] = []  # of globals
        self.cells: list[tuple[types.CellType, Any]] = []  # of closures
        self.weights: list[tuple[dict[str, Any], str, tuple[Any, ...] | None]] = []
        self.ties: list[tuple[dict[str, Any], str, dict[str, Any], str]] = []
        self.keys: list[tuple[dict[str, Any], tuple[str, ...]]] = []
        self.arrays: list[tuple[Any, Hashable]] = []
        self.caches: list[Any] = []  # functions that keep what they gave

    def holds(self) -> bool:
        """Whether every place still holds the same object."""
        return (
            not any(map(len, self.empty))
            and all(
                tuple(d) == keys and all(map(operator.is_, d.values(), values)) for d, keys, values in self.mappings
            )
            and all(len(s) == len(items) and all(map(operator.is_, s, items)) for s, items in self.sequences)
            and all(getattr(o, name, MISSING) is value for o, name, value in self.attributes)
            and all(d.get(name, MISSING) is value for d, name, value in self.names)
            and all(_held(cell) is value for cell, value in self.cells)
            and all(tuple(d) == keys for d, keys in self.keys)
            and all(described(d.get(name)) == seen for d, name, seen in self.weights)
            and all(d.get(name) is e.get(other) for d, name, e, other in self.ties)
            and all(_content(array) == seen for array, seen in self.arrays)
        )

    def put_back(self) -> None:
        """Let every place hold what it held, as far as it was replaced and not changed inside."""
        for empty in self.empty:
            if len(empty):
                empty.clear()
        for held, keys, values in self.mappings:
            if tuple(held) != keys or not all(map(operator.is_, held.values(), values)):
                held.clear()
                held.update(zip(keys, values, strict=True))
        for sequence, items in self.sequences:
            if not _same_items(sequence, items):
                sequence[:] = items
        for owner, name, value in self.attributes:
            if value is not MISSING and getattr(owner, name, MISSING) is not value:
                setattr(owner.owner if isinstance(owner, _Namespace) else owner, name, value)
        for space, name, value in self.names:
            space[name] = value
        for cell, value in self.cells:
            if _held(cell) is not value and value is not MISSING:
                cell.cell_contents = value


def _same_items(items: Collection[Any], before: tuple[Any, ...]) -> bool:
    return len(items) == len(before) and all(map(operator.is_, items, before))


def described(weight: Any) -> tuple[Any, ...] | None:
    """What is compiled for a weight besides its values."""
    if not isinstance(weight, Tensor):
        return None if weight is None else (Same(weight),)
    if is_traceable_wrapper_subclass(weight):  # a quantised weight: its parts, and how they are put together
        names, how = weight.__tensor_flatten__()
        parts = [described(getattr(weight, name)) for name in names]
        return type(weight), weight.shape, weight.dtype, repr(how), *parts
    return type(weight), weight.shape, weight.dtype, weight.device


class StateWalk:
    """Takes a value apart into ``tokens``.

    Args:
        by_content: tensors count by what they hold; else each is itself, as code reads what it holds at every call.
        named: ``paths`` says for each token where it was found.
    """

    def __init__(self, by_content: bool = False, named: bool = False) -> None:
        self.tokens: list[Hashable] = []
        self.snapshot = Snapshot()
        self.by_content = by_content
        self.paths: list[str] | None = [] if named else None
        self._path: list[str] = []
        self._order: dict[int, int] = {}  # id of what was visited -> its number
        self._kept: list[Any] = []  # alive, so that no id comes twice
        self._hidden = False  # whether what is visited was reached by another way than from module to module
        self._first: dict[int, tuple[dict[str, Any], str, int]] = {}  # id of a weight -> where it was found first

    def add(self, token: Hashable) -> None:
        self.tokens.append(token)
        if self.paths is not None:
            self.paths.append(".".join(filter(None, self._path)))

    def visit(self, value: Any, name: str = "") -> None:
        """The tokens of a value that was found under ``name``."""
        self._path.append(name)
        kind = type(value)
        if kind in PLAIN:
            self.add((kind, value))
        elif isinstance(value, WRITTEN):
            self.add((kind, repr(value)))
        elif kind is tuple and all(type(item) in PLAIN for item in value):
            self.add((kind, tuple((type(item), item) for item in value)))
        elif isinstance(value, enum.Enum):
            self.add(Same(value))
        elif id(value) in self._order:
            self.add(("seen before", self._order[id(value)]))
        else:
            self._order[id(value)] = len(self._order)
            self._kept.append(value)
            if len(self._path) > DEEPEST:
                self.add(Same(value))
            else:
                self._take_apart(value, kind)
        self._path.pop()

    def _take_apart(self, value: Any, kind: type) -> None:
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, (np.ndarray, *BUFFERS, ENVIRONMENT, *GENERATORS)):
            self._by_content(value)
        elif isinstance(value, OF_A_THREAD):
            self.snapshot.arrays.append((value, _content(value)))
            for name, item in _of_this_thread(value):
                self.add((kind, name))
                self.visit(item, name)
        elif isinstance(value, (dict, list, tuple, deque, set, frozenset)):
            self._container(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, functools._lru_cache_wrapper):
            self.snapshot.caches.append(value)
            self.visit(value.__wrapped__)
        elif isinstance(value, types.MethodType):
            self.visit(value.__func__)
            self.visit(value.__self__)
        elif isinstance(value, functools.partial):
            self.add(kind)
            for part in ("func", "args", "keywords"):
                self.visit(getattr(value, part), part)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType) or _is_fixed(kind) or isinstance(value, OwnMemory):
            self.add(Same(value))
        else:
            self._object(value, kind)

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def _tensor(self, value: Tensor) -> None:
        if self.by_content:
            self._by_content(value)
        else:
            self.add((Same(value), described(value)))
            held = {"": value}
            self.snapshot.weights.append((held, "", described(value)))

    def _weights(self, values: dict[str, Any], kept: bool = True) -> None:
        """Parameters or buffers of a module; ``kept`` in this very dictionary."""
        if not values:
            if kept:
                self.snapshot.empty.append(values)
            return
        if self._hidden and not self.by_content:  # of no module of the model: a trace holds the tensors themselves
            self._dict(values)
            return
        self.snapshot.keys.append((values, tuple(values)))
        for name, weight in values.items():
            self._path.append(name)
            self.add((name, _content(weight) if self.by_content and weight is not None else described(weight)))
            self.snapshot.weights.append((values, name, described(weight)))
            if id(weight) in self._first and weight is not None:
                holder, other, number = self._first[id(weight)]
                self.add(("tied", number))
                self.snapshot.ties.append((values, name, holder, other))
            self._first.setdefault(id(weight), (values, name, len(self._first)))
            self._path.pop()

    def _by_content(self, value: Any) -> None:
        content = _content(value)
        self.add(content)
        self.snapshot.arrays.append((value, content))

    # ---- containers --------------------------------------------------------------------------------------------------

    def _container(self, value: Any) -> None:
        if isinstance(value, dict):
            self._dict(value)
        elif isinstance(value, (set, frozenset)):
            self._set(value)
        else:
            self._sequence(value)
        if _package(type(value).__module__) not in FIXED:  # a class of the user's own, which may hold more than items
            self._object(value, type(value))

    def _dict(self, value: dict[Any, Any]) -> None:
        self.add((type(value), len(value)))
        if not value:
            self.snapshot.empty.append(value)
            return
        self.snapshot.mappings.append((value, tuple(value), tuple(value.values())))
        if len(value) > LARGE:
            self.add(Same(value))
            return
        for key, item in list(value.items()):
            self.visit(key)
            self.visit(item, str(key))

    def _sequence(self, value: Any) -> None:
        self.add((type(value), len(value)))
        if not isinstance(value, tuple):
            if value:
                self.snapshot.sequences.append((value, tuple(value)))
            else:
                self.snapshot.empty.append(value)
        if len(value) > LARGE:
            self.add(Same(value))
            return
        for at, item in enumerate(value):
            self.visit(item, str(at))

    def _set(self, value: Any) -> None:
        self.add((type(value), len(value)))
        plain = all(type(item) in PLAIN for item in value) and len(value) <= LARGE
        self.add(frozenset((type(item), item) for item in value) if plain else Same(value))
        if isinstance(value, set):
            self.snapshot.arrays.append((value, _content(value))) if value else self.snapshot.empty.append(value)

    # ---- objects -----------------------------------------------------------------------------------------------------

    def _object(self, value: Any, kind: type) -> None:
        self.add(Same(kind))
        self.snapshot.attributes.append((value, "__class__", kind))
        for owner in _owners(kind):
            self.visit(owner, f"<{owner.__name__}>")
        slots = [name for owner in kind.__mro__ for name in _slots(owner) if name not in ("__dict__", "__weakref__")]
        attributes = getattr(value, "__dict__", None)
        if not slots and not isinstance(attributes, dict):
            if not isinstance(value, (dict, list, tuple, deque, set, frozenset)):
                self.add(Same(value))
            return
        for name in slots:
            item = getattr(value, name, MISSING)
            self.snapshot.attributes.append((value, name, item))
            self.visit(None if item is MISSING else item, name)
        if isinstance(attributes, dict):
            self._attributes(value, attributes)

    def _attributes(self, value: Any, attributes: dict[str, Any]) -> None:
        own = attributes
        if isinstance(value, nn.Module):
            read = {name: item for name, item in attributes.items() if name not in NOT_READ}
            if len(read) == len(attributes):
                self.snapshot.mappings.append((attributes, tuple(attributes), tuple(attributes.values())))
            else:
                self.snapshot.attributes += [(value, name, item) for name, item in read.items()]
            own = {name: item for name, item in read.items() if name not in ("_parameters", "_buffers")}
            for kind in ("_parameters", "_buffers"):
                self._weights(attributes.get(kind) or {}, kind in attributes)
        else:
            self.snapshot.mappings.append((attributes, tuple(attributes), tuple(attributes.values())))
        hidden = self._hidden
        for name, item in list(own.items()):
            self.add(name)
            self._hidden = hidden or name != "_modules"
            self.visit(item, "" if name == "_modules" else name)
        self._hidden = hidden

    # ---- code --------------------------------------------------------------------------------------------------------

    def _function(self, value: types.FunctionType) -> None:
        if is_stand_in(value):
            self.add("a stand-in")
            return
        hidden, self._hidden = self._hidden, True
        self._parts_of_function(value)
        self._hidden = hidden

    def _parts_of_function(self, value: types.FunctionType) -> None:
        if _package(value.__module__) in FIXED_CODE:
            self.add(Same(value))
            return
        code = value.__code__
        self.add(code)
        self.snapshot.attributes += [(value, "__code__", code), (value, "__defaults__", value.__defaults__)]
        self.visit(value.__defaults__)
        self.visit(value.__kwdefaults__)
        for name, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
            content = _held(cell)
            self.snapshot.cells.append((cell, content))
            self.visit(None if content is MISSING else content, name)
        if vars(value):
            self._dict(vars(value))
        self._globals(value, own=not _is_library(code.co_filename))

    def _globals(self, function: types.FunctionType, own: bool) -> None:
        """The globals that a function names. A library's function is followed within its file."""
        space = function.__globals__
        for name, parts in _imports(function.__code__) if own else ():
            with contextlib.suppress(Exception):  # an import may fail in any way: that is for the function to say
                module = importlib.import_module(name, space.get("__package__"))
                for part in (part for part in parts if not hasattr(module, part)):
                    importlib.import_module(f"{module.__name__}.{part}")
                self._module(module, function.__code__, own)
        for name in _names_in(function.__code__, space) if own else _names(function.__code__):
            item = space.get(name, MISSING)
            if item is MISSING:
                continue
            self.snapshot.names.append((space, name, item))
            if isinstance(item, types.ModuleType):
                self._module(item, function.__code__, own)
            elif own or (isinstance(item, types.FunctionType) and item.__globals__ is space):
                self.visit(item, name)
            else:
                self.add(Same(item) if type(item) not in PLAIN else (type(item), item))

    def _module(self, module: types.ModuleType, code: types.CodeType, own: bool) -> None:
        """What code reads from a module of the user."""
        self.add(Same(module))
        if module is os and {"environ", "getenv"} & set(_names(code)):
            self._by_content(os.environ)
        source = getattr(module, "__file__", None)
        if not own or _is_library(source or "") or _package(module.__name__) in FIXED:
            return
        for name in _names_in(code, vars(module)):
            item = vars(module).get(name, MISSING)
            if item is MISSING:
                continue
            self.snapshot.names.append((vars(module), name, item))
            if not isinstance(item, types.ModuleType):
                self.visit(item, f"{module.__name__}.{name}")
            elif id(item) not in self._order:
                self._order[id(item)] = len(self._order)
                self._kept.append(item)
                self._module(item, code, own)

    def _class(self, value: type) -> None:
        """A class: its functions and its other attributes; of a library's class, its functions."""
        self.add(Same(value))
        if _package(value.__module__) in FIXED_CODE:
            return
        library = _is_library(getattr(sys.modules.get(value.__module__), "__file__", None) or "")
        if library and "forward" not in vars(value):
            return
        self.snapshot.keys.append((vars(value), tuple(vars(value))))  # type: ignore[arg-type]
        for name, item in list(vars(value).items()):
            if name.startswith("__") and name not in ("__call__", "__getattr__", "__torch_function__"):
                continue
            found = item.__func__ if isinstance(item, (staticmethod, classmethod)) else item
            found = found.fget if isinstance(found, property) else found
            if isinstance(found, types.FunctionType) or not library:
                self.snapshot.attributes.append((_Namespace(value), name, item))
                self.visit(found, name)
        for base in value.__bases__:
            if _package(base.__module__) not in FIXED_CODE:
                self.visit(base, f"<{base.__name__}>")


def _held(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty one raises when read
        return MISSING


class _Namespace:
    """Reads attributes that stand in a class itself, as they stand there."""

    def __init__(self, owner: type) -> None:
        self.owner = owner

    def __getattr__(self, name: str) -> Any:
        return vars(self.owner).get(name, MISSING)


def _owners(kind: type) -> list[type]:
    """The classes that an object of ``kind`` gets its code from, those of torch and the standard library apart."""
    return [owner for owner in kind.__mro__ if _package(owner.__module__) not in FIXED_CODE]


def _slots(owner: type) -> Iterable[str]:
    slots = vars(owner).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else slots


def _is_fixed(kind: type) -> bool:
    """Whether objects of a class hold nothing that a user put there: a logger, a lock, a generator of torch."""
    package = _package(kind.__module__)
    return package in FIXED and package not in STORES and not issubclass(kind, nn.Module)


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


@functools.lru_cache(maxsize=10_000)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals and attributes in some code, and in the code inside it."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return tuple(dict.fromkeys([*code.co_names, *(name for const in inner for name in _names(const))]))


@functools.lru_cache(maxsize=10_000)
def _imports(code: types.CodeType) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The modules that some code imports itself, and the code inside it: ``..module``, and what is taken from it."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    steps = list(dis.get_instructions(code))  # level, names, IMPORT_NAME
    own = (
        ("." * steps[at - 2].argval + step.argval, steps[at - 1].argval or ())
        for at, step in enumerate(steps)
        if step.opname == "IMPORT_NAME"
    )
    return tuple(dict.fromkeys([*own, *(name for const in inner for name in _imports(const))]))


def _names_in(code: types.CodeType, space: Mapping[str, Any]) -> Iterable[str]:
    """The names in some code; all data of a space of names, where the code may read it by a name that it makes."""
    names = _names(code)
    if not set(BY_ANY_NAME) & set(names):
        return names
    return dict.fromkeys([*names, *(name for name, item in list(space.items()) if _is_data(item))])


def _is_data(value: Any) -> bool:
    """Plain values, and what holds values."""
    held = (dict, list, tuple, set, frozenset, deque, np.ndarray, *BUFFERS, *OF_A_THREAD, types.SimpleNamespace)
    return type(value) in PLAIN or isinstance(value, (*WRITTEN, *held))


@functools.lru_cache(maxsize=10_000)
def _is_library(filename: str) -> bool:
    """Whether a file belongs to an installed package."""
    return "site-packages" in filename or "dist-packages" in filename or filename.startswith(_STANDARD)


_STANDARD = functools.__file__.rpartition("functools")[0]  # the folder of the standard library


def _content(value: Any) -> Hashable:
    """What a tensor, an array or a set holds."""
    if isinstance(value, set):
        return frozenset(map(id, value))
    if isinstance(value, ENVIRONMENT):
        return tuple(value.items())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    if isinstance(value, random.Random):
        return repr(value.getstate())
    if isinstance(value, OF_A_THREAD):
        return tuple((name, id(item)) for name, item in _of_this_thread(value))
    if isinstance(value, BUFFERS):
        return type(value), hashlib.sha256(bytes(value)).hexdigest()
    if isinstance(value, np.ndarray):
        data = repr(value.tolist()).encode() if value.dtype == object else value.tobytes()
        return np.ndarray, value.shape, str(value.dtype), hashlib.sha256(data).hexdigest()
    flat = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return Tensor, tuple(value.shape), str(value.dtype), hashlib.sha256(flat.tobytes()).hexdigest()


def _of_this_thread(value: Any) -> list[tuple[str, Any]]:
    """What a thread's variable holds in this thread and context."""
    return list(vars(value).items()) if isinstance(value, threading.local) else [(value.name, value.get(None))]


def first_difference(value: Any, before: Iterable[Hashable]) -> str:
    """Where the tokens of a value begin to differ from those of an earlier walk, as a path of attributes."""
    walk = StateWalk(named=True)
    walk.visit(value)
    assert walk.paths is not None
    pairs: Iterator[tuple[Hashable, Hashable, str]] = zip(walk.tokens, before, walk.paths, strict=False)
    return next((path for token, other, path in pairs if token != other), "") or "the model itself"
