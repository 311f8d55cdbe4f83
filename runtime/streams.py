"""All uniforms of one call, from the counter-based generator: a value depends on (seed, particle, step) alone."""

from __future__ import annotations

import torch
from torch import Tensor

from . import philox
from .compiled import packed

ATTEMPT = 8  # purposes of the random streams repeat with this period, one set for every try


class Streams:
    """B requests, N particles, ``tokens`` generated tokens and ``cycles`` cycles at most."""

    def __init__(self, seeds: Tensor, n: int, tokens: int, cycles: int) -> None:
        self._seeds, self._n = seeds, n
        self._draft = uniforms(seeds, n, tokens + 1, philox.PROPOSE)  # [B, N, G], indexed by generated token
        self._target = uniforms(seeds, n, tokens + 1, philox.TARGET)
        self._resample = uniforms(seeds, n, max(cycles, 1), philox.RESAMPLE)  # [B, N, C]

    def first(self) -> Tensor:
        """For the first token: [B, N]."""
        return self._target[:, :, 0]

    def cycle(self, start: int, k: int, tries: Tensor) -> tuple[Tensor, Tensor]:
        """For x_{start+1} .. x_{start+k} [R, K] and the bonus [R]; later tries [B] use other streams."""
        draft = self._draft[:, :, start + 1 : start + k + 1]
        bonus = self._target[:, :, start + k + 1]
        if bool((tries > 1).any()):
            steps = torch.arange(start + 1, start + k + 2, device=tries.device)
            later = ATTEMPT * (tries - 1)  # [B]
            draft = philox.uniforms(self._seeds, self._n, steps[:-1], philox.PROPOSE + later)
            bonus = philox.uniforms(self._seeds, self._n, steps[-1:], philox.TARGET + later)
        return draft.flatten(0, 1), packed(bonus.flatten())

    def token(self, made: int) -> Tensor:
        """For generated token number ``made`` of the one-token loop: [R]."""
        return packed(self._target[:, :, made].flatten())

    def resample(self, cycle: int) -> Tensor:
        """For the ancestors of a cycle: [B, N]."""
        return packed(self._resample[:, :, cycle])

    def settle(self, cycle: int) -> Tensor:
        """For the ancestor that is drawn for old tokens: [B]."""
        return self._one(cycle, philox.SETTLE)

    def select(self) -> Tensor:
        """For the particle that becomes the answer: [B]."""
        return self._one(0, philox.SELECT)

    def _one(self, step: int, purpose: int) -> Tensor:
        return philox.uniforms(self._seeds, 1, torch.full((1,), step, device=self._seeds.device), purpose)[:, 0, 0]

    def take(self, keep: Tensor) -> Streams:
        """The streams of these requests."""
        taken = object.__new__(Streams)
        taken._seeds, taken._n = self._seeds[keep], self._n
        taken._draft, taken._target, taken._resample = self._draft[keep], self._target[keep], self._resample[keep]
        return taken


def uniforms(seeds: Tensor, n: int, steps: int, purpose: int) -> Tensor:
    """Uniforms [B, N, steps] for steps 0, 1, ..."""
    return philox.uniforms(seeds, n, torch.arange(steps, device=seeds.device), purpose)


class RejectionStreams:
    """What rejection draws beyond the first token: N chains of K drafted tokens a cycle, ``cycles`` cycles at most."""

    def __init__(self, seeds: Tensor, n: int, k: int, cycles: int) -> None:
        self._k = k
        self._draft = uniforms(seeds, n, cycles * k, philox.PROPOSE)  # [B, N, C*K]
        self._accept = uniforms(seeds, n, cycles * k, philox.ACCEPT)
        self._target = uniforms(seeds, 1, cycles + 1, philox.TARGET)[:, 0]  # [B, C+1]; the first token took step 0

    def draft(self, cycle: int) -> Tensor:
        """For x_1 .. x_K: [R, K]."""
        return self._of(self._draft, cycle).flatten(0, 1)

    def accept(self, cycle: int) -> Tensor:
        """For the acceptance of x_1 .. x_K: [B, N, K]."""
        return self._of(self._accept, cycle)

    def last(self, cycle: int) -> Tensor:
        """For the token behind the accepted ones: [B]."""
        return packed(self._target[:, cycle + 1])

    def take(self, keep: Tensor) -> RejectionStreams:
        """The streams of these requests."""
        taken = object.__new__(RejectionStreams)
        taken._k = self._k
        taken._draft, taken._accept, taken._target = self._draft[keep], self._accept[keep], self._target[keep]
        return taken

    def _of(self, values: Tensor, cycle: int) -> Tensor:
        return values[:, :, cycle * self._k : (cycle + 1) * self._k]
