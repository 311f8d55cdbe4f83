"""A store of what was expensive to make."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LRU(Generic[Key, Value]):
    """At most ``size`` values by key. When another one comes, the one that was used longest ago goes.

    Iterating gives the keys, the one used longest ago first.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a store holds at least one value, not {size}")
        self.size = size
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get_or_make(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made and kept if there is none. What ``make`` raises leaves the store as it was."""
        if key not in self._values:
            self._values[key] = make()
        self._values.move_to_end(key)
        while len(self._values) > self.size:
            self._values.popitem(last=False)
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[Key]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @contextmanager
    def emptied(self) -> Iterator[None]:
        """Inside, the store begins empty. Afterwards it holds what it held before, and nothing that was made inside."""
        before, self._values = self._values, OrderedDict()
        try:
            yield
        finally:
            self._values = before
