"""What a call asks for: one prompt, length, seed, end and sampler setting for each request of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Which requests the rows of a text [R, L] belong to, for rules and stops that look at whole texts."""

    request: Tensor  # [R], the place in the caller's batch
    padding: Tensor  # [R], how many tokens in front of the prompt are padding


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
        ends: [B, E] int64, tokens that end a sequence; -1 fills up.
        pad: [B] int64, the token that follows an end.
        settings: what the distribution reads, by name: [B] each.
        number: the place of each request in the caller's batch.
        rules: on the scores, where they run as they are; compiled ones belong to the session.
        stop: ends a sequence by what its text is; it runs on the host.
        max_lag: draw one ancestor for what is older than so many tokens; None never does.
        watch: called with every ``Progress``.
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
    reach: int = 0  # position tables are filled up to this length: requests of one shape then have tables of one

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    def rows(self, n: int) -> Rows:
        """Of n particles a request."""
        request = torch.tensor(self.number, device=self.ids.device).repeat_interleave(n)
        return Rows(request, (self.ids.shape[1] - self.lengths).repeat_interleave(n))

    def take(self, keep: list[int]) -> Request:
        """The requests at these rows."""
        index = torch.tensor(keep, device=self.ids.device)
        taken: dict[str, Any] = {
            f.name: getattr(self, f.name)[index] for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        taken["settings"] = {name: value[index] for name, value in self.settings.items()}
        taken["number"] = tuple(self.number[row] for row in keep)
        return replace(self, **taken)

    def padded(self, prompt: int, answer: int) -> Request:
        """The same with more padding in front, and longer tables, for multiples of so many prompt and new tokens."""
        width = self.ids.shape[1]
        ids = torch.nn.functional.pad(self.ids, (-width % prompt, 0))
        most = int(self.new_tokens.max())
        return replace(self, ids=ids, reach=ids.shape[1] + most + -most % answer)

    def positions(self, slots: Tensor) -> Tensor:
        """Where suffix slots [T] stand in each sequence [B, T].

        Tokens past the cap stay on its last position: nothing reads them.
        """
        return (slots + self.lengths[:, None]).minimum((self.lengths + self.new_tokens - 1)[:, None])

    def key_positions(self, capacity: int) -> Tensor:
        """Where cached keys stand [B, P+S]: prompts begin at column 0 there, and what fills up the shorter ones stands
        later than every query, which hides it."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        prompt = torch.where(columns < self.lengths[:, None], columns, HIDDEN)
        return torch.cat([prompt, self.lengths[:, None] + torch.arange(capacity, device=self.ids.device)], 1)


HIDDEN = 2**40  # a position later than any
