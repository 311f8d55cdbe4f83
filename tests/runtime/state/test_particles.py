"""What particles carry, and what they have in common, so that a copy moves only what differs."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smc_compile.inputs.requests import build_request
from smc_compile.runtime.algorithms.resampling import keep_survivors
from smc_compile.runtime.state.particles import CycleState, Particles, Texts, Weights, own_and_source, shared_after

WIDTH = 3  # slots that a cycle writes


def grown(caches: Tensor, used: int, generator: torch.Generator) -> Tensor:
    """Every particle writes slots of its own: [B, N, S]."""
    caches = caches.clone()
    caches[:, :, used : used + WIDTH] = torch.rand(*caches.shape[:2], WIDTH, generator=generator)
    return caches


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**31), st.floats(0.1, 1.0))
def test_copies_of_what_differs_are_copies_of_everything(batch, n, seed, often):
    generator = torch.Generator().manual_seed(seed)
    cycles = 12
    part = whole = torch.zeros(batch, n, WIDTH * cycles)
    shared = torch.zeros(batch, n, n, dtype=torch.int64)
    for cycle in range(cycles):
        used = WIDTH * (cycle + 1)
        state = generator.get_state()
        part = grown(part, used - WIDTH, generator)
        generator.set_state(state)
        whole = grown(whole, used - WIDTH, generator)
        drawn = torch.randint(n, (batch, n), generator=generator).sort(-1).values
        resampled = torch.rand(batch, 1, generator=generator) < often
        ancestors = torch.where(resampled, keep_survivors(drawn), torch.arange(n))
        since = own_and_source(shared, ancestors)
        shared = shared_after(shared, ancestors, torch.full((batch,), used))
        whole = whole.gather(1, ancestors[:, :, None].expand_as(whole))
        moved = part.gather(1, ancestors[:, :, None].expand_as(part))
        part = torch.where(torch.arange(part.shape[2]) >= since[:, :, None], moved, part)
        assert torch.equal(part, whole)
    equal = (whole[:, :, None] == whole[:, None]).int().cumprod(-1).sum(-1)  # [B, N, N]
    assert (shared.minimum(torch.tensor(used)) <= equal).all(), "never more than is the same"


def test_after_everybody_descends_from_one_only_later_slots_are_copied():
    shared = shared_after(
        torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64), torch.tensor([10])
    )
    assert (shared == 10).all()
    assert own_and_source(shared, torch.tensor([[0, 1, 1, 3]])).tolist() == [[10, 10, 10, 10]]


def test_what_particles_carry_is_taken_and_overwritten_whole():
    """Every tensor of a state, whatever fields there will be: by row, or by request."""
    request = build_request(torch.tensor([[1, 2], [3, 4], [5, 6]]), 8, torch.tensor([0, 1, 2]))
    n, caches = 2, [torch.arange(6.0)[:, None]]
    state = CycleState.start(request, n, 9, caches, [])
    assert len(state.tensors) == len(Texts._fields) + len(Particles._fields) + len(Weights._fields) + 2
    numbered = state._replace(
        texts=Texts(*(torch.arange(6)[:, None].expand_as(x).to(x.dtype) for x in state.texts)),
        particles=Particles(*(torch.arange(6).to(x.dtype) for x in state.particles)),
        weights=Weights(
            *(torch.arange(3).view(3, *[1] * (x.dim() - 1)).expand_as(x).to(x.dtype) for x in state.weights)
        ),
        generated=torch.arange(3),
    )
    rows = torch.tensor([4, 5, 0, 1])
    taken = numbered.take(torch.tensor([2, 0]), rows)
    for value, whole in zip((*taken.texts, *taken.particles), (*numbered.texts, *numbered.particles), strict=True):
        assert torch.equal(value, whole[rows])
    for value in (*taken.weights, taken.generated):
        assert value.reshape(2, -1)[:, 0].tolist() == [2, 0]
    assert taken.target is caches, "caches are the models' to take"
    state.write(numbered)
    kept, given = ((*s.particles, *s.weights, s.generated) for s in (state, numbered))
    for value, other in zip(kept, given, strict=True):
        assert torch.equal(value, other)
