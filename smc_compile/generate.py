"""Generate from a model and a draft, without writing a loop."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smc_compile.compile import Model, Program, build_program, compile_model, require_eval, stateful
from smc_compile.errors import InputError, OptionError
from smc_compile.options import Options, is_stateful
from smc_compile.processors import Processors, sort_processors
from smc_compile.requests import (
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
from smc_compile.result import Generation
from smc_compile.runtime.law import SETTINGS, Law, Mixture, Stage
from smc_compile.stopping import any_stop, criteria_stop, strings_stop
from smc_compile.streaming import watch_for

WIDE_SHARE = 0.1  # of the draft's law without truncation, where the target truncates
KEPT = 16  # programs kept; the oldest goes first, and with it its hold on the model
_programs: OrderedDict[Any, Program] = OrderedDict()
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
    """Sample new tokens after each prompt from the model's next-token law: with SMC, or exactly (``method``).

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
        top_k, top_p, min_p: truncate the target's law in this order, each; 0, 1 and 0 change nothing.
        eos_token_id: tokens that end a sequence: an int, a list for all, or a list of lists, one a request.
        pad_token_id: what follows an end, each; by default the (first) token of ``eos_token_id``.
        stop_strings: strings that end a sequence, a list for all or a list of lists; they need a ``tokenizer``.
        logits_processor: processors ``(input_ids [R, L], scores [R, V]) -> scores``, before temperature and truncation;
            those that read the text apply to target and draft.
        stopping_criteria: ``(input_ids [R, L], scores=None) -> bool [R]``.
        num_return_sequences: independent populations for each prompt; row b*M + m of the result is prompt b's. A list
            with a value for each prompt serves all its rows, but seeds are given one for each row.
        seed: a 64-bit int, request b using seed + b, or a list with one for each.
        streamer, stream: see ``smc_compile.streaming.watch_for``.
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
        ends=each(eos_token_id) if eos_token_id is not None else parsed.eos_token_id,
        pad=each(pad_token_id),
        settings={} if greedy else values,
        rules=processors.by_hand,
        stop=any_stop(
            strings_stop(each(stop_strings), tokenizer, batch, ids.shape[1]), criteria_stop(stopping_criteria)
        ),
        max_lag=checked_lag(max_lag),
        watch=watch_for(streamer, stream, ids),
    )
    return program_for(model, processors, greedy, parsed, ids).answer(request)


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


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module) and not is_stateful(model):
        raise InputError("model must be an nn.Module or follow the step protocol", f"got {type(model).__name__}")


def vocabulary(model: Any, processors: Sequence[Any], options: Options, ids: Tensor) -> int:
    """How many scores processors are tried with: the model's, or a thousand where a stateful model does not say."""
    if not processors:
        return 0
    if is_stateful(model):
        return int(getattr(model, "vocab_size", 1000))
    return compile_target(model, Law("logits"), options, ids).vocab_size or 1000


def program_for(model: Any, processors: Processors, greedy: bool, options: Options, ids: Tensor) -> Program:
    """One program per (model, draft, law, options without the seed).

    Raises:
        OptionError, InputError, CacheError, ValidationError: when the pair cannot be compiled.
    """
    chosen = tuple(value for name, value in vars(options).items() if name not in ("draft", "seed", "eos_token_id"))
    signature = (id(model), id(options.draft), processors.key, greedy, chosen, _place(model), _place(options.draft))
    if signature not in _programs:
        _programs[signature] = _compile(model, processors, greedy, options, ids)
    _programs.move_to_end(signature)
    while len(_programs) > KEPT:
        _programs.popitem(last=False)
    return _programs[signature]


def last_program() -> Program:
    """The program that answered last."""
    return next(reversed(_programs.values()))


def _place(model: Any) -> tuple[torch.device, torch.dtype] | None:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next(((p.device, p.dtype) for p in parameters), None)


def _compile(model: Any, processors: Processors, greedy: bool, options: Options, ids: Tensor) -> Program:
    law = Law("greedy" if greedy else "logits", stages=processors.stages)
    draft_law = draft_law_for(processors.stages, greedy, options)
    target = compile_target(model, law, options, ids)
    by_hand = bool(processors.by_hand)
    return build_program(target, options, draft_law, ids, rules=processors.traced, by_hand=by_hand)


def draft_law_for(stages: Sequence[Stage], greedy: bool, options: Options) -> Law | Mixture:
    """What the draft follows: rejection accepts most where the draft truncates as the target does, and no token need be
    in reach; for SMC all must be."""
    if greedy:
        return Law("greedy", stages=tuple(stages))
    law = proposal(stages, options.draft_temperature)
    return replace(law, share=0.0) if options.method == "speculative" and isinstance(law, Mixture) else law


def proposal(stages: Sequence[Stage], draft_temperature: float | None) -> Law | Mixture:
    """The draft follows its temperature and, mixed with that alone, what else the target's law does to scores."""
    temperature = SETTINGS["temperature"][0]
    own = temperature if draft_temperature is None else divide(draft_temperature)
    wide = Law("logits", stages=(own,))
    if all(stage is temperature for stage in stages):
        return wide
    narrow = Law("logits", stages=tuple(own if stage is temperature else stage for stage in stages))
    return Mixture(narrow, wide, WIDE_SHARE)


def divide(temperature: float) -> Stage:
    def divided(scores: Tensor, _: Any) -> Tensor:
        return scores / temperature

    return divided


def compile_target(model: Any, law: Law, options: Options, ids: Tensor) -> Model:
    if is_stateful(model):
        return stateful(model, law)
    require_eval(model, "model")
    return compile_model(model, law, options, ids, "target")
