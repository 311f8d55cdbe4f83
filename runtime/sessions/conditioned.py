"""What the host does in a call whose texts are conditioned: it follows guides, and asks critics.

Where automata alone weigh a text, compiled regions do all of it, and nothing here has anything to do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smc_compile.runtime.algorithms.automata import after_token
from smc_compile.runtime.execution.region_bodies import Chosen, Judged
from smc_compile.runtime.sessions.run import Run
from smc_compile.runtime.state.conditioning import WrittenText
from smc_compile.runtime.state.particles import CycleState, Particles
from smc_compile.runtime.state.region_types import is_eos


def state_behind(run: Run, before: Tensor, drawn: Chosen, wanted: Tensor) -> Tensor:
    """The states [R] behind tokens that were drawn in states ``before``; as they were where a token does not count:
    behind an end, or not ``wanted`` [R]."""
    given = run.request.conditioning
    if given is None or drawn.state is None:
        return before
    if given.guide is None:
        return drawn.state
    return given.guide.after(before, drawn.token, ~drawn.ended & wanted)


def begun_conditioned(run: Run, first: Tensor, mass: Tensor) -> CycleState:
    """The particles behind their first tokens [B, N], which hold a mass [B]; those of a request without any have ended
    before them."""
    given, state, n = run.request.conditioning, run.p.state, first.shape[1]
    assert given is not None
    lost = (mass == -math.inf).repeat_interleave(n)
    states, tokens = given.start.repeat_interleave(n), first.flatten()
    if given.automaton is not None:
        states = after_token(given.automaton, states, tokens)
    if given.guide is not None:
        states = given.guide.after(states, tokens, ~lost)
    particles = state.particles._replace(
        automaton=states,
        ended=state.particles.ended | lost,
        length=torch.where(lost, 0, state.particles.length),
    )
    added, critic = weights_of_texts(run, state.texts.tokens, states, particles.critic, (~lost).long(), ~lost)
    log_w = mass.double()[:, None] + added.view(-1, n)
    return state._replace(
        particles=particles._replace(critic=critic), weights=state.weights._replace(log_w=log_w.contiguous())
    )


def conditioned(
    run: Run, judged: Judged, states: Tensor, tokens: Tensor, particles: Particles, generated: Tensor
) -> Judged:
    """What guides and critics make of a block.

    Args:
        states: [R, K+1], of a guide behind x_0 .. x_K.
        tokens: [R, capacity], the texts with the block.
        generated: [B], tokens before the block.
    """
    given = run.request.conditioning
    if given is None or not given.from_host:
        return judged
    n, remaining = len(tokens) // len(generated), run.remaining(generated)
    place = torch.arange(states.shape[1], device=states.device)
    width = judged.width.repeat_interleave(n)[:, None]
    counted = (~judged.over & (place < remaining[:, None]) & (place < width)).sum(1)  # [R], tokens of the block
    state = judged.state
    if given.guide is not None:
        state = states.gather(1, width - 1)[:, 0]
        last = judged.tokens.gather(1, width - 1)[:, 0]
        state = given.guide.after(state, last, counted == width[:, 0])
    assert state is not None
    length = generated.repeat_interleave(n) + counted
    added, critic = weights_of_texts(run, tokens, state, particles.critic, length, counted > 0)
    if given.guide is not None:
        given.guide.keep(torch.cat([state, particles.automaton]))
    return judged._replace(state=state, critic=critic, increments=judged.increments + added)


def weights_of_texts(
    run: Run, tokens: Tensor, states: Tensor, critic: Tensor, length: Tensor, grown: Tensor
) -> tuple[Tensor, Tensor]:
    """What texts that have ``grown`` [R] weigh more than before, and what critics give them: [R] float64 each.

    Args:
        tokens: [R, capacity], of which ``length`` [R] count.
        states: [R], of a guide behind them.
        critic: [R], what they were given before.
    """
    given, request = run.request.conditioning, run.request
    assert given is not None
    ended = is_eos(tokens.gather(1, (length - 1).clamp_min(0)[:, None]), run.eos_ids)[:, 0]
    full = length == request.new_tokens.repeat_interleave(len(tokens) // request.batch)
    due = full & ~ended & grown & (given.slack == 0)  # [R]: must be whole, without an end token
    added = torch.zeros_like(critic)
    if given.guide is not None and due.any():
        added[due] = given.guide.ends(states[due])
    if given.critic is None:
        return added, critic
    asked = (grown & (critic > -math.inf)).nonzero()[:, 0]
    texts = [
        WrittenText(request.number[row * request.batch // len(tokens)], tokens[row, :size].tolist(), whole)
        for row, size, whole in zip(
            asked.tolist(), (length - ended.long())[asked].tolist(), (ended | due)[asked].tolist(), strict=True
        )
    ]
    told = torch.tensor(given.critic(texts), dtype=torch.float64, device=critic.device)
    return added.index_add(0, asked, told - critic[asked]), critic.index_copy(0, asked, told)
