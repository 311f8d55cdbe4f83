"""``model.generate(..., custom_generate=smc_compile.transformers.generate, draft_model=draft)``.

The library prepares the request as always: it merges the generation config, expands ``num_return_sequences`` and builds
the logits processors and stopping criteria. Processors that are tensor code on the scores go into the target's compiled
distribution; those that read the text apply to every particle, on target and draft; criteria are asked after every token. What
cannot be honoured is refused by name, before any work.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StopStringCriteria

from smc_compile.auto.choice import settled
from smc_compile.errors import OptionError
from smc_compile.generate import IN_CONFIG
from smc_compile.inputs.processors import sort_processors
from smc_compile.inputs.requests import (
    build_request,
    check_prompt,
    checked_lag,
    request_seeds,
    settings_of,
    single_seed,
)
from smc_compile.inputs.stopping import any_stop, criteria_stop
from smc_compile.inputs.streaming import watch_for
from smc_compile.options import Options
from smc_compile.program.from_model import program_for, vocabulary
from smc_compile.program.model_calls import logits_of
from smc_compile.result import Generation

# Fields that act through the length, the ids, the end or the output, or that describe the model and not the request.
OURS = (
    "max_length", "max_new_tokens", "do_sample", "eos_token_id", "pad_token_id", "bos_token_id", "num_return_sequences",
    "return_dict_in_generate", "output_scores", "output_logits", "use_cache", "decoder_start_token_id", "token_healing",
    "transformers_version",
)  # fmt: skip
# Fields that act through a processor or a criterion: one that cannot be honoured is refused by that one's name.
PREPARED = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "suppress_tokens",
    "remove_invalid_values", "renormalize_logits", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "sequence_bias", "min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "begin_suppress_tokens", "watermarking_config", "max_time", "stop_strings",
)  # fmt: skip
PARTICLES = "a particle is one sampled sequence with a weight; this needs another search"
BY_ROW = "it keeps something for each row of the batch, and particles change rows"
WHY = {
    "guidance_scale": BY_ROW,
    "encoder_repetition_penalty": BY_ROW,
    "encoder_no_repeat_ngram_size": BY_ROW,
    "num_beams": PARTICLES,
    "num_beam_groups": PARTICLES,
    "penalty_alpha": PARTICLES,
    "constraints": PARTICLES,
    "force_words_ids": PARTICLES,
    "output_attentions": "attention is compiled away",
    "output_hidden_states": "hidden states are compiled away",
    "cache_implementation": "the compiler makes its own cache",
    "prompt_lookup_num_tokens": "the draft model proposes; name it with draft_model=",
}
# Warpers whose numbers may differ from call to call without recompiling: the class, and its attribute, which is also
# the name of the setting. The library puts them behind all other processors, in the order in which settings apply.
WARPERS = {
    "TemperatureLogitsWarper": "temperature",
    "TopKLogitsWarper": "top_k",
    "TopPLogitsWarper": "top_p",
    "MinPLogitsWarper": "min_p",
}


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
    generation_config: GenerationConfig | None = None,
    *,
    draft_model: Any = None,
    n_particles: int | str = 8,
    lookahead: int | str = 6,
    ess_floor: float | None = None,
    time_budget: float | None = None,
    ess_threshold: float = 0.5,
    resampling_method: str = "systematic",
    method: str = "smc",
    draft_temperature: float | None = None,
    seed: Any = None,
    validate: bool = True,
    cuda_graph: bool = True,
    compiler: str = "inductor",
    token_streamer: Any = None,
    stream: str = "settled",
    max_lag: int | None = None,
    return_particles: bool = False,
    **model_kwargs: Any,
) -> Tensor | Generation:
    """Decode with SMC, or exactly (``method``); pass it as ``custom_generate`` to a transformers model's ``generate``.

    Args:
        draft_model: the draft; with ``do_sample=False`` none is needed (the exact one-token loop runs), and one that
            is given speeds the same text up.
        n_particles, ..., compiler: see ``smc_compile.Options``; ``draft_model`` is its ``draft``.
        token_streamer, stream, max_lag: see ``smc_compile.generate``; the library does not hand ``streamer`` on.
        return_particles: return the whole weighted population, as ``return_dict_in_generate`` does.

    Returns:
        sequences [B, P+n], or a ``Generation`` with ``return_dict_in_generate=True``: with ``output_logits`` or
        ``output_scores`` it holds those of the sequences, a tuple of [B, V] for each new token.

    Raises:
        OptionError: for a field of the generation config that is not supported.
        InputError, GenerationError: as ``smc_compile.generate``.
    """
    config = generation_config or GenerationConfig()
    check_prompt(input_ids)
    check_config(config)
    options = Options.parse(
        {
            "draft": draft_model,
            "n_particles": n_particles,
            "lookahead": lookahead,
            "ess_floor": ess_floor,
            "time_budget": time_budget,
            "ess_threshold": ess_threshold,
            "resampling_method": resampling_method,
            "method": method,
            "draft_temperature": draft_temperature,
            "seed": single_seed(seed),
            "validate": validate,
            "cuda_graph": cuda_graph,
            "compiler": compiler,
        }
    )
    before, given, after = split_warpers(logits_processor)
    sampled = bool(config.do_sample)
    settings = settings_of(len(input_ids), **given) if sampled else {}
    eos_ids, criteria = split_eos_ids(stopping_criteria)
    assert config.max_length is not None  # the library has set it
    processors = sort_processors(
        before, list(settings), vocabulary(model, logits_processor, options, input_ids), after, input_ids.device
    )
    request = build_request(
        input_ids,
        config.max_length - input_ids.shape[1],
        request_seeds(seed, input_ids),
        mask=model_kwargs.get("attention_mask"),
        eos_ids=eos_ids,
        pad=pad_of(config, eos_ids),
        settings=settings,
        text_processors=processors.on_host,
        stop=any_stop(criteria_stop(criteria)),
        max_lag=checked_lag(max_lag),
        watch=watch_for(token_streamer, stream, input_ids),
    )
    program = program_for(model, processors, not sampled, options, input_ids)
    result = trimmed(settled(program, request).answer(request), input_ids.shape[1])
    if not (config.return_dict_in_generate or return_particles):
        return result.sequences
    return with_scores(result, model, logits_processor, request.lengths, config)


def generate_with_config(model: Any, given: dict[str, Any], options: dict[str, Any]) -> Generation:
    """``smc_compile.generate(generation_config=...)``: the model's own ``generate`` prepares the request.

    ``given`` are the arguments of ``smc_compile.generate`` by name. The library hands neither streamer nor tokenizer
    on to custom functions, so stop strings become a criterion here.
    """
    beside = {name: value for name, value in given.items() if name not in IN_CONFIG and value is not None}
    config = copy.deepcopy(beside.pop("generation_config"))
    config.return_dict_in_generate = True
    strings, tokenizer = beside.pop("stop_strings", None) or config.stop_strings, beside.pop("tokenizer", None)
    if strings:
        config.stop_strings = None
        beside["stopping_criteria"] = [*beside["stopping_criteria"], StopStringCriteria(tokenizer, strings)]
    beside["draft_model"], beside["token_streamer"] = beside.pop("draft", None), beside.pop("streamer", None)
    ids = beside.pop("input_ids", None)
    result: Generation = model.generate(ids, generation_config=config, custom_generate=generate, **beside, **options)
    return result


def split_warpers(processors: Sequence[Any]) -> tuple[list[Any], dict[str, Any], list[Any]]:
    """The processors before the library's warpers, the settings that the warpers stand for, and what comes behind.

    A warper out of the library's order, or one that keeps more than one token at least, stays a processor.
    """
    names = [WARPERS.get(type(p).__name__) for p in processors]
    first = next((i for i, name in enumerate(names) if name), len(names))
    order = list(WARPERS.values())
    found: dict[str, Any] = {}
    last = first
    for processor, name in zip(processors[first:], names[first:], strict=True):
        behind = found and order.index(name) <= order.index(list(found)[-1]) if name else True
        if behind or getattr(processor, "min_tokens_to_keep", 1) != 1:
            break
        assert name is not None
        found[name] = getattr(processor, name)
        last += 1
    return list(processors[:first]), {"temperature": 1.0, **found}, list(processors[last:])


def split_eos_ids(criteria: Sequence[Any]) -> tuple[list[int] | None, list[Any]]:
    """The tokens that end a sequence, and the criteria beside them; lengths are counted by the session."""
    eos_ids: list[int] = []
    others = []
    for criterion in criteria:
        if type(criterion).__name__ == "EosTokenCriteria":
            eos_ids += criterion.eos_token_id.flatten().tolist()
        elif type(criterion).__name__ != "MaxLengthCriteria":
            others.append(criterion)
    return eos_ids or None, others


def pad_of(config: GenerationConfig, eos_ids: list[int] | None) -> int | None:
    """What follows an end, as the library fills up: its padding token, or the first end."""
    if config.pad_token_id is not None and config.pad_token_id >= 0:
        return int(config.pad_token_id)
    return eos_ids[0] if eos_ids else None


def trimmed(result: Generation, prompt: int) -> Generation:
    """No wider than the longest sequence, as the library returns them."""
    width = int(result.new_lengths.max())
    return replace(
        result,
        sequences=result.sequences[:, : prompt + width],
        log_probs=result.log_probs[:, :width],
    )


def with_scores(
    result: Generation, model: nn.Module, processors: Sequence[Any], lengths: Tensor, config: GenerationConfig
) -> Generation:
    """Add the logits, and the scores after all processors, at each new token of the sequences: one pass at the end."""
    if not (config.output_logits or config.output_scores):
        return result
    sequences, prompt = result.sequences, result.sequences.shape[1] - result.log_probs.shape[1]
    rows = []
    for sequence, length in zip(sequences, lengths.tolist(), strict=True):
        text = sequence[None, prompt - length :]  # without the padding in front
        rows.append(logits_of(model, text)[0, length - 1 : -1].float())
    logits = torch.stack(rows, 1)  # [n, B, V]
    scores = []
    for t, raw in enumerate(logits):
        processed = raw.clone()
        for processor in processors:
            processed = processor(sequences[:, : prompt + t], processed)
        scores.append(processed)
    return replace(
        result,
        logits=tuple(logits) if config.output_logits else None,
        scores=tuple(scores) if config.output_scores else None,
    )


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
