"""``model.generate(..., custom_generate=smc_compile.transformers.generate, draft_model=draft)``.

The library prepares the request as always: it merges the generation config, expands ``num_return_sequences`` and builds
the logits processors and stopping criteria. Processors that are tensor code on the scores go into the target's compiled
distribution; those that read the text apply to every particle, on target and draft; criteria are asked after every
token. What cannot be honoured is refused by name, before any work.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StopStringCriteria

from smc_compile.auto.choice import settled
from smc_compile.control.conditions import Conditions
from smc_compile.inputs.generation_config import check_config, pad_of, split_eos_ids, split_warpers
from smc_compile.inputs.model_arguments import check_model_arguments
from smc_compile.inputs.processors import sort_processors
from smc_compile.inputs.prompts import prompts_of
from smc_compile.inputs.requests import build_request, request_seeds, single_seed
from smc_compile.inputs.sampler_settings import Sampling
from smc_compile.inputs.stopping import Stopping
from smc_compile.inputs.streaming import Streaming
from smc_compile.options import Options, option_parameters
from smc_compile.program.from_model import check_model, program_for, vocabulary
from smc_compile.program.model_calls import logits_of
from smc_compile.program.turns import in_turn
from smc_compile.result import Generation

# The options under the names that the library leaves free: it uses ``eos_token_id`` itself, and means another draft.
NAMES = {field: field for field in Options.names() if field != "eos_token_id"} | {"draft": "draft_model"}


def showing_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Shows the options in the signature of a function that takes them as ``**given``.

    The library reads there which arguments of ``generate`` belong to a custom function.
    """
    signature = inspect.signature(function)
    own = list(signature.parameters.values())
    first = next(i for i, parameter in enumerate(own) if parameter.kind is parameter.KEYWORD_ONLY)
    parameters = [*own[:first], *option_parameters(NAMES), *own[first:]]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


@showing_options
@in_turn
@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
    generation_config: GenerationConfig | None = None,
    *,
    token_streamer: Any = None,
    stream: str = "settled",
    max_lag: int | None = None,
    return_particles: bool = False,
    potential: Any = None,
    text_tokenizer: Any = None,
    at_limit: str | None = None,
    **model_kwargs: Any,
) -> Tensor | Generation:
    """Decode with SMC, or exactly (``method``); pass it as ``custom_generate`` to a transformers model's ``generate``.

    Args:
        draft_model: the draft; with ``do_sample=False`` none is needed (the exact one-token loop runs), and one that
            is given speeds the same text up.
        n_particles, ..., compiler: see ``smc_compile.Options``; ``draft_model`` is its ``draft``.
        token_streamer, stream, max_lag: see ``smc_compile.generate``; the library does not hand ``streamer`` on.
        potential, at_limit: see ``smc_compile.generate``.
        text_tokenizer: its ``tokenizer``, which the library does not hand on.
        return_particles: return the whole weighted population, as ``return_dict_in_generate`` does.

    Returns:
        sequences [B, P+n], or a ``Generation`` with ``return_dict_in_generate=True``: with ``output_logits`` or
        ``output_scores`` it holds those of the sequences, a tuple of [B, V] for each new token.

    Raises:
        OptionError: for a field of the generation config that is not supported.
        InputError, GenerationError: as ``smc_compile.generate``.
    """
    config = generation_config or GenerationConfig()
    check_model(model)
    check_model_arguments({name: v for name, v in model_kwargs.items() if name not in NAMES.values()}, input_ids)
    prompts = prompts_of(input_ids, model_kwargs.get("attention_mask"), copies=1)
    check_config(config)
    given = {name: model_kwargs[shown] for name, shown in NAMES.items() if shown in model_kwargs}
    seed = given.get("seed")
    options = Options.parse({**given, "seed": single_seed(seed)})
    before, warpers, after = split_warpers(logits_processor)
    settings = Sampling(**warpers).settings(prompts) if config.do_sample else {}
    eos_ids, criteria = split_eos_ids(stopping_criteria)
    assert config.max_length is not None  # the library has set it
    stopping = Stopping(config.max_length - input_ids.shape[1], eos_ids, pad_of(config, eos_ids), criteria=criteria)
    conditions = Conditions(potential, text_tokenizer, at_limit)
    if conditions:
        options = conditions.method(options, greedy=not settings)
    vocab = vocabulary(model, logits_processor, options, input_ids)
    processors = sort_processors(before, list(settings), vocab, after, input_ids.device)
    request = build_request(
        input_ids,
        seeds=request_seeds(seed, input_ids),
        mask=prompts.mask,
        settings=settings,
        text_processors=processors.on_host,
        **stopping.of(prompts),
        **Streaming(token_streamer, stream, max_lag).of(input_ids),
    )
    program = program_for(model, processors, not settings, options, input_ids)
    if conditions:
        request = conditions.of(request, prompts.each(potential), program.vocabulary, program.forgets)
    result = trimmed(settled(program, request).answer(request), input_ids.shape[1])
    if not (config.return_dict_in_generate or return_particles):
        return result.sequences
    return with_scores(result, model, logits_processor, request.lengths, config)


def generate_with_config(
    model: Any, config: GenerationConfig, given: dict[str, Any], options: dict[str, Any]
) -> Generation:
    """``smc_compile.generate(generation_config=...)``: the model's own ``generate`` prepares the request.

    ``given`` are arguments of ``smc_compile.generate`` by name. The library hands neither streamer nor tokenizer on to
    custom functions, so stop strings become a criterion here.
    """
    config = copy.deepcopy(config)
    config.return_dict_in_generate = True
    strings, tokenizer = given.pop("stop_strings", None) or config.stop_strings, given.pop("tokenizer", None)
    if strings:
        config.stop_strings = None
        given["stopping_criteria"] = [*given["stopping_criteria"], StopStringCriteria(tokenizer, strings)]
    if given.get("potential") is not None:
        given["text_tokenizer"] = tokenizer
    given["draft_model"], given["token_streamer"] = given.pop("draft", None), given.pop("streamer", None)
    ids = given.pop("input_ids", None)
    result: Generation = model.generate(ids, generation_config=config, custom_generate=generate, **given, **options)
    return result


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
