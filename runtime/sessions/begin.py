"""The beginning of a call, the same for all methods: prompts are read, and the first token is drawn from the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from smc_compile.errors import InputError
from smc_compile.result import Stats
from smc_compile.runtime.algorithms.next_token import NextTokenDistribution
from smc_compile.runtime.algorithms.steering import log_weights, normalised, tempered
from smc_compile.runtime.algorithms.tensors import mark_dynamic
from smc_compile.runtime.algorithms.uniforms import Streams
from smc_compile.runtime.execution.incremental import RuntimeModel
from smc_compile.runtime.execution.memory import require_memory
from smc_compile.runtime.execution.region import Region
from smc_compile.runtime.execution.region_bodies import draw
from smc_compile.runtime.execution.text_processors import TextProcessors
from smc_compile.runtime.sessions.clock import Clock
from smc_compile.runtime.sessions.conditioned import begun_conditioned
from smc_compile.runtime.sessions.ragged_texts import ask
from smc_compile.runtime.sessions.replay import Replay, in_shape, replays
from smc_compile.runtime.sessions.run import Run, first_distribution, require_distribution, steering_of
from smc_compile.runtime.state.particles import CycleState
from smc_compile.runtime.state.population import Population
from smc_compile.runtime.state.request import Request
from smc_compile.runtime.state.settling import Watcher
from smc_compile.runtime.state.suffix_sizes import first_size


@dataclass(frozen=True)
class Method:
    """What the beginning of a call has to know of a method.

    Attributes:
        models: the target and, if there is one, the draft.
        distribution: of the target.
        rows: rows of a request in the models' caches.
        particles: particles of a request; 1 where ``rows`` are chains of one text.
        width: tokens that the target scores at once.
    """

    name: str
    models: Sequence[RuntimeModel]
    distribution: NextTokenDistribution
    text_processors: TextProcessors
    rows: int
    particles: int
    width: int


class Begun(NamedTuple):
    """A run before its first cycle, with what the models make of its prompts."""

    run: Run
    log_p: Tensor  # [B, V], the target's distribution of the first token
    rows: list[Tensor]  # [B, V], of each model


def begin(
    method: Method,
    request: Request,
    regions: Sequence[Region],
    capacity: int,
    cycles: int = 1,
    replay: Replay | None = None,
) -> Begun:
    """Read the prompts and draw the first token of each particle.

    Args:
        regions: those of the session, whose times count from here on.
        capacity: tokens of a text at most.
        cycles: the most cycles that the call can take.
        replay: records cycles where the request allows it; prompts and answers are padded to shapes that others share.

    Raises:
        InputError: when the call does not fit into memory.
        GenerationError: when the target's distribution of the first token is undefined.
    """
    clock, asked = Clock(regions), request
    processors = method.text_processors.of(request)
    if replays(replay, request):
        request, capacity = in_shape(request, capacity)
    require_space(method, request, capacity, replay)
    size = first_size(capacity, request.ids.shape[1])
    rows, contexts, caches = zip(*(model.begin(request, method.rows, size) for model in method.models), strict=True)
    clock.prefilled()

    log_p = first_distribution(rows[0], request, method.distribution, processors)
    require_distribution(log_p, None)
    n, greedy = method.particles, method.distribution.kind == "greedy"
    streams = Streams(request.seeds, n, capacity, cycles)
    state = CycleState.start(request, n, capacity, caches[0], caches[1] if len(caches) > 1 else [])
    drawn_from, mass = first_law(request, log_p)
    first = draw(drawn_from[:, None].expand(-1, n, -1), streams.first(), greedy)  # [B, N]
    state.texts.tokens[:, 0] = first.flatten()
    state.texts.log_p[:, 0] = log_p.gather(1, first).flatten()
    run = Run(
        asked=asked,
        request=request,
        p=Population(n, state, torch.ones(request.batch, dtype=torch.int64)),
        streams=streams,
        contexts=list(contexts),
        keys=mark_dynamic(request.key_positions(size), 1),
        clock=clock,
        stats=Stats(
            method.name,
            int(request.new_tokens.max()),
            rules=processors.report(),
            potentials=list(request.conditioning.names) if request.conditioning else [],
            tables=list(request.conditioning.tables) if request.conditioning else [],
        ),
        text_processors=processors,
        outcomes=[],
        watcher=Watcher(request.watch) if request.watch is not None else None,
    )
    if mass is not None:
        run.p.state = begun_conditioned(run, first, mass)
    if request.stop is not None:
        text = torch.cat([request.ids.repeat_interleave(n, 0), first.view(-1, 1)], 1)
        stopped = ask(request.stop, text, request.rows(n))
        run.p.state = run.p.state._replace(particles=run.p.state.particles._replace(stopped=stopped))
    return Begun(run, log_p, list(rows))


def first_law(request: Request, log_p: Tensor) -> tuple[Tensor, Tensor | None]:
    """The law [B, V] of the first token, and the log of its mass under the target [B] where it is conditioned."""
    if request.conditioning is None:
        return log_p, None
    steering = steering_of(request, request.conditioning.start, request.new_tokens - 1)
    assert steering is not None
    return normalised(tempered(log_p, steering), log_weights(steering, log_p))


def require_space(method: Method, request: Request, capacity: int, replay: Replay | None) -> None:
    """As ``require_memory``, which see; recordings that nobody uses are freed before a call is refused."""
    what = (request, method.rows, capacity, method.width, *method.models)
    try:
        require_memory(*what)
    except InputError:
        if replay is None or not replay.forget():
            raise
        require_memory(*what)
