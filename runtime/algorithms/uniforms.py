"""The uniforms of one call, from the counter-based generator: each depends on (seed, particle, step, purpose) alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smc_compile.runtime.algorithms import philox
from smc_compile.runtime.algorithms.philox import ACCEPT, CHAIN, PROPOSE, RESAMPLE, REST, SELECT, SETTLE, TARGET
from smc_compile.runtime.algorithms.tensors import packed

AGAIN = 8  # added to a purpose after each block that was dropped for what was drafted; more than there are purposes


class Streams:
    """Uniforms of B requests with N particles each, for at most ``tokens`` generated tokens and ``cycles`` cycles."""

    def __init__(self, seeds: Tensor, n: int, tokens: int, cycles: int) -> None:
        self.seeds, self._n = seeds, n
        self._draft = uniforms(seeds, n, tokens + 1, PROPOSE)  # [B, N, G], indexed by generated token
        self._target = uniforms(seeds, n, tokens + 1, TARGET)
        self._resample = uniforms(seeds, n, max(cycles, 1), RESAMPLE)  # [B, N, C]

    def first(self) -> Tensor:
        """For the first token: [B, N]."""
        return self._target[:, :, 0]

    def cycle(self, generated: Tensor, k: int, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """For K drafted tokens behind the ``generated`` [B] ones [R, K], and for the target's token behind 0 .. K of
        them [R, K+1].

        A token that is cut off leaves its uniform to the next one in its place, since no decision has read it. After
        a block was ``dropped`` [B] for what it held, all uniforms are others.
        """
        steps = generated[:, None] + torch.arange(k + 1, device=generated.device)  # [B, K+1]
        if bool(dropped.any()):
            drawn = (philox.uniforms(self.seeds, self._n, steps, p + AGAIN * dropped) for p in (PROPOSE, TARGET))
            draft, target = (values.flatten(0, 1) for values in drawn)
            return draft[:, :k], target
        draft, target = (
            values.gather(2, steps[:, None].expand(-1, self._n, -1)).flatten(0, 1)
            for values in (self._draft, self._target)
        )
        return draft[:, :k], target

    def token(self, generated: Tensor) -> Tensor:
        """For the token behind the ``generated`` [B] ones, when tokens are drawn one by one: [R]."""
        return packed(self.cycle(generated, 0, torch.zeros_like(generated))[1][:, 0])

    def resample(self, cycle: int) -> Tensor:
        """For the ancestors of a cycle: [B, N]."""
        return packed(self._resample[:, :, cycle])

    def settle(self, cycle: int) -> Tensor:
        """For the ancestor that is drawn for old tokens (see ``settle_old``): [B]."""
        return self._one(cycle, SETTLE)

    def select(self) -> Tensor:
        """For the particle that becomes the answer: [B]."""
        return self._one(0, SELECT)

    def choose(self, cycle: int) -> Tensor:
        """For the particle that alone goes on after so many cycles, at least one: [B]."""
        return self._one(cycle, SELECT)

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

    def cycle_uniforms(
        seeds: Tensor, generated: Tensor, dropped: Tensor, cycle: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For x_1 .. x_K [R, K], the target's tokens [R, K+1] and the ancestors [B, N].

        seeds, generated, dropped: [B]; cycle: [].
        """
        steps, later = generated[:, None] + torch.arange(k + 1, device=seeds.device), AGAIN * dropped
        draft = philox.uniforms(seeds, n, steps[:, :-1], PROPOSE + later)
        target = philox.uniforms(seeds, n, steps, TARGET + later)
        ancestors = philox.uniforms(seeds, n, cycle[None], RESAMPLE)
        return draft.flatten(0, 1), target.flatten(0, 1), ancestors[:, :, 0].contiguous()

    return cycle_uniforms


def of_token(seeds: Tensor, generated: Tensor) -> Tensor:
    """As ``Streams.token`` for one particle, for recorded graphs. seeds, generated: [B] -> [B]."""
    return philox.uniforms(seeds, 1, generated[:, None], TARGET).flatten()


def uniforms(seeds: Tensor, n: int, steps: int, purpose: int) -> Tensor:
    """Uniforms [B, N, steps] for steps 0, 1, ..."""
    return philox.uniforms(seeds, n, torch.arange(steps, device=seeds.device), purpose)


class RejectionStreams:
    """Uniforms of speculation by rejection, after the first token: N chains of K tokens a cycle.

    There are at most ``cycles`` cycles.
    """

    def __init__(self, seeds: Tensor, n: int, k: int, cycles: int) -> None:
        self._k = k
        self._draft = uniforms(seeds, n, cycles * k, CHAIN)  # [B, N, C*K]
        self._accept = uniforms(seeds, n, cycles * k, ACCEPT)
        self._rest = uniforms(seeds, 1, cycles, REST)[:, 0]  # [B, C]

    def draft(self, cycle: int) -> Tensor:
        """For x_1 .. x_K: [R, K]."""
        return self._of(self._draft, cycle).flatten(0, 1)

    def accept(self, cycle: int) -> Tensor:
        """For the acceptance of x_1 .. x_K: [B, N, K]."""
        return self._of(self._accept, cycle)

    def last(self, cycle: int) -> Tensor:
        """For the token after the accepted ones: [B]."""
        return packed(self._rest[:, cycle])

    def take(self, keep: Tensor) -> RejectionStreams:
        """The streams of these requests."""
        taken = object.__new__(RejectionStreams)
        taken._k = self._k
        taken._draft, taken._accept, taken._rest = self._draft[keep], self._accept[keep], self._rest[keep]
        return taken

    def _of(self, values: Tensor, cycle: int) -> Tensor:
        return values[:, :, cycle * self._k : (cycle + 1) * self._k]
