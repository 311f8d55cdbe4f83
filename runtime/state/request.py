"""What a call asks for: prompt, length, seed, eos ids and sampler settings of each request of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smc_compile.runtime.state.conditioning import Conditioning


class Rows(NamedTuple):
    """Which requests the rows of a text [R, L] belong to, for text processors and stopping criteria."""

    request: Tensor  # [R], index in the caller's batch
    padding: Tensor  # [R], number of padding tokens in front of the prompt


# (text [R, L], scores [R, V], rows) -> scores [R, V]: a logits processor that reads the tokens so far
TextProcessor = Callable[[Tensor, Tensor, Rows], Tensor]
# (text [R, L], rows) -> [R] bool: whether each sequence ends with its last token. It runs on the host.
Stop = Callable[[Tensor, Rows], Tensor]


@dataclass(frozen=True)
class Request:
    """B requests. Row b of every tensor is request b's own; nothing of one request depends on another.

    Attributes:
        ids: [B, P] int64, padding in front; prompt b is the last ``lengths[b]`` of them.
        lengths: [B] int64, at least 1.
        new_tokens: [B] int64, the most tokens wanted.
        seeds: [B] int64.
        eos_ids: [B, E] int64, tokens that end a sequence; -1 fills up.
        pad: [B] int64, the token that follows an end.
        settings: sampler settings that the distribution reads, by name: [B] each.
        number: index of each request in the caller's batch.
        text_processors: those that run on the host; compiled ones belong to the session.
        stop: a stopping criterion, which runs on the host.
        max_lag: draw one ancestor for tokens older than this many; None never does.
        watch: called with every ``Progress``.
        conditioning: what the texts are conditioned on.
        reach: position tables are filled up to this length, so that requests of one shape have tables of one shape.
    """

    ids: Tensor
    lengths: Tensor
    new_tokens: Tensor
    seeds: Tensor
    eos_ids: Tensor
    pad: Tensor
    settings: Mapping[str, Tensor] = field(default_factory=dict)
    number: tuple[int, ...] = ()
    text_processors: tuple[TextProcessor, ...] = ()
    stop: Stop | None = None
    max_lag: int | None = None
    watch: Callable[[Any], None] | None = None
    conditioning: Conditioning | None = None
    reach: int = 0

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @property
    def positions_read(self) -> Tensor:
        """How many positions models read of each text [B]: all but that of the last wanted token."""
        return self.lengths + self.new_tokens - 1

    def rows(self, n: int) -> Rows:
        """The rows of ``n`` particles a request, R = B*n."""
        request = torch.tensor(self.number, device=self.ids.device).repeat_interleave(n)
        return Rows(request, (self.ids.shape[1] - self.lengths).repeat_interleave(n))

    def take(self, keep: list[int]) -> Request:
        """The requests of these indices."""
        index = torch.tensor(keep, device=self.ids.device)
        taken: dict[str, Any] = {
            f.name: getattr(self, f.name)[index] for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        taken["settings"] = {name: value[index] for name, value in self.settings.items()}
        taken["conditioning"] = self.conditioning and self.conditioning.take(index)
        taken["number"] = tuple(self.number[row] for row in keep)
        return replace(self, **taken)

    def padded(self, prompt: int, answer: int) -> Request:
        """The same with lengths rounded up: to a multiple of ``prompt`` by more padding in front, and of ``answer`` by
        longer position tables."""
        width = self.ids.shape[1]
        ids = torch.nn.functional.pad(self.ids, (-width % prompt, 0))
        most = int(self.new_tokens.max())
        return replace(self, ids=ids, reach=ids.shape[1] + most + -most % answer)

    def positions(self, slots: Tensor) -> Tensor:
        """Positions of suffix slots [B, T] in each sequence: [B, T].

        The last wanted token and slots past it have the position before: nothing reads what models say of them.
        """
        return (slots + self.lengths[:, None]).minimum((self.positions_read - 1)[:, None])

    def key_positions(self, capacity: int) -> Tensor:
        """Positions of cached keys [B, P+S], for suffixes of ``capacity`` = S slots.

        In a cache each prompt begins at column 0. Columns past a shorter prompt are UNSEEN.
        """
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        prompt = torch.where(columns < self.lengths[:, None], columns, UNSEEN)
        return torch.cat([prompt, self.lengths[:, None] + torch.arange(capacity, device=self.ids.device)], 1)


UNSEEN = 2**40  # a position after every query, so that no query attends to it
