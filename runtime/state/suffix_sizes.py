"""How many slots the suffixes have: attention reads all that are allocated, so they grow with the text.

A text of n tokens then reads at most half as much again as it holds, and one that ends early never pays for its cap.
"""

from __future__ import annotations

import math

FIRST = 128  # slots to begin with: below that a cycle does not feel them


def cycles_of(new_tokens: int, width: int) -> int:
    """Cycles of ``width`` tokens that an answer takes; its first token comes with the prompt."""
    return math.ceil((new_tokens - 1) / width)


def capacity_of(new_tokens: int, width: int) -> int:
    """Slots of an answer in whole cycles."""
    return max(cycles_of(new_tokens, width) * width + 1, 2)


def first_size(capacity: int, prompt: int) -> int:
    """Slots to begin with, of at most ``capacity``."""
    return _apart(min(FIRST, capacity), capacity, prompt)


def next_size(size: int, needed: int, capacity: int, prompt: int) -> int:
    """Slots when ``size`` of them do not hold ``needed``."""
    return _apart(min(max(needed, size + size // 2), capacity), capacity, prompt)


def mean_slots(capacity: int, width: int, prompt: int) -> tuple[float, float]:
    """Slots of a suffix that are allocated, and those that hold something after a cycle: means over an answer's
    cycles of ``width`` tokens."""
    size, sizes = first_size(capacity, prompt), []
    held = range(width + 1, max(capacity, width + 1) + 1, width)
    for needed in held:
        if needed > size:
            size = next_size(size, needed, capacity, prompt)
        sizes.append(size)
    return sum(sizes) / len(sizes), sum(held) / len(held)


def _apart(size: int, capacity: int, prompt: int) -> int:
    """Sizes that are equal when a region is compiled count as one symbol, and would compile again when they differ."""
    return size + 1 if size == prompt and size < capacity else size
