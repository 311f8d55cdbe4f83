"""The uniforms of one call, from the counter-based generator: each depends on (seed, particle, step, purpose) alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smc_compile.runtime.algorithms import philox
from smc_compile.runtime.algorithms.tensors import packed

ATTEMPT = 8  # added to a purpose for each further try of a cycle; more than there are purposes


class Streams:
    """Uniforms of B requests with N particles each, for at most ``tokens`` generated tokens and ``cycles`` cycles."""

    def __init__(self, seeds: Tensor, n: int, tokens: int, cycles: int) -> None:
        self.seeds, self._n = seeds, n
        self._draft = uniforms(seeds, n, tokens + 1, philox.PROPOSE)  # [B, N, G], indexed by generated token
        self._target = uniforms(seeds, n, tokens + 1, philox.TARGET)
        self._resample = uniforms(seeds, n, max(cycles, 1), philox.RESAMPLE)  # [B, N, C]

    def first(self) -> Tensor:
        """For the first token: [B, N]."""
        return self._target[:, :, 0]

    def cycle(self, start: int, k: int, tries: Tensor) -> tuple[Tensor, Tensor]:
        """For generated tokens start+1 .. start+k [R, K] and the bonus after them [R].

        tries: [B], from 1; each try has other uniforms.
        """
        draft = self._draft[:, :, start + 1 : start + k + 1]
        bonus = self._target[:, :, start + k + 1]
        if bool((tries > 1).any()):
            steps = torch.arange(start + 1, start + k + 2, device=tries.device)
            later = ATTEMPT * (tries - 1)  # [B]
            draft = philox.uniforms(self.seeds, self._n, steps[:-1], philox.PROPOSE + later)
            bonus = philox.uniforms(self.seeds, self._n, steps[-1:], philox.TARGET + later)
        return draft.flatten(0, 1), packed(bonus.flatten())

    def token(self, generated: int) -> Tensor:
        """For generated token number ``generated``, when tokens are drawn one by one: [R]."""
        return packed(self._target[:, :, generated].flatten())

    def resample(self, cycle: int) -> Tensor:
        """For the ancestors of a cycle: [B, N]."""
        return packed(self._resample[:, :, cycle])

    def settle(self, cycle: int) -> Tensor:
        """For the ancestor that is drawn for old tokens (see ``settle_old``): [B]."""
        return self._one(cycle, philox.SETTLE)

    def select(self) -> Tensor:
        """For the particle that becomes the answer: [B]."""
        return self._one(0, philox.SELECT)

    def _one(self, step: int, purpose: int) -> Tensor:
        return philox.uniforms(self.seeds, 1, torch.full((1,), step, device=self.seeds.device), purpose)[:, 0, 0]

    def take(self, keep: Tensor) -> Streams:
        """The streams of these requests."""
        taken = object.__new__(Streams)
        taken.seeds, taken._n = self.seeds[keep], self._n
        taken._draft, taken._target, taken._resample = self._draft[keep], self._target[keep], self._resample[keep]
        return taken


def of_cycle(n: int, k: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A function with the values of ``Streams`` for one cycle, whose number is a tensor: for recorded graphs."""

    def cycle_uniforms(seeds: Tensor, generated: Tensor, cycle: Tensor, tries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For x_1 .. x_K [R, K], the bonus [R] and the ancestors [B, N]. seeds, tries: [B]; generated, cycle: []."""
        steps, later = generated + torch.arange(k + 1, device=seeds.device), ATTEMPT * (tries - 1)
        draft = philox.uniforms(seeds, n, steps[:-1], philox.PROPOSE + later)
        bonus = philox.uniforms(seeds, n, steps[-1:], philox.TARGET + later)
        ancestors = philox.uniforms(seeds, n, cycle[None], philox.RESAMPLE)
        return draft.flatten(0, 1), bonus.flatten(), ancestors[:, :, 0].contiguous()

    return cycle_uniforms


def of_token(seeds: Tensor, generated: Tensor) -> Tensor:
    """As ``Streams.token`` for one particle, where the token's number ``generated`` [] is a tensor: [B]."""
    return philox.uniforms(seeds, 1, generated[None], philox.TARGET).flatten()


def uniforms(seeds: Tensor, n: int, steps: int, purpose: int) -> Tensor:
    """Uniforms [B, N, steps] for steps 0, 1, ..."""
    return philox.uniforms(seeds, n, torch.arange(steps, device=seeds.device), purpose)


class RejectionStreams:
    """Uniforms of speculation by rejection, after the first token: N chains of K tokens a cycle.

    There are at most ``cycles`` cycles.
    """

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
        """For the token after the accepted ones: [B]."""
        return packed(self._target[:, cycle + 1])

    def take(self, keep: Tensor) -> RejectionStreams:
        """The streams of these requests."""
        taken = object.__new__(RejectionStreams)
        taken._k = self._k
        taken._draft, taken._accept, taken._target = self._draft[keep], self._accept[keep], self._target[keep]
        return taken

    def _of(self, values: Tensor, cycle: int) -> Tensor:
        return values[:, :, cycle * self._k : (cycle + 1) * self._k]
