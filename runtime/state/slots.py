"""Where accepted tokens stand in the suffixes of target and draft, when requests advance by different counts.

Every cycle writes its K+1 tokens at one cursor for all rows. A table of positions says what a slot holds: slots of
rejected tokens become HIDDEN, later than every query. When the suffix is full, what is left moves to its front.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.tensors import mark_dynamic
from smc_compile.runtime.state.region_types import Places, State
from smc_compile.runtime.state.request import HIDDEN, Request

SPARE = 8  # cycles for which there is room beyond the tokens wanted


def capacity(new_tokens: int, width: int) -> int:
    """Slots for cycles of ``width`` tokens: all of them, or room to compact now and then."""
    return width * max(min(new_tokens - 1, -(-new_tokens // width) + SPARE), 1)


@dataclass
class Slots:
    """B requests, P slots of their prompts and S of the suffix; target and draft use the same slots.

    The target reads x_0 .. x_K in a cycle. The draft reads one token before: x_{-1}, x_0, .. x_{K-1}, since it never
    saw x_K of a block that was accepted. So its table shows only what stands before x_{-1}, the prompt's last token
    included.
    """

    target: Tensor  # [B, P+S], positions of what the slots hold
    draft: Tensor  # [B, P+S]
    size: int  # S
    width: int  # K+1
    cursor: int = 0

    @classmethod
    def start(cls, request: Request, size: int, width: int) -> Slots:
        target = request.key_positions(size)
        target[:, -size:] = HIDDEN
        draft = target.scatter(1, request.lengths[:, None] - 1, HIDDEN)
        return cls(mark_dynamic(target, 1), mark_dynamic(draft, 1), size, width)

    @property
    def current(self) -> Tensor:
        """Of this cycle [K+1]."""
        return torch.arange(self.cursor, self.cursor + self.width, device=self.target.device)

    def open(self, last: Tensor) -> None:
        """Take slots for the block behind the pending tokens, which stand at positions ``last`` [B]."""
        positions = last[:, None] + torch.arange(self.width, device=last.device)
        prompt = self.target.shape[1] - self.size
        self.target[:, prompt + self.current] = positions
        self.draft[:, prompt + self.current] = positions - 1

    def places(self, keys: Tensor, positions: Tensor, first: int) -> Places:
        """For tokens at ``positions`` [B, T], from slot number ``first`` of this cycle on."""
        return Places(positions, self.current[first : first + positions.shape[1]], keys)

    def close(self, count: Tensor) -> None:
        """Keep the first ``count`` [B] slots of this cycle and hide the others."""
        here = self.target.shape[1] - self.size + self.current
        rejected = torch.arange(self.width, device=count.device) >= count[:, None]  # [B, K+1]
        for keys in (self.target, self.draft):
            keys[:, here] = keys[:, here].masked_fill(rejected, HIDDEN)
        self.cursor += self.width

    def compact(self, *states: State) -> bool:
        """Move what the slots hold to the front, if the next cycle has no room. States: [R, H, S, d] each."""
        if self.cursor + self.width <= self.size:
            return False
        hidden = self.target[:, -self.size :] == HIDDEN  # [B, S]
        self.cursor = int((~hidden).sum(1).max())
        order = hidden.int().argsort(dim=1, stable=True)  # [B, S]
        for keys in (self.target, self.draft):
            keys[:, -self.size :] = keys[:, -self.size :].gather(1, order)
        for suffix in (suffix for state in states for suffix in state):
            r, h, _, d = suffix.shape
            index = order[:, : self.cursor].repeat_interleave(r // len(order), 0)[:, None, :, None]
            suffix[:, :, : self.cursor] = suffix.gather(2, index.expand(-1, h, -1, d))
        return True

    def share(self, source: Tensor, *states: State) -> None:
        """Give every row what row ``source`` [R] holds in the slots of this cycle."""
        for suffix in (suffix for state in states for suffix in state):
            block = suffix[:, :, self.cursor : self.cursor + self.width]
            block.copy_(block[source])

    def take(self, index: Tensor) -> Slots:
        """Of these requests."""
        target, draft = (mark_dynamic(keys[index], 1) for keys in (self.target, self.draft))
        return Slots(target, draft, self.size, self.width, self.cursor)
