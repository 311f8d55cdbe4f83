"""What Python code depends on: equal keys for what does the same, and a snapshot that says when nothing moved."""

from __future__ import annotations

import array
import contextvars
import dataclasses
import functools
import importlib
import logging
import math
import os
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from smc_compile.fingerprint import StateWalk, fingerprint, first_difference

FACTOR = 2.0
NESTED = {"a": [{"b": 1.0}]}
IN_CONTEXT = contextvars.ContextVar("in_context", default=1.0)
IN_THREAD = threading.local()
IN_THREAD.value = 1.0


class Options:
    """Settings as people keep them: on a class, in objects on it, in classes inside it."""

    scale = 1.0
    more = types.SimpleNamespace(scale=1.0)

    class Inner:
        scale = 1.0


class Table(dict):  # type: ignore[type-arg]
    scale = 1.0


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


@dataclasses.dataclass
class Settings:
    size: int = 1
    names: list[str] = dataclasses.field(default_factory=list)


def scaled(by: float) -> Callable[[float], float]:
    return lambda x: x * by * FACTOR


EQUAL: dict[str, Callable[[], Any]] = {
    "numbers": lambda: [1, 2.5, math.nan, 1j, True, None],
    "containers": lambda: {"a": [1, (2, {3})], "b": deque([1]), "c": OrderedDict(x=1), "d": frozenset("ab")},
    "functions": lambda: scaled(3.0),
    "partial functions": lambda: functools.partial(scaled, 3.0),
    "objects": lambda: [Settings(2, ["x"]), Slotted(3), types.SimpleNamespace(y=1)],
    "methods": lambda: Settings(4).__repr__,
    "arrays": lambda: np.arange(6).reshape(2, 3),
    "tensors": lambda: torch.arange(6).float(),
    "slices": lambda: (slice(1, 2), range(4)),
    "itself inside": lambda: holding_itself(),
}


def holding_itself() -> list[Any]:
    items: list[Any] = [1]
    items.append(items)
    return items


@pytest.mark.parametrize("name", EQUAL)
def test_equal_things_have_equal_keys(name: str) -> None:
    one, other = EQUAL[name](), EQUAL[name]()
    assert fingerprint(one) == fingerprint(other)
    hash(fingerprint(one))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ([1], (1,)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (scaled(3.0), scaled(4.0)),
        (Settings(1), Settings(2)),
        (Slotted(1), Slotted(2)),
        (np.arange(3), np.arange(3) + 1),
        (torch.zeros(2), torch.zeros(2).double()),
        (lambda x: x, lambda x: -x),
    ],
)
def test_other_things_have_other_keys(one: Any, other: Any) -> None:
    assert fingerprint(one) != fingerprint(other)


def test_a_global_that_a_function_names_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    function = scaled(3.0)
    before = fingerprint(function)
    monkeypatch.setitem(function.__globals__, "FACTOR", 5.0)
    assert fingerprint(function) != before


def test_what_changes_by_itself_does_not_count() -> None:
    logger = logging.getLogger("changing")
    module = nn.Linear(1, 1)
    module.log = logger  # type: ignore[assignment]
    before = StateWalk()
    before.visit(module)
    logger.setLevel(logging.ERROR)
    logger.isEnabledFor(logging.INFO)
    after = StateWalk()
    after.visit(module)
    assert before.tokens == after.tokens


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "an attribute": lambda m: setattr(m, "size", 2),
    "a new attribute": lambda m: setattr(m, "other", 2),
    "an attribute less": lambda m: delattr(m, "size"),
    "an item": lambda m: m.items.append(1),
    "an item for another": lambda m: m.items.__setitem__(0, 7),
    "an entry": lambda m: m.table.update(b=1),
    "a set": lambda m: m.names.add("z"),
    "a slot": lambda m: setattr(m.slotted, "value", 9),
    "an array": lambda m: m.array.__setitem__(0, 9),
    "a hook": lambda m: m.layer.register_forward_hook(print),
    "a dtype": lambda m: m.layer.half(),
    "a shape": lambda m: setattr(m.layer.weight, "data", torch.zeros(3, 2)),
    "a weight more": lambda m: m.layer.register_parameter("new", nn.Parameter(torch.zeros(1))),
    "a weight less": lambda m: m.layer.register_parameter("bias", None),
    "a tie": lambda m: setattr(m.second, "weight", nn.Parameter(m.second.weight.data)),
    "a closure": lambda m: setattr(m, "function", scaled(4.0)),
    "a class": lambda m: setattr(m.slotted, "__class__", type("Other", (Slotted,), {"__slots__": ()})),
}


def holder() -> nn.Module:
    module = nn.Module()
    module.layer, module.second = nn.Linear(2, 2), nn.Linear(2, 2)
    module.second.weight = module.layer.weight
    module.size, module.items, module.table, module.names = 1, [1, 2], {"a": 1}, {"x"}
    module.slotted, module.array, module.function = Slotted(1), np.zeros(2), scaled(3.0)
    return module


