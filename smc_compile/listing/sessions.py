"""Sessions on a random pair, run to see which regions there are and what they are called with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smc_compile.generate import program_for
from smc_compile.llama import Llama, LlamaConfig
from smc_compile.options import Options
from smc_compile.processors import sort_processors
from smc_compile.requests import build_request, settings_of

from .record import BACKEND, Recorded, recording

ESS_THRESHOLD = 0.9  # a constant of the kernels: most cycles resample, so that results show it, and some do not
CYCLES = 3  # of a session at least: the first cycle differs from later ones


@dataclass(frozen=True)
class Pair:
    """What is compiled: the models' shapes, the method, the law and the request."""

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


def record_sessions(pair: Pair, sessions: int, seed: int) -> list[Recorded]:
    """Run some sessions, each with its own prompt, prompt length, number of tokens and seed. Regions run eagerly."""
    torch.manual_seed(seed)
    target, draft = (_random_model(config, pair.dtype) for config in (pair.target, pair.draft))
    asked = {"temperature": pair.temperature, "top_k": pair.top_k, "top_p": pair.top_p}
    settings = settings_of(1, **asked)
    options = Options(
        draft=draft,
        n_particles=pair.n_particles,
        lookahead=pair.lookahead,
        method=pair.method,
        ess_threshold=ESS_THRESHOLD,
        compiler=BACKEND,
        validate=False,
    )
    processors = sort_processors([], list(settings), pair.target.vocab_size, device=torch.device("cpu"))
    with recording(seed) as record:
        for session in range(sessions):
            extra = int(torch.randint(pair.prompt_length, ())) if session else 0
            cycles = CYCLES + (int(torch.randint(CYCLES + 1, ())) if session else 0)
            ids = torch.randint(pair.target.vocab_size, (1, pair.prompt_length + extra))
            new_tokens = cycles * (pair.lookahead + 1) + 1
            request = build_request(ids, new_tokens, torch.tensor([seed + session]), settings=settings)
            record.new_session()
            program_for(target, processors, False, options, ids).answer(request)
            record.end_session()
    return record.found


def _random_model(config: LlamaConfig, dtype: torch.dtype) -> Llama:
    """Logits of a standard deviation of one half, which do not favour the token that was read although embeddings are
    tied: models that disagree, so that truncation cuts, weights degenerate and particles are resampled."""
    model = Llama(config)
    torch.nn.init.normal_(model.embedding.weight, std=0.5 * config.dim**-0.5)
    torch.nn.init.normal_(model.norm.weight)
    return model.to(dtype).eval().requires_grad_(False)
