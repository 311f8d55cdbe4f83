"""How many slots the suffixes have. Attention reads all that are allocated, so they grow with the text.

They grow by half, so at most a third of what is read is empty, and a text that ends early never pays for the slots of
its longest answer.
"""

from __future__ import annotations

FIRST = 128  # slots to begin with; fewer would not make a cycle faster


def capacity_of(new_tokens: int, width: int) -> int:
    """Slots of an answer of ``new_tokens``, behind any of which a cycle of ``width`` tokens may begin."""
    return new_tokens + width


def first_size(capacity: int, prompt: int) -> int:
    """Slots to begin with, at most ``capacity``, beside prompts of ``prompt`` slots."""
    return _apart(min(FIRST, capacity), capacity, prompt)


def next_size(size: int, needed: int, capacity: int, prompt: int) -> int:
    """Slots after ``size`` of them, of which ``needed`` must fit; otherwise as for ``first_size``."""
    return _apart(min(max(needed, size + size // 2), capacity), capacity, prompt)


def mean_slots(capacity: int, width: int, prompt: int) -> tuple[float, float]:
    """Slots that a suffix has, and slots that are filled after a cycle: means over the cycles of an answer.

    capacity: slots of the whole answer; width: tokens of a cycle; prompt: slots of the prompt.
    """
    size, sizes = first_size(capacity, prompt), []
    held = range(width + 1, max(capacity, width + 1) + 1, width)
    for needed in held:
        if needed > size:
            size = next_size(size, needed, capacity, prompt)
        sizes.append(size)
    return sum(sizes) / len(sizes), sum(held) / len(held)


def _apart(size: int, capacity: int, prompt: int) -> int:
    """``size``, or one more where it equals ``prompt`` and the capacity allows that.

    Dynamo gives equal sizes one symbol, and compiles again when they differ later.
    """
    return size + 1 if size == prompt and size < capacity else size
