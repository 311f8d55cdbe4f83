"""``model.generate(..., custom_generate=smc_compile.transformers.generate, draft_model=draft)``.

The library prepares the request as always: it merges the generation config, expands ``num_return_sequences`` and builds
the logits processors. These are tensor code on the scores, so they are traced into the target's law like everything
else between logits and draw. What cannot be honoured is refused by name, before any work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from smc_compile.compile import check_prompt, request_seeds
from smc_compile.errors import InputError, OptionError
from smc_compile.generate import Sample, program_for
from smc_compile.options import Options
from smc_compile.result import Generation

# Fields that act through the length, the ids, the end or the output, or that describe the model and not the request.
OURS = (
    "max_length", "max_new_tokens", "do_sample", "eos_token_id", "pad_token_id", "bos_token_id", "num_return_sequences",
    "return_dict_in_generate", "use_cache", "decoder_start_token_id", "token_healing", "transformers_version",
)  # fmt: skip
# Fields that act through a processor or a criterion: one that cannot be honoured is refused by that one's name.
PREPARED = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "suppress_tokens",
    "remove_invalid_values", "renormalize_logits", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "sequence_bias", "min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale",
    "exponential_decay_length_penalty", "begin_suppress_tokens", "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size", "watermarking_config", "max_time", "stop_strings",
)  # fmt: skip
PARTICLES = "a particle is one sampled sequence with a weight; this needs another search"
WHY = {
    "num_beams": PARTICLES,
    "num_beam_groups": PARTICLES,
    "penalty_alpha": PARTICLES,
    "constraints": PARTICLES,
    "force_words_ids": PARTICLES,
    "output_scores": "scores of every step are not kept",
    "output_logits": "logits of every step are not kept",
    "output_attentions": "attention is compiled away",
    "output_hidden_states": "hidden states are compiled away",
    "cache_implementation": "the compiler makes its own cache",
    "prompt_lookup_num_tokens": "the draft model proposes; name it with draft_model=",
}
STOPS = ("MaxLengthCriteria", "EosTokenCriteria")


@dataclass
class SMCOutput(ModelOutput):
    """What ``return_dict_in_generate=True`` returns: the library's ``sequences``, and the population behind them.

    Attributes:
        sequences: [B, P+n] int64, cut after the longest; after its end a sequence is padded.
        particles: [B, N, P+n] int64.
        log_weights: [B, N], unnormalised, since the last resampling.
        log_evidence: [B].
        ess: [B, C], effective sample size at the end of each cycle.
        ancestors: [B, C, N] int64.
    """

    sequences: Tensor | None = None
    particles: Tensor | None = None
    log_weights: Tensor | None = None
    log_evidence: Tensor | None = None
    ess: Tensor | None = None
    ancestors: Tensor | None = None


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
    generation_config: GenerationConfig | None = None,
    *,
    draft_model: Any = None,
    n_particles: int = 8,
    lookahead: int = 6,
    ess_threshold: float = 0.5,
    resampling_method: str = "systematic",
    method: str = "smc",
    draft_temperature: float | None = None,
    seed: int | None = None,
    validate: bool = True,
    compiler: str = "inductor",
    **model_kwargs: Any,
) -> Tensor | SMCOutput:
    """Decode with SMC; pass it as ``custom_generate`` to the ``generate`` method of a transformers model.

    Args:
        draft_model: the draft; with ``do_sample=False`` none is needed (the exact one-token loop runs).
        n_particles, ..., compiler: see ``smc_compile.Options``; ``draft_model`` is its ``draft``.

    Returns:
        sequences [B, P+n], or an ``SMCOutput`` with ``return_dict_in_generate=True``.

    Raises:
        OptionError: for a field of the generation config, a processor or a stopping criterion that is not supported.
        InputError: for prompts of different lengths, and as ``smc_compile.generate``.
    """
    config = generation_config or GenerationConfig()
    check_prompt(input_ids)
    check_config(config)
    check_mask(model_kwargs.get("attention_mask"))
    check_processors(logits_processor, input_ids, config, model)
    eos = single_eos(stopping_criteria)
    options = Options.parse(
        {
            "draft": draft_model,
            "n_particles": n_particles,
            "lookahead": lookahead,
            "ess_threshold": ess_threshold,
            "resampling_method": resampling_method,
            "method": method,
            "draft_temperature": draft_temperature,
            "eos_token_id": eos,
            "seed": seed,
            "validate": validate,
            "compiler": compiler,
        }
    )
    step = ProcessedSample(model, logits_processor, bool(config.do_sample))
    program = program_for(model, step, options, input_ids)
    assert config.max_length is not None  # the library has set it
    result = program.run(input_ids, config.max_length - input_ids.shape[1], request_seeds(options.seed, input_ids))
    return as_output(result, config, eos, input_ids.shape[1])


class ProcessedSample(Sample):
    """The trip of the library's own loop: logits in float32, the processors in order, a draw or the largest."""

    def __init__(self, model: nn.Module, processors: Sequence[Any], do_sample: bool) -> None:
        super().__init__(model, 1.0)
        self.processors, self.do_sample = list(processors), do_sample
        self.law = (do_sample, *(fingerprint(processor) for processor in processors))

    def forward(self, ids: Tensor) -> Tensor:
        scores = self.last(ids).float()
        for processor in self.processors:
            scores = processor(ids, scores)
        if self.do_sample:
            return torch.multinomial(torch.softmax(scores, -1), 1)
        return scores.argmax(-1, keepdim=True)


