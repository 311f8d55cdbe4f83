"""Slots of the suffixes of target and draft, when the requests of a batch accept different numbers of tokens.

Every cycle writes its K+1 tokens at one cursor for all rows. A table holds the position of each slot's token; slots of
rejected tokens become UNSEEN. When the suffix is full, the slots that are still seen move to its front.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.tensors import mark_dynamic
from smc_compile.runtime.state.region_types import Places, State
from smc_compile.runtime.state.request import UNSEEN, Request

SPARE = 8  # cycles for which there are slots beyond those of the wanted tokens


def capacity(new_tokens: int, width: int) -> int:
    """Slots of a suffix for cycles of ``width`` tokens.

    A cycle may keep only one token. So there are slots for as many cycles as that can take, or fewer, which are then
    compacted now and then.
    """
    return width * max(min(new_tokens - 1, -(-new_tokens // width) + SPARE), 1)


@dataclass
class Slots:
    """Positions of the tokens in the slots of B requests: P of a prompt, S of the suffix, the same for both models.

    In a cycle the target reads x_0 .. x_K. The draft reads x_{-1}, x_0, .. x_{K-1}: it begins one token earlier, since
    it never read x_K of a block that was accepted as a whole. So its table shows only tokens before x_{-1}: the
    prompt's last token is not among them.
    """

    target: Tensor  # [B, P+S], positions
    draft: Tensor  # [B, P+S]
    size: int  # S
    width: int  # K+1
    cursor: int = 0  # first slot of this cycle, counted in the suffix

    @classmethod
    def start(cls, request: Request, size: int, width: int) -> Slots:
        target = request.key_positions(size)
        target[:, -size:] = UNSEEN
        draft = target.scatter(1, request.lengths[:, None] - 1, UNSEEN)
        return cls(mark_dynamic(target, 1), mark_dynamic(draft, 1), size, width)

    @property
    def current(self) -> Tensor:
        """Slots of this cycle [K+1], counted in the suffix."""
        return torch.arange(self.cursor, self.cursor + self.width, device=self.target.device)

    def open(self, last: Tensor) -> None:
        """Write the positions of x_0 .. x_K into this cycle's slots; x_0, the pending token, is at ``last`` [B].

        The draft's are one less.
        """
        positions = last[:, None] + torch.arange(self.width, device=last.device)
        prompt = self.target.shape[1] - self.size
        self.target[:, prompt + self.current] = positions
        self.draft[:, prompt + self.current] = positions - 1

    def places(self, keys: Tensor, positions: Tensor, first: int) -> Places:
        """Places of tokens at ``positions`` [B, T], from slot number ``first`` of this cycle on."""
        return Places(positions, self.current[first : first + positions.shape[1]].expand(len(positions), -1), keys)

    def close(self, count: Tensor) -> None:
        """End the cycle: keep its first ``count`` [B] slots, and let the others be UNSEEN."""
        here = self.target.shape[1] - self.size + self.current
        rejected = torch.arange(self.width, device=count.device) >= count[:, None]  # [B, K+1]
        for keys in (self.target, self.draft):
            keys[:, here] = keys[:, here].masked_fill(rejected, UNSEEN)
        self.cursor += self.width

    def compact(self, *states: State) -> bool:
        """Move the slots that are seen to the front, if the next cycle does not fit. Returns whether they were moved.

        states: caches [R, H, S, d], changed in place.
        """
        if self.cursor + self.width <= self.size:
            return False
        hidden = self.target[:, -self.size :] == UNSEEN  # [B, S]
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
        """Copy into every row what row ``source`` [R] of it holds in the slots of this cycle, in place."""
        for suffix in (suffix for state in states for suffix in state):
            block = suffix[:, :, self.cursor : self.cursor + self.width]
            block.copy_(block[source])

    def take(self, index: Tensor) -> Slots:
        """The slots of these requests."""
        target, draft = (mark_dynamic(keys[index], 1) for keys in (self.target, self.draft))
        return Slots(target, draft, self.size, self.width, self.cursor)
