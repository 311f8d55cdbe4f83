"""Generate from a model and a draft, without writing a loop."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from smc_compile.auto.choice import settled
from smc_compile.control.conditions import Conditions
from smc_compile.errors import OptionError
from smc_compile.inputs.processors import sort_processors
from smc_compile.inputs.prompts import prompts_of
from smc_compile.inputs.requests import build_request, request_seeds, single_seed
from smc_compile.inputs.sampler_settings import Sampling
from smc_compile.inputs.stopping import Stopping
from smc_compile.inputs.streaming import Streaming
from smc_compile.options import Options
from smc_compile.program.from_model import check_model, program_for, vocabulary
from smc_compile.program.turns import in_turn
from smc_compile.result import Generation

# Arguments of which a generation_config holds values of its own; the others go beside it.
IN_CONFIG = ("temperature", "top_k", "top_p", "min_p", "eos_token_id", "pad_token_id", "num_return_sequences")


@in_turn
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
    potential: Any = None,
    at_limit: str | None = None,
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
        potential: what the texts are conditioned on (see ``smc_compile.control``), each; it needs a ``tokenizer`` and
            an end token.
        at_limit: "complete", the default: a text that fits must be whole within ``max_new_tokens``. "cut": it may be
            cut off there.
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
        beside = {
            name: value for name, value in locals().items() if name not in ("model", "generation_config", "options")
        }
        return _with_config(model, generation_config, beside, options)
    parsed = Options.parse({"draft": draft, "seed": single_seed(seed), **options})
    prompts = prompts_of(input_ids, attention_mask, num_return_sequences)
    settings = Sampling(temperature, top_k, top_p, min_p).settings(prompts)
    stopping = Stopping(max_new_tokens, eos_token_id, pad_token_id, stop_strings, tokenizer, stopping_criteria)
    streaming = Streaming(streamer, stream, max_lag)
    ids, greedy = prompts.ids, not settings
    conditions = Conditions(potential, tokenizer, at_limit)
    if conditions:
        parsed = conditions.method(parsed, greedy=greedy)
    vocab = vocabulary(model, logits_processor, parsed, ids)
    processors = sort_processors(logits_processor, list(settings), vocab, device=ids.device)
    request = build_request(
        ids,
        seeds=request_seeds(seed, ids),
        mask=prompts.mask,
        settings=settings,
        text_processors=processors.on_host,
        **stopping.of(prompts),
        **streaming.of(ids),
    )
    program = program_for(model, processors, greedy, parsed, ids)
    if conditions:
        request = conditions.of(request, prompts.each(potential), program.vocabulary, program.forgets)
    return settled(program, request).answer(request)


def _with_config(model: Any, config: Any, beside: Mapping[str, Any], options: dict[str, Any]) -> Generation:
    """A generation that the model's own ``generate`` prepares; ``beside`` are our arguments besides the config."""
    refuse_beside_config(beside)
    if not callable(getattr(model, "generate", None)):
        raise OptionError(
            "generation_config needs a transformers model",
            f"{type(model).__name__} has no generate method to fill it in",
            "pass max_new_tokens, temperature, top_p, ... themselves",
        )
    from smc_compile.transformers import generate_with_config  # it needs the transformers library, which is optional

    given = {name: value for name, value in beside.items() if name not in IN_CONFIG and value is not None}
    return generate_with_config(model, config, given, options)


def refuse_beside_config(given: Mapping[str, Any]) -> None:
    """What a generation_config holds itself cannot be given beside it.

    Raises:
        OptionError: one of these arguments has another value than its default.
    """
    for name in IN_CONFIG:
        default = inspect.signature(generate).parameters[name].default
        if given[name] is not default and given[name] != default:
            raise OptionError(
                f"{name} cannot be given beside generation_config",
                f"got {given[name]!r}, and the config has a value of its own",
                f"set generation_config.{name}",
            )
