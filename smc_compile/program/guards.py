"""What a program depends on besides the values of weights. Two requests with one key are served by one program."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from smc_compile.errors import InputError
from smc_compile.fingerprint import Snapshot, StateWalk, first_difference
from smc_compile.options import Options, is_stateful
from smc_compile.program.lru import LRU

log = logging.getLogger(__name__)

OF_A_REQUEST = ("seed", "eos_token_id")  # options that every request brings along
WATCHED = 32  # models: those of as many programs as are kept
STATES = 16  # of one model
MANY = 8  # states after which a model is said to change at every call
_numbers = itertools.count()


def program_key(options: Options, *target: Hashable) -> Hashable:
    """The key of a program: of its target, which the caller describes, its draft, torch's modes and its options."""
    return (*target, model_state(options.draft), options_key(options))


@contextmanager
def one_look() -> Iterator[None]:
    """Inside, in this thread, a model is looked at once: nothing but a trace could change it."""
    outer, _looks.found = _looks.found, {}
    try:
        yield
    finally:
        _looks.found = outer


class _Looks(threading.local):
    found: dict[int, Hashable] | None = None  # by the id of a model


_looks = _Looks()


def model_state(model: Any) -> Hashable:
    """What a program takes from a model besides the values of its weights: a number for one state of it, and the modes.

    The state is all that the forward could read: modules, attributes, hooks, adapters, the shapes and dtypes of
    weights, and the code with its globals and closures (see ``smc_compile.fingerprint``). A state that comes back has
    its number again. What is no module, or runs as Python at every call, counts by identity.
    """
    found = _looks.found
    if found is None:
        return _state_now(model)
    if id(model) not in found:
        found[id(model)] = _state_now(model)
    return found[id(model)]


def _state_now(model: Any) -> Hashable:
    as_python = is_stateful(model) and not getattr(model, "traceable", True)
    if not isinstance(model, nn.Module) or as_python:
        number = None if model is None else id(model)  # a program holds its models, so the id is not used again
    else:
        number = _watched.get_or_make(id(model), lambda: Watch(model)).state()
    return number, modes()


def options_key(options: Options) -> Hashable:
    """The options that decide what is compiled."""
    return tuple(value for name, value in vars(options).items() if name not in ("draft", *OF_A_REQUEST))


def modes() -> Hashable:
    """What torch itself is told for all code, as far as it changes what a trace holds."""
    autocast = tuple(
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    )
    refuse_hooks_of_all_modules()
    return torch.get_default_dtype(), autocast, torch.is_inference_mode_enabled()


def refuse_hooks_of_all_modules() -> None:
    """Hooks of all modules would apply to our own modules too, which hold the graphs that are compiled.

    Raises:
        InputError: there are some.
    """
    names = ("_global_forward_hooks", "_global_forward_pre_hooks")
    hooks = [hook for name in names for hook in getattr(nn.modules.module, name).values()]
    if hooks:
        raise InputError(
            "there are hooks for all modules, which would apply to compiled modules too",
            f"registered: {', '.join(getattr(hook, '__qualname__', type(hook).__name__) for hook in hooks)}",
            "register them on the model's own modules: module.register_forward_hook(hook)",
        )


class Watch:
    """The states in which a model was seen, each with a number that no other state of any model has."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model  # held: its id is the key
        self._numbers: LRU[Hashable, int] = LRU(STATES)
        self._snapshots: dict[int, Snapshot] = {}  # the one taken last in each state
        self._latest: Hashable = None
        self._seen = 0

    def state(self) -> int:
        """The number of the present state.

        A snapshot answers in microseconds a module. Where none holds, all is walked through: what was replaced by an
        equal thing is the same state still.
        """
        for number, snapshot in reversed(self._snapshots.items()):
            if snapshot.holds():
                self._snapshots[number] = self._snapshots.pop(number)  # tried first at the next call
                return number
        walk = StateWalk()
        walk.visit(self._model)
        tokens = tuple(walk.tokens)
        if tokens not in self._numbers:
            self._tell_change(tokens)
        number = self._numbers.get_or_make(tokens, lambda: next(_numbers))
        self._snapshots.pop(number, None)
        self._snapshots[number] = walk.snapshot
        while len(self._snapshots) > STATES:
            del self._snapshots[next(iter(self._snapshots))]
        self._latest = tokens
        return number

    def _tell_change(self, tokens: Hashable) -> None:
        """Log what changed: a line at level INFO, and a warning where a model is new at every call."""
        self._seen += 1
        if self._latest is None:
            return
        name, where = type(self._model).__name__, first_difference(self._model, self._latest)  # type: ignore[arg-type]
        log.info("%s has changed at %s: it is compiled again", name, where)
        if self._seen == MANY:
            log.warning(
                "%s was compiled in %d states, the last two differ at %s: if a forward or a hook writes there at every "
                "call, keep what it writes outside of the model",
                name,
                MANY,
                where,
            )


_watched: LRU[int, Watch] = LRU(WATCHED)
