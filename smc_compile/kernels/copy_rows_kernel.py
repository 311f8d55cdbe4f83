"""The Triton kernel of copy_rows.py: apart, because triton is imported only where there is a use for it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_rows_kernel(
    addresses,  # [C] int64, of caches [R, H, S, d]
    source,  # [R] int64
    used,  # [] int64
    heads,
    head_words,  # of S slots
    slot_words,
    BITS: tl.constexpr,  # of a word
    BLOCK: tl.constexpr,
):
    """Program (r * H + h, cache, block) copies a block of words of one head of row ``source[r]`` to row r."""
    line = tl.program_id(0).to(tl.int64)
    row, head = line // heads, line % heads
    origin = tl.load(source + row)
    if origin != row:
        offset = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        held = offset < tl.load(used) * slot_words
        word = tl.pointer_type(tl.dtype("int" + str(BITS)))
        cache = tl.load(addresses + tl.program_id(1)).to(word)
        values = tl.load(cache + (origin * heads + head) * head_words + offset, mask=held)
        tl.store(cache + line * head_words + offset, values, mask=held)
