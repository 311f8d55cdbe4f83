"""A model that sees the last W tokens of its text only, as a text of its own: nothing of it can be kept.

Once the text is longer than W, each token is read in a text that begins one token later. Every position is another one,
so every key changes. Each token costs a pass over a whole window.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smc_compile.runtime.execution.incremental import StatefulModel
from smc_compile.runtime.state.region_types import Forward, Places, State

# (ids [R, S], *weights) -> (rows [R, V] at the last position, ...)
LastRows = Callable[..., tuple[Tensor, ...]]


class WindowModel(StatefulModel):
    """``rows`` on the last ``window`` tokens of every text.

    State: the last tokens [R, window], the newest one last; before there are so many, zeros in front.

    Attributes:
        window: W.
        weights: gives the weights at each call.
    """

    def __init__(self, rows: LastRows, weights: Callable[[], list[Tensor]], window: int, vocab_size: int) -> None:
        super().__init__(None)
        self.weights, self.window = weights, window
        self._rows, self._vocab_size = rows, vocab_size
        self.whole = False  # the graph of a whole text runs as it is, as a prefill does

    def _prefill(self, ids: Tensor) -> list[Tensor]:
        state = ids.new_zeros(ids.shape[0], self.window)
        shown = ids[:, -self.window :]
        state[:, self.window - shown.shape[1] :] = shown
        return [self._last(shown), state]

    def state_bytes(self, positions: int) -> int:
        return self.window * torch.int64.itemsize

    def logit_bytes(self) -> int:
        return self._vocab_size * 4

    def _body(self, all_positions: bool) -> Forward:
        def forward(tokens: Tensor, places: Places, state: State, context: object) -> tuple[Tensor, State]:
            text, block = torch.cat([state[0], tokens], 1), tokens.shape[1]  # [R, W + T]
            ends = text.unfold(1, self.window, 1)[:, 1:]  # [R, T, W]: the window behind each new token
            first = int(places.positions[:, 0].amax())  # those that have ended stay at their last position
            wanted = range(block) if all_positions else [block - 1]
            if first + wanted[0] + 1 >= self.window:
                rows = self._last(ends[:, wanted[0] :].flatten(0, 1))  # [R * T, V]
            else:  # texts of several lengths
                rows = torch.stack([self._last(ends[:, t, -(first + t + 1) :]) for t in wanted], 1).flatten(0, 1)
            return rows, [text[:, -self.window :].contiguous()]

        return forward

    def _last(self, ids: Tensor) -> Tensor:
        return self._rows(ids[:, -self.window :].contiguous(), *self.weights())[0]