def fingerprint(processor: Any) -> tuple[Any, ...]:
    """Class and settings of a processor: the library builds new but equal ones at every call."""
    settings = sorted((name, plain(value)) for name, value in vars(processor).items())
    return (type(processor), *settings)


def plain(value: Any) -> str:
    return str(value.tolist()) if isinstance(value, Tensor) else repr(value)


def check_config(config: GenerationConfig) -> None:
    """Refuse every field that asks for something other than the library's default and that nothing here acts on."""
    defaults = GenerationConfig._get_default_generation_params()
    for name, value in vars(config).items():
        if name.startswith("_") or name in OURS or name in PREPARED or not value or value == defaults.get(name):
            continue
        raise OptionError(
            f"{name}={value!r} is not supported with custom_generate=smc_compile.transformers.generate",
            WHY.get(name, "nothing in the compiled loop acts on it, and it would be ignored in silence"),
            f"leave {name} out, or call generate without custom_generate",
        )


def check_mask(mask: Tensor | None) -> None:
    """Prompts of one length only: a mask must keep every token."""
    if mask is not None and not bool(mask.bool().all()):
        raise InputError(
            "prompts of different lengths in one batch are not supported yet",
            f"attention_mask hides {int((~mask.bool()).sum())} tokens",
            "generate for prompts of one length at a time, without padding",
        )


def check_processors(processors: Sequence[Any], ids: Tensor, config: GenerationConfig, model: nn.Module) -> None:
    """Processors must act on the scores alone: try other texts and lengths, and see whether the answer changes."""
    vocab = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    scores = torch.randn(1, vocab, generator=torch.Generator().manual_seed(0)).to(ids.device)
    lengths = {ids.shape[1], ids.shape[1] + 1, ids.shape[1] + 2, (config.max_length or 0) - 1, config.max_length or 0}
    for processor in processors:
        answers = []
        for length in sorted(n for n in lengths if n >= ids.shape[1]):
            texts = (torch.arange(length) % vocab, torch.arange(1, length + 1) % vocab, torch.zeros(length).long())
            answers += [processor(text[None].to(ids.device), scores.clone()) for text in texts]
        if any(not torch.equal(answer, answers[0]) for answer in answers[1:]):
            raise OptionError(
                f"{type(processor).__name__} reads the history, which is not supported yet",
                "its answer changes with the tokens before or with their number",
                "leave the option that adds it out, or write the rule as tensor code on the scores",
            )


def single_eos(criteria: Sequence[Any]) -> int | None:
    """The end-of-sequence token, if the criteria hold one; any other criterion is refused by name."""
    found: list[int] = []
    for criterion in criteria:
        if type(criterion).__name__ not in STOPS:
            raise OptionError(
                f"the stopping criterion {type(criterion).__name__} is not supported yet",
                "sequences end at a token or at a length",
                "stop by eos_token_id, max_new_tokens or max_length",
            )
        found += getattr(criterion, "eos_token_id", torch.tensor([])).flatten().tolist()
    if len(found) > 1:
        raise OptionError("several eos_token_id are not supported yet", f"got {found}", "pass one of them")
    return found[0] if found else None


def as_output(result: Generation, config: GenerationConfig, eos: int | None, prompt: int) -> Tensor | SMCOutput:
    """Sequences as the library returns them: padded after their end, and no longer than the longest."""
    sequences, particles = result.sequences, result.particles
    if eos is not None:
        pad = eos if config.pad_token_id is None else int(config.pad_token_id)
        sequences = padded(sequences, prompt, eos, pad)
        particles = padded(particles, prompt, eos, pad)
        ends = (result.sequences[:, prompt:] == eos).int().cumsum(1) > 1  # after the first end
        sequences = sequences[:, : prompt + int((~ends).sum(1).max())]
    if not config.return_dict_in_generate:
        return sequences
    population = {name: getattr(result, name) for name in ("log_weights", "log_evidence", "ess", "ancestors")}
    return SMCOutput(sequences=sequences, particles=particles, **population)  # type: ignore[call-arg]


def padded(tokens: Tensor, prompt: int, eos: int, pad: int) -> Tensor:
    """``tokens [..., P+n]`` with ``pad`` after the first end of sequence that follows the prompt."""
    new = tokens[..., prompt:]
    after = ((new == eos).int().cumsum(-1) - (new == eos).int()) > 0
    return torch.cat([tokens[..., :prompt], new.masked_fill(after, pad)], -1)
