"""What the code of a twin calls (see twin.py): stand-ins for Python that needs a token's value.

While Dynamo traces, a branch on a tensor is noted in the graph and goes where the plan says. When the twin runs for
real, every call does what the user's code does, and branches that leave the plan are noted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from smc_compile.errors import LoopError
from smc_compile.passes.loop.branches import note_branch

Plan = Mapping[int, bool]  # branch -> which way it goes while the loop goes on; False for those that are not named


class _State(threading.local):
    def __init__(self) -> None:
        self.plan: Plan = {}
        self.on_tokens: set[int] | None = None  # branches that asked a tensor, while the loop was traced
        self.left: list[int] | None = None  # branches that left the plan, in a run for real
        self.by_clock = False  # whether a branch of the trace asked for the time


_state = _State()


@contextmanager
def following(plan: Plan, on_tokens: set[int]) -> Iterator[None]:
    """Inside, branches that are traced go as planned; ``on_tokens`` gets those that ask a tensor."""
    before = _state.plan, _state.on_tokens
    _state.plan, _state.on_tokens, _state.by_clock = plan, on_tokens, False
    try:
        yield
    finally:
        _state.plan, _state.on_tokens = before
        if _state.by_clock:
            raise LoopError(
                "The decode loop looks at the clock.",
                "a branch depends on the time that tokens take, and here they are drawn before the loop's code runs",
                "bound the number of tokens, or end texts by the clock with generate(..., stopping_criteria=[...])",
            )


@contextmanager
def noting(plan: Plan, on_tokens: set[int]) -> Iterator[list[int]]:
    """Inside, the twin runs for real; the list gets those of ``on_tokens`` that do not go as planned."""
    before = _state.plan, _state.on_tokens, _state.left
    left: list[int] = []
    _state.plan, _state.on_tokens, _state.left = plan, on_tokens, left
    try:
        yield left
    finally:
        _state.plan, _state.on_tokens, _state.left = before


@torch.compiler.assume_constant_result
def _planned(site: int) -> bool:
    assert _state.on_tokens is not None
    _state.on_tokens.add(site)
    return _state.plan.get(site, False)


def kept(*values: Any) -> list[Tensor]:
    """What is returned while the loop is traced: the tensors among some values."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor | TracedNumber):
            found.append(plain(value))
        elif isinstance(value, list | tuple):
            found.extend(kept(*value))
        elif isinstance(value, dict):
            found.extend(kept(*value.values()))
    return found


def tracing() -> bool:
    """Whether Dynamo traces the code."""
    return torch.compiler.is_compiling()


def truth(value: Any, site: int) -> Any:
    """The truth of what a branch asks for; ``site`` numbers the branch."""
    if torch.compiler.is_compiling():
        if isinstance(value, TracedNumber):
            value = value.tensor != 0
        if isinstance(value, Tensor):
            planned = _planned(site)
            note_branch(value, planned)
            return planned
        return value
    if _state.left is not None and site in (_state.on_tokens or ()) and bool(value) != _state.plan.get(site, False):
        _state.left.append(site)
    return value


class TracedNumber:
    """A token's number while the loop is traced. It can be compared and kept, and has no hash: no set finds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # []

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        return self.tensor == plain(other)

    def __ne__(self, other: object) -> Tensor:  # type: ignore[override]
        return self.tensor != plain(other)

    def __lt__(self, other: Any) -> Tensor:
        return self.tensor < plain(other)

    def __le__(self, other: Any) -> Tensor:
        return self.tensor <= plain(other)

    def __gt__(self, other: Any) -> Tensor:
        return self.tensor > plain(other)

    def __ge__(self, other: Any) -> Tensor:
        return self.tensor >= plain(other)

    __hash__ = None  # type: ignore[assignment]


def plain(value: Any) -> Any:
    """The tensor behind a number that is traced; all else as it is."""
    return value.tensor if isinstance(value, TracedNumber) else value


def twin_or(called: Any, pair: tuple[Any, Any]) -> Any:
    """The twin of what is called, if it is still the function that the twin was made of."""
    function, twin = pair
    return twin if called is function else called


def contains(value: Any, container: Any) -> Any:
    """``value in container`` for a token that is a tensor while it is traced."""
    if not torch.compiler.is_compiling():
        return value in container
    token = plain(value)
    if not isinstance(token, Tensor):
        return value in container
    if isinstance(container, Tensor):
        return (container == token).any()
    found = torch.zeros((), dtype=torch.bool, device=token.device)
    for one in container:
        found = found | (token == plain(one)).all()
    return found


def contains_not(value: Any, container: Any) -> Any:
    """``value not in container``, as ``contains``."""
    found = contains(value, container)
    return ~found if isinstance(found, Tensor) else not found


def item(value: Any) -> Any:
    """``value.item()``."""
    if torch.compiler.is_compiling() and isinstance(value, Tensor):
        return TracedNumber(value.reshape(()))
    return value.item()


def as_list(value: Any) -> Any:
    """``value.tolist()``."""
    if torch.compiler.is_compiling() and isinstance(value, Tensor):
        if value.dim() == 0:
            return TracedNumber(value)
        return [as_list(value[i]) for i in range(value.shape[0])]
    return value.tolist()


def as_int(*given: Any) -> Any:
    """``int(value)``."""
    if torch.compiler.is_compiling() and len(given) == 1 and isinstance(given[0], Tensor | TracedNumber):
        return TracedNumber(plain(given[0]).reshape(()).long())
    return int(*given)


def as_bool(*given: Any) -> Any:
    """``bool(value)``."""
    if torch.compiler.is_compiling() and len(given) == 1 and isinstance(given[0], Tensor | TracedNumber):
        return plain(given[0]).reshape(()).bool()
    return bool(*given)


def as_tensor(make: Any) -> Any:
    """``torch.tensor``, for lists of numbers too."""
    return _stacked if torch.compiler.is_compiling() else make


def _stacked(data: Any, **given: Any) -> Tensor:
    """Nested lists of numbers, some of which are traced, as ``torch.tensor`` makes a tensor of them."""
    if isinstance(data, TracedNumber):
        return data.tensor.to(**given) if given else data.tensor.clone()
    if isinstance(data, list | tuple) and _any_traced(data):
        return torch.stack([_stacked(part, **given) for part in data])
    return torch.tensor(data, **given)


def _any_traced(data: Any) -> bool:
    if isinstance(data, list | tuple):
        return any(_any_traced(part) for part in data)
    return isinstance(data, TracedNumber)


class TracedBar:
    """A progress bar while the loop is traced: what it iterates over."""

    def __init__(self, iterable: Iterable[Any] = (), *args: Any, **kwargs: Any) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)

    def __enter__(self) -> TracedBar:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        """What all other methods do."""

    update = close = refresh = set_description = set_description_str = nothing
    set_postfix = set_postfix_str = write = clear = display = reset = nothing


def range_bar(*args: Any, **kwargs: Any) -> TracedBar:
    """``trange(n)``."""
    return TracedBar(range(*args))


class TracedTime:
    """A time while the loop is traced. Times may be taken and printed; a loop that ends by the clock is refused."""

    def __sub__(self, other: Any) -> TracedTime:
        return self

    __rsub__ = __add__ = __radd__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __sub__

    def __gt__(self, other: Any) -> bool:
        return _asked_the_time()

    __lt__ = __ge__ = __le__ = __gt__


@torch.compiler.assume_constant_result
def _asked_the_time() -> bool:
    _state.by_clock = True
    return False


def clock(*args: Any) -> TracedTime:
    """``time.time()`` while the loop is traced."""
    return TracedTime()
