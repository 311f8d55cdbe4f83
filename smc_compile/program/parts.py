"""Loops whose iterations are not all alike: each part is a program, and its prompt is the text so far.

    if i < 3: logits[:, end] = -inf        iterations 0 to 2 are one part, the others another

Between two parts a population is drawn down to one text, in proportion to the weights. That changes no law: a text that
stands for its population, with the evidence as its weight, is what sequential Monte Carlo calls properly weighted
(Naesseth, Lindsten & Schön, 2019, ch. 4), and the product of the parts' evidences estimates that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smc_compile.inputs.requests import request_seeds
from smc_compile.options import Options
from smc_compile.passes.loop.recover import DecodeLoop
from smc_compile.program.from_loop import LoopProgram, loop_outputs, prompt_of
from smc_compile.program.program import Program
from smc_compile.result import Generation, Stats
from smc_compile.runtime.state.request import Request

_STRIDE = 2**40  # between the seeds of two parts: more than a batch has requests


@dataclass(frozen=True)
class _Answer:
    """What one part has drawn.

    Attributes:
        ended: [B] bool, whether a text had ended before.
    """

    request: Request
    generation: Generation
    ended: Tensor


def answer_in_parts(
    programs: Sequence[LoopProgram],
    loop: DecodeLoop,
    arguments: Sequence[Any],
    options: Options,
    answer: Callable[[Program, Request], Generation],
) -> tuple[tuple[Tensor | None, ...], Generation]:
    """What the graph of a loop returns, and the generation behind it.

    Args:
        programs: one for each of the loop's parts.
        arguments: those of its graph.
        answer: how a program answers a request.

    Raises:
        OptionError, InputError, GenerationError: as ``smc_compile.generate``.
    """
    given, prompt = list(arguments), prompt_of(loop, arguments)
    seeds = request_seeds(options.seed, prompt)
    answers: list[_Answer] = []
    ended = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    text = prompt
    for number, (program, part) in enumerate(zip(programs, loop.parts, strict=True)):
        given[loop.prompt_index] = text if arguments[loop.prompt_index].dim() == 2 else text[0]
        request = program.request(part, given, part.iterations, options, _seeds_of_part(seeds, number))
        result = answer(program.program, request)
        answers.append(_Answer(request, result, ended))
        text = result.sequences
        ended = ended | _has_ended(request, result)
        if bool(ended.all()):
            break
    whole = joined(answers, prompt, loop.iterations)
    return loop_outputs(loop, arguments, whole.sequences), whole


def _seeds_of_part(seeds: Tensor, part: int) -> Tensor:
    """[B]: the draws of one part are not those of another."""
    return seeds + part * _STRIDE  # 64 bits wrap around


def _has_ended(request: Request, result: Generation) -> Tensor:
    """[B] bool: whether the text that was drawn ends with an end token."""
    at = request.ids.shape[1] + result.new_lengths - 1
    last = result.sequences.gather(1, at[:, None])  # [B, 1]
    return (last == request.eos_ids).any(1)


def joined(answers: Sequence[_Answer], prompt: Tensor, new_tokens: int) -> Generation:
    """The generations of the parts as one of so many ``new_tokens``. What is drawn behind the end of a text is padding.

    The particles are those of the last part, which share the text before it.
    """
    last, ended, pad = answers[-1].generation, answers[-1].ended, answers[-1].request.pad
    start, missing = prompt.shape[1], new_tokens + prompt.shape[1] - last.sequences.shape[1]
    log_probs = torch.cat([a.generation.log_probs.masked_fill(a.ended[:, None], 0.0) for a in answers], 1)
    before = log_probs[:, : log_probs.shape[1] - last.log_probs.shape[1], None]  # [B, n', 1], of the earlier parts
    inside = last.particle_log_probs.masked_fill(ended[:, None, None], 0.0)  # [B, N, n'']
    of_particles = torch.cat([before.movedim(1, 2).expand(-1, inside.shape[1], -1), inside], 2)
    lengths = torch.stack([a.generation.new_lengths.masked_fill(a.ended, 0) for a in answers])  # [parts, B]
    sequences = F.pad(last.sequences, (0, missing))  # [B, P+n]
    particles = F.pad(last.particles, (0, missing))  # [B, N, P+n]
    behind = torch.arange(new_tokens, device=prompt.device) >= lengths.sum(0)[:, None]  # [B, n]
    sequences[:, start:] = torch.where(behind, pad[:, None], sequences[:, start:])
    unwanted = behind & ended[:, None]  # by a last part that other texts needed
    unwanted[:, new_tokens - missing :] = True
    particles[:, :, start:] = torch.where(unwanted[:, None], pad[:, None, None], particles[:, :, start:])
    own_lengths = last.particle_lengths.masked_fill(ended[:, None], 0)
    evidences = torch.stack([a.generation.log_evidence.masked_fill(a.ended, 0.0) for a in answers])
    return replace(
        last,
        sequences=sequences,
        particles=particles,
        log_weights=last.log_weights.masked_fill(ended[:, None], 0.0),
        log_evidence=evidences.sum(0),
        dropped=torch.stack([a.generation.dropped.masked_fill(a.ended, 0) for a in answers]).sum(0),
        ess=torch.cat([a.generation.ess.masked_fill(a.ended[:, None], torch.nan) for a in answers], 1),
        widths=torch.cat([a.generation.widths.masked_fill(a.ended[:, None], 0) for a in answers], 1),
        ancestors=_side_by_side([a.generation.ancestors for a in answers]),
        log_probs=F.pad(log_probs, (0, missing)),
        new_lengths=lengths.sum(0),
        particle_log_probs=F.pad(of_particles, (0, missing)),
        particle_lengths=own_lengths + lengths[:-1].sum(0)[:, None],
        lag=torch.cat([a.generation.lag for a in answers], 1),
        stats=_joined_stats([a.generation.stats for a in answers]),
    )


def _side_by_side(ancestors: Sequence[Tensor]) -> Tensor:
    """[B, C, N] of all cycles. Where fewer particles were chosen for a part, the others descend from themselves."""
    most = max(a.shape[2] for a in ancestors)
    wide = [torch.arange(most, device=a.device).expand(*a.shape[:2], -1).clone() for a in ancestors]
    for whole, part in zip(wide, ancestors, strict=True):
        whole[:, :, : part.shape[2]] = part
    return torch.cat(wide, 1)


_SUMMED = [f.name for f in fields(Stats) if f.type in ("int", "float")]


def _joined_stats(parts: Sequence[Stats]) -> Stats:
    """Counts and seconds of all parts together; N and K of the last one; accepted tokens by the cycle."""
    last, cycles = parts[-1], max(1, sum(part.cycles for part in parts))
    total: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in _SUMMED}
    total |= {"n_particles": last.n_particles, "lookahead": last.lookahead}
    total["accepted"] = sum(part.accepted * part.cycles for part in parts) / cycles
    total |= {name: list(dict.fromkeys(x for p in parts for x in getattr(p, name))) for name in ("warnings", "rules")}
    return replace(last, **total)