@pytest.mark.parametrize("name", CHANGES)
def test_a_snapshot_and_the_key_see_every_change(name: str) -> None:
    module, before = holder(), StateWalk()
    before.visit(module)
    assert before.snapshot.holds()
    CHANGES[name](module)
    assert not before.snapshot.holds()
    after = StateWalk()
    after.visit(module)
    assert after.tokens != before.tokens
    assert first_difference(module, before.tokens)


def test_values_of_weights_do_not_count() -> None:
    module, before = holder(), StateWalk()
    before.visit(module)
    module.layer.weight.data.fill_(3)
    module.layer.weight = nn.Parameter(torch.ones(2, 2))
    module.second.weight = module.layer.weight
    after = StateWalk()
    after.visit(module)
    assert after.tokens == before.tokens


def test_a_change_is_named_by_its_path() -> None:
    module, before = holder(), StateWalk()
    before.visit(module)
    module.items[1] = 5
    assert first_difference(module, before.tokens) == "items.1"


def test_a_variable_that_is_not_assigned_yet_and_then_is() -> None:
    def later() -> object:
        return value

    module, before = nn.Module(), StateWalk()
    module.function = later
    before.visit(module)
    assert before.snapshot.holds()
    value = 3
    assert not before.snapshot.holds()
    assert first_difference(module, before.tokens) == "function.value"
    assert later() == value


READ: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "a class": (lambda m: Options.scale, lambda m: setattr(Options, "scale", Options.scale + 1)),
    "an object on a class": (lambda m: Options.more.scale, lambda m: setattr(Options.more, "scale", 2.0)),
    "a class in a class": (lambda m: Options.Inner.scale, lambda m: setattr(Options.Inner, "scale", 2.0)),
    "a new attribute of a class": (lambda m: getattr(Options, "late", 1), lambda m: setattr(Options, "late", 2)),
    "an attribute of a dictionary": (lambda m: m.table.scale, lambda m: setattr(m.table, "scale", 2.0)),
    "bytes": (lambda m: m.bytes[0], lambda m: m.bytes.__setitem__(0, 9)),
    "an array": (lambda m: m.numbers[0], lambda m: m.numbers.__setitem__(0, 9.0)),
    "nested globals": (lambda m: NESTED["a"][0]["b"], lambda m: NESTED["a"][0].update(b=NESTED["a"][0]["b"] + 1)),
    "a context": (lambda m: IN_CONTEXT.get(), lambda m: IN_CONTEXT.set(2.0)),
    "a thread": (lambda m: IN_THREAD.value, lambda m: setattr(IN_THREAD, "value", 2.0)),
    "the environment": (lambda m: os.environ.get("SCALE"), lambda m: os.environ.update(SCALE="2")),
    "a name that is made": (lambda m: globals()["FAC" + "TOR"], lambda m: globals().update(FACTOR=FACTOR + 1)),
}


@pytest.mark.parametrize("name", READ)
def test_whatever_a_forward_reads_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALE", "1")
    module = nn.Module()
    module.table, module.bytes, module.numbers = Table(a=1), bytearray(b"ab"), array.array("d", [1.0])
    module.function, change = READ[name]
    seen, before = module.function(module), StateWalk()
    before.visit(module)
    assert before.snapshot.holds()
    change(module)
    assert module.function(module) != seen
    assert not before.snapshot.holds()
    after = StateWalk()
    after.visit(module)
    assert after.tokens != before.tokens


# ---- modules that a forward imports itself ---------------------------------------------------------------------------

FORWARDS = {
    "absolute": "import smc_pkg.settings as c\n        return ids * c.SIGN",
    "by a name of it": "from smc_pkg.settings import SIGN\n        return ids * SIGN",
    "relative": "from .settings import SIGN\n        return ids * SIGN",
    "the package": "from . import settings\n        return ids * settings.SIGN",
    "one that is not there": "from .settings import SIGN\n        from .nowhere import X\n        return ids * SIGN",
}


@pytest.mark.parametrize("body", FORWARDS.values(), ids=FORWARDS)
def test_what_a_forward_imports_is_looked_at(body, tmp_path, monkeypatch):
    package = tmp_path / "smc_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "settings.py").write_text("SIGN = 1.0\n")
    forward = f"    def forward(self, ids):\n        {body}\n"
    (package / "model.py").write_text(f"from torch import nn\nclass Model(nn.Module):\n{forward}")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("smc_pkg", "smc_pkg.settings", "smc_pkg.model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    model = importlib.import_module("smc_pkg.model").Model()
    before = StateWalk()
    before.visit(model)
    assert before.snapshot.holds()
    monkeypatch.setattr(sys.modules["smc_pkg.settings"], "SIGN", -1.0)
    after = StateWalk()
    after.visit(model)
    assert not before.snapshot.holds()
    assert tuple(before.tokens) != tuple(after.tokens)
