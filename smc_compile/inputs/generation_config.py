"""What the generation config, the processors and the criteria of the transformers library ask for.

The library itself is not imported: it is optional, and hands its objects in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smc_compile.errors import OptionError

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


def check_config(config: Any) -> None:
    """Refuse every field that asks for something other than the library's default and that nothing here acts on."""
    defaults = type(config)._get_default_generation_params()
    for name, value in vars(config).items():
        if name.startswith("_") or name in OURS or name in PREPARED or not value or value == defaults.get(name):
            continue
        raise OptionError(
            f"{name}={value!r} is not supported with custom_generate=smc_compile.transformers.generate",
            WHY.get(name, "nothing in the compiled loop acts on it, and it would be ignored in silence"),
            f"leave {name} out, or call generate without custom_generate",
        )


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


def pad_of(config: Any, eos_ids: list[int] | None) -> int | None:
    """What follows an end, as the library fills up: its padding token, or the first end."""
    if config.pad_token_id is not None and config.pad_token_id >= 0:
        return int(config.pad_token_id)
    return eos_ids[0] if eos_ids else None
