"""Run sessions on a random pair, and record their regions with arguments that they are called with."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch

from smc_compile.dev.kernel_audit.graph_recorder import BACKEND, GraphRecorder, RecordedGraph, recording
from smc_compile.inputs.processors import sort_processors
from smc_compile.inputs.requests import build_request, settings_of
from smc_compile.options import Options
from smc_compile.pairs.llama import Llama, LlamaConfig
from smc_compile.program.from_model import program_for

ESS_THRESHOLD = 0.9  # a constant of the kernels: most cycles resample, so that results show it, and some do not
CYCLES = 3  # of a session at least: the first cycle differs from later ones
CPU = torch.device("cpu")
TIED = 16  # tokens whose logits are nearly equal, in the session of near ties


@dataclass(frozen=True)
class AuditedPair:
    """What is audited: shapes of both models, method, distribution and request."""

    target: LlamaConfig
    draft: LlamaConfig
    method: str
    n_particles: int
    lookahead: int
    prompt_length: int
    temperature: float
    top_k: int
    top_p: float
    dtype: torch.dtype


def positions(prompt_length: int, lookahead: int) -> int:
    """The longest text of any session."""
    return 2 * prompt_length + (2 * CYCLES + 1) * (lookahead + 1)


def record_sessions(
    pair: AuditedPair, sessions: int, seed: int, replayed: bool = False, device: torch.device = CPU
) -> list[RecordedGraph]:
    """Run some sessions, each with its own prompt, prompt length, number of tokens and seed. Regions run eagerly, on
    ``device``; with ``replayed`` those of cycles that a GPU records and replays.

    Regions of speculative decoding are handed the target's rows. Where they cut them by top-k, in one more session the
    cut goes through nearly equal logits: otherwise the last bits of its threshold, which a kernel of their own may
    find, decide nothing. Under SMC the model stands in the region that cuts, and its rounding would decide instead.
    """
    torch.manual_seed(seed)
    target, draft = (random_model(config, pair.dtype).to(device) for config in (pair.target, pair.draft))
    with recording(seed) as record:
        for session in range(sessions):
            extra = int(torch.randint(pair.prompt_length, ())) if session else 0
            cycles = CYCLES + (int(torch.randint(CYCLES + 1, ())) if session else 0)
            _run_session(record, pair, target, draft, seed + session, extra, cycles, replayed)
        if pair.method == "speculative" and pair.top_k:
            _run_session(record, cutting_near_ties(pair), with_near_ties(target), draft, seed + sessions, 0, CYCLES)
    return record.found


def _run_session(
    record: GraphRecorder,
    pair: AuditedPair,
    target: Llama,
    draft: Llama,
    seed: int,
    extra: int,
    cycles: int,
    replayed: bool = False,
) -> None:
    """Generate for so many ``cycles`` of whole blocks, from a prompt ``extra`` tokens longer than the shortest."""
    settings = settings_of(1, temperature=pair.temperature, top_k=pair.top_k, top_p=pair.top_p)
    options = Options(
        draft=draft,
        n_particles=pair.n_particles,
        lookahead=pair.lookahead,
        method=pair.method,
        ess_threshold=ESS_THRESHOLD,
        compiler=BACKEND,
        validate=False,
    )
    device = target.embedding.weight.device
    processors = sort_processors([], list(settings), pair.target.vocab_size, device=device)
    ids = torch.randint(pair.target.vocab_size, (1, pair.prompt_length + extra)).to(device)
    new_tokens = cycles * (pair.lookahead + 1) + 1
    request = build_request(ids, new_tokens, torch.tensor([seed]), settings=settings)
    record.new_session()
    program = program_for(target, processors, False, options, ids)
    program.record = run_again if replayed else None
    program.answer(request)
    record.end_session()


def run_again(work: Callable[[], None]) -> Callable[[], None]:
    """What stands in for a recording where there is no GPU: the cycle itself."""
    return work


def with_near_ties(model: Llama) -> Llama:
    """A copy in which tokens come in groups of ``TIED``, whose logits differ in their last bits only: dense enough that
    most numbers between the least and the largest of a group are some token's."""
    copy = deepcopy(model)
    weight = copy.embedding.weight.data  # [V, D]
    count, step = len(weight) // TIED, torch.finfo(weight.dtype).eps / 2
    for i in range(1, TIED):
        weight[i * count : (i + 1) * count] = weight[:count].double() * (1 + i * step)
    return copy


def cutting_near_ties(pair: AuditedPair) -> AuditedPair:
    """Top-k cuts in the middle of a group. Top-p keeps all that it is given: it compares sums of probabilities, and the
    order of those that are nearly tied is a matter of rounding."""
    return replace(pair, top_k=pair.top_k // TIED * TIED + TIED // 2, top_p=max(pair.top_p, 1 - 1e-12))


def random_model(config: LlamaConfig, dtype: torch.dtype) -> Llama:
    """Logits of a standard deviation of one half, which do not favour the token that was read although embeddings are
    tied: models that disagree, so that truncation cuts, weights degenerate and particles are resampled."""
    model = Llama(config)
    torch.nn.init.normal_(model.embedding.weight, std=0.5 * config.dim**-0.5)
    torch.nn.init.normal_(model.norm.weight)
    return model.to(dtype).eval().requires_grad_(False)
