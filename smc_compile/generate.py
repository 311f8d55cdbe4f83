"""Generate from a model and a draft, without writing a loop."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from smc_compile.auto.choice import settled
from smc_compile.errors import InputError, OptionError
from smc_compile.inputs.processors import sort_processors
from smc_compile.inputs.requests import (
    build_request,
    check_prompt,
    checked_lag,
    is_greedy,
    repeated,
    request_seeds,
    settings_of,
    single_seed,
    spread,
)
from smc_compile.inputs.stopping import any_stop, criteria_stop, strings_stop
from smc_compile.inputs.streaming import watch_for
from smc_compile.options import Options
from smc_compile.program.from_model import (
    check_model,
    program_for,
    vocabulary,
)
from smc_compile.result import Generation

# What a generation_config holds; the rest goes beside it.
IN_CONFIG = ("temperature", "top_k", "top_p", "min_p", "eos_token_id", "pad_token_id", "num_return_sequences")


def generate(
    model: Any,
    draft: Any = None,
    input_ids: Tensor | None = None,
    *,
    max_new_tokens: Any = None,
    attention_mask: Tensor | None = None,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    eos_token_id: Any = None,
    pad_token_id: Any = None,
    stop_strings: Any = None,
    tokenizer: Any = None,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
    num_return_sequences: int = 1,
    seed: Any = None,
    streamer: Any = None,
    stream: str = "settled",
    max_lag: int | None = None,
    generation_config: Any = None,
    **options: Any,
) -> Generation:
    """Sample new tokens after each prompt from the model's next-token distribution: with SMC, or exactly (``method``).

    Whatever says "each" may be one value for all requests or a list with one for each; values that differ between
    requests or calls do not recompile.

    Args:
        model: the target, ``ids [B, S] -> logits [B, S, V]``, or one that follows the step protocol.
        draft: the draft, of the same kind; not needed for ``method="autoregressive"`` or temperature 0.
        input_ids: prompts [B, P] int64, padding in front of the shorter ones.
        max_new_tokens: the most new tokens of each request.
        attention_mask: [B, P], 0 at the padding.
        temperature: divides the target's logits, each; 0 for all takes the most likely token (by exact speculation with
            a draft, by the one-token loop without).
        top_k, top_p, min_p: truncate the target's distribution in this order, each; 0, 1 and 0 change nothing.
        eos_token_id: tokens that end a sequence: an int, a list for all, or a list of lists, one a request.
        pad_token_id: what follows an end, each; by default the (first) token of ``eos_token_id``.
        stop_strings: strings that end a sequence, a list for all or a list of lists; they need a ``tokenizer``.
        logits_processor: processors ``(input_ids [R, L], scores [R, V]) -> scores``, before temperature and truncation;
            those that read the text apply to target and draft.
        stopping_criteria: ``(input_ids [R, L], scores=None) -> bool [R]``.
        num_return_sequences: independent populations for each prompt; row b*M + m of the result is prompt b's. A list
            with a value for each prompt serves all its rows, but seeds are given one for each row.
        seed: a 64-bit int, request b using seed + b, or a list with one for each.
        streamer, stream: see ``smc_compile.inputs.streaming.watch_for``.
        max_lag: with a streamer, settle what is older than so many tokens by drawing one of the particles' pasts: exact
            in expectation, at the price of the other particles.
        generation_config: of transformers; the model's own ``generate`` then prepares the request, and the sampler's
            settings are those of the config.
        **options: see ``smc_compile.options.Options``.

    Returns:
        a ``Generation``, with one particle unless the method is "smc": sequences [B, P+n],
        particles [B, N, P+n], log_weights [B, N], log_evidence [B], ...

    Raises:
        OptionError, InputError: before any work, when an argument does not fit.
        CacheError, ValidationError: when no cache can be synthesized for a model.
        GenerationError: when generation breaks in the middle; ``error.partial`` holds the result so far.
    """
    check_model(model)
    if generation_config is not None:
        given = {name: value for name, value in locals().items() if name not in ("model", "options")}
        return _with_config(model, given, options)
    parsed = Options.parse({"draft": draft, "seed": single_seed(seed), **options})
    if not isinstance(input_ids, Tensor):
        raise InputError("prompts must be ids [B, P] int64", f"got {type(input_ids).__name__}", "pass token ids")
    check_prompt(input_ids)
    ids, mask = repeated(num_return_sequences, input_ids, attention_mask)
    batch = len(ids)

    def each(value: Any) -> Any:
        return spread(value, len(input_ids), num_return_sequences)

    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    values = settings_of(batch, **{name: each(value) for name, value in asked.items()})
    greedy = is_greedy(values)
    vocab = vocabulary(model, logits_processor, parsed, ids)
    processors = sort_processors(logits_processor, [] if greedy else list(values), vocab, device=ids.device)
    request = build_request(
        ids,
        each(max_new_tokens),
        request_seeds(seed, ids),
        mask=mask,
        eos_ids=each(eos_token_id) if eos_token_id is not None else parsed.eos_token_id,
        pad=each(pad_token_id),
        settings={} if greedy else values,
        text_processors=processors.on_host,
        stop=any_stop(
            strings_stop(each(stop_strings), tokenizer, batch, ids.shape[1]), criteria_stop(stopping_criteria)
        ),
        max_lag=checked_lag(max_lag),
        watch=watch_for(streamer, stream, ids),
    )
    program = program_for(model, processors, greedy, parsed, ids)
    return settled(program, request).answer(request)


def _with_config(model: Any, given: dict[str, Any], options: dict[str, Any]) -> Generation:
    refuse_beside_config(given)
    if not callable(getattr(model, "generate", None)):
        raise OptionError(
            "generation_config needs a transformers model",
            f"{type(model).__name__} has no generate method to fill it in",
            "pass max_new_tokens, temperature, top_p, ... themselves",
        )
    from smc_compile.transformers import generate_with_config

    return generate_with_config(model, given, options)


def refuse_beside_config(given: Mapping[str, Any]) -> None:
    """What a generation_config holds itself cannot be given beside it."""
    for name in IN_CONFIG:
        default = inspect.signature(generate).parameters[name].default
        if given[name] is not default and given[name] != default:
            raise OptionError(
                f"{name} cannot be given beside generation_config",
                f"got {given[name]!r}, and the config has a value of its own",
                f"set generation_config.{name}",
            )
