"""The Triton kernel of copy_rows.py, in a file of its own: triton is imported only where it is used."""

from __future__ import annotations

import triton
import triton.language as tl

WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}  # by their bytes


@triton.jit
def copy_rows_kernel(
    addresses,  # [C] int64, of caches [R, H, S, d]
    source,  # [R] int64
    since,  # [R] int64
    used,  # [] int64
    heads,
    head_words,  # of S slots
    slot_words,
    WORD: tl.constexpr,  # integer type of a word, for numbers of any type
    BLOCK: tl.constexpr,
):
    """Program (r * H + h, cache, block) copies a block of words of one head of row ``source[r]`` to row r."""
    line = tl.program_id(0).to(tl.int64)
    row, head = line // heads, line % heads
    origin = tl.load(source + row)
    if origin != row:
        offset = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        differs = (offset >= tl.load(since + row) * slot_words) & (offset < tl.load(used) * slot_words)
        cache = tl.load(addresses + tl.program_id(1)).to(tl.pointer_type(WORD))
        values = tl.load(cache + (origin * heads + head) * head_words + offset, mask=differs)
        tl.store(cache + line * head_words + offset, values, mask=differs)
