"""The store of programs and analyses."""

from __future__ import annotations

import pytest

from smc_compile.program.lru import LRU


def filled(size: int, *keys: str) -> LRU[str, str]:
    store: LRU[str, str] = LRU(size)
    for key in keys:
        store.get_or_make(key, key.upper)
    return store


def test_a_value_is_made_once() -> None:
    made: list[int] = []
    store: LRU[str, int] = LRU(2)
    for _ in range(3):
        assert store.get_or_make("a", lambda: made.append(7) or made[-1]) == 7
    assert made == [7]


def test_the_one_used_longest_ago_goes() -> None:
    store = filled(2, "a", "b", "a", "c")
    assert list(store) == ["a", "c"]
    assert "b" not in store
    assert len(store) == 2


def test_what_is_made_while_another_is_made_is_kept_too() -> None:
    store: LRU[str, str] = LRU(2)
    assert store.get_or_make("outer", lambda: store.get_or_make("inner", lambda: "x") + "y") == "xy"
    assert list(store) == ["inner", "outer"]


def test_an_error_leaves_it_as_it_was() -> None:
    store = filled(2, "a")
    with pytest.raises(ZeroDivisionError):
        store.get_or_make("b", lambda: str(1 // 0))
    assert list(store) == ["a"]


def test_it_can_start_empty_for_a_while() -> None:
    store = filled(2, "a")
    with store.emptied():
        assert len(store) == 0
        store.get_or_make("b", lambda: "B")
        assert list(store) == ["b"]
    assert list(store) == ["a"]


def test_an_empty_size_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        LRU(0)
