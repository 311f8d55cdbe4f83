"""Build a batch of requests from what a user gives: one value for all, or one for each request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from smc_compile.errors import InputError, OptionError
from smc_compile.runtime.algorithms.next_token import SETTINGS
from smc_compile.runtime.state.request import Request, Stop, TextProcessor

BOUNDS = {"temperature": (0.0, torch.inf), "top_k": (0, 2**31), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0)}


def build_request(
    ids: Tensor,
    new_tokens: Any,
    seeds: Tensor,
    *,
    mask: Tensor | None = None,
    eos_ids: Any = None,
    pad: Any = None,
    settings: Mapping[str, Tensor] | None = None,
    text_processors: tuple[TextProcessor, ...] = (),
    stop: Stop | None = None,
    max_lag: int | None = None,
    watch: Callable[[Any], None] | None = None,
) -> Request:
    """A request for each row of ``ids`` [B, P].

    Args:
        new_tokens: an int, or one for each request.
        mask: [B, P], 0 where ``ids`` is padding in front of a shorter prompt.
        eos_ids: tokens that end a sequence: None, an int, a list of ints for all, or a list of lists, one a request.
        pad: the token after an end, one or one for each request; by default the first of the request's eos ids, or 0.
        settings: what the distribution reads, [B] each (see ``settings_of``).
        text_processors: those that run on the host; compiled ones belong to the program.
        stop: ends a sequence by its text.
        max_lag: draw one ancestor for what is older than so many tokens; None never does.
        watch: called with every ``Progress``.

    Raises:
        InputError, OptionError: when a value fits no request.
    """
    check_prompt(ids)
    batch, device = ids.shape[0], ids.device
    of_each = eos_ids_of_each(eos_ids, batch)
    pads = per_request("pad_token_id", [(e or [0])[0] for e in of_each] if pad is None else pad, batch, torch.int64)
    width = max(4, *(len(e) for e in of_each))  # a fixed width, so that a region compiles once
    return Request(
        ids=ids.detach(),
        lengths=prompt_lengths(ids, mask),
        new_tokens=counts(new_tokens, batch).to(device),
        seeds=seeds.to(device),
        eos_ids=torch.tensor([e + [-1] * (width - len(e)) for e in of_each], device=device),
        pad=pads.to(device),
        settings={name: value.to(device) for name, value in (settings or {}).items()},
        number=tuple(range(batch)),
        text_processors=text_processors,
        stop=stop,
        max_lag=max_lag,
        watch=watch,
    )


def per_request(name: str, value: Any, batch: int, dtype: torch.dtype) -> Tensor:
    """One value for all or one for each of B requests, as a tensor [B].

    Raises:
        OptionError: when there are neither one nor B values, or they are not numbers.
    """
    values = value.tolist() if isinstance(value, Tensor) else value
    values = [values] * batch if not isinstance(values, (list, tuple)) else list(values)
    if len(values) != batch:
        raise OptionError(
            f"{name} has {len(values)} values for {batch} requests",
            f"got {value!r}",
            "give one value for all requests, or one for each",
        )
    kinds = (int,) if dtype == torch.int64 else (int, float)
    for one in values:
        if isinstance(one, bool) or not isinstance(one, kinds):
            raise OptionError(f"{name} must be {'an integer' if kinds == (int,) else 'a number'}", f"got {one!r}")
    return torch.tensor(values, dtype=dtype)


def settings_of(batch: int, **given: Any) -> dict[str, Tensor]:
    """The settings that change something for some request, [B] each; the temperature always.

    Raises:
        OptionError: when a value is out of its range.
    """
    found = {}
    for name, value in given.items():
        kind = torch.int64 if name == "top_k" else torch.float64
        values = per_request(name, value if value is not None else SETTINGS[name][1], batch, kind).double()
        low, high = BOUNDS[name]
        wrong = values[~((values >= low) & (values <= high) & values.isfinite())].tolist()
        if wrong:
            raise OptionError(
                f"{name} must be a number {f'between 0 and {high:g}' if high == 1 else '>= 0'}",
                f"got {wrong[0]!r}",
                "0 means greedy, 1 the model's own distribution" if name == "temperature" else "",
            )
        if name == "temperature" or bool((values != SETTINGS[name][1]).any()):
            found[name] = values
    return found


def is_greedy(settings: Mapping[str, Tensor]) -> bool:
    """Whether all requests have temperature 0.

    Raises:
        OptionError: some have, and others have not.
    """
    zero = settings["temperature"] == 0
    if bool(zero.any()) and not bool(zero.all()):
        raise OptionError(
            "temperature 0 and other temperatures cannot share a batch",
            "0 takes the most likely token, others draw",
            "generate for the greedy requests in a call of their own",
        )
    return bool(zero.all())


def counts(new_tokens: Any, batch: int) -> Tensor:
    """New tokens of each request [B], all positive."""
    values = new_tokens if isinstance(new_tokens, (list, tuple, Tensor)) else [new_tokens] * batch
    values = values.tolist() if isinstance(values, Tensor) else list(values)
    for n in values:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError("the number of new tokens must be a positive integer", f"got {n!r}", "pass n >= 1")
    return per_request("max_new_tokens", values, batch, torch.int64)


def eos_ids_of_each(eos_ids: Any, batch: int) -> list[list[int]]:
    """The tokens that end each request's sequences."""
    eos_ids = eos_ids.tolist() if isinstance(eos_ids, Tensor) else eos_ids
    if eos_ids is None or isinstance(eos_ids, int):
        eos_ids = [] if eos_ids is None else [eos_ids]
    nested = any(isinstance(e, (list, tuple)) or e is None for e in eos_ids)
    each = [list(e) if isinstance(e, (list, tuple)) else [] if e is None else [e] for e in eos_ids]
    each = each if nested else [[e for one in each for e in one]] * batch
    if len(each) != batch:
        raise OptionError(
            f"eos_token_id has {len(each)} lists for {batch} requests",
            f"got {eos_ids!r}",
            "give one list for each request",
        )
    for e in (e for one in each for e in one):
        if isinstance(e, bool) or not isinstance(e, int) or e < 0:
            raise OptionError("eos_token_id must be token ids of at least 0", f"got {e!r}")
    return each


def prompt_lengths(ids: Tensor, mask: Any) -> Tensor:
    """Tokens of each prompt [B]: padding stands in front.

    Raises:
        InputError: when the mask has another shape, holes, padding behind the prompt, or hides a whole row.
    """
    batch, width = ids.shape
    if mask is None:
        return torch.full((batch,), width, device=ids.device)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError("attention_mask must have the shape of the prompts", f"{found}, not {tuple(ids.shape)}")
    seen = mask.bool()
    lengths = seen.sum(1)
    if bool((lengths == 0).any()):
        row = int((lengths == 0).nonzero()[0, 0])
        raise InputError(
            "a prompt is empty", f"attention_mask hides all tokens of row {row}", "give each row at least one token"
        )
    left = torch.arange(width, device=ids.device) >= width - lengths[:, None]
    wrong = (seen != left).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        behind = not bool(seen[row, -1])
        raise InputError(
            "the padding of a prompt must stand in front of it",
            f"attention_mask of row {row} " + ("hides its last token" if behind else "has a hole"),
            'pad on the left: tokenizer.padding_side = "left"'
            if behind
            else "remove the hidden tokens from the prompt",
        )
    return lengths


def check_prompt(ids: Any) -> None:
    """A prompt by itself: ids [B, P] int64, not empty."""
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        found = f"a tensor of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError("prompts must be ids [B, P]", f"got {found}", "pass tokens[None] for one prompt")
    if ids.dtype != torch.int64:
        raise InputError("prompts must be int64 token ids", f"got {ids.dtype}", "convert with ids.long()")
    if ids.shape[0] < 1 or ids.shape[1] < 1:
        raise InputError(
            "the prompt is empty", f"ids has shape {tuple(ids.shape)}", "pass at least one token (such as BOS)"
        )


def request_seeds(seed: Any, ids: Tensor) -> Tensor:
    """Request b uses seed + b, so that it draws the same tokens whatever else is in the batch; or its own of a list."""
    if isinstance(seed, (list, tuple, Tensor)):
        return per_request("seed", seed, ids.shape[0], torch.int64).to(ids.device)
    base = int(torch.randint(2**62, ())) if seed is None else seed
    wrapped = [(base + b + 2**63) % 2**64 - 2**63 for b in range(ids.shape[0])]
    return torch.tensor(wrapped, dtype=torch.int64, device=ids.device)


def single_seed(seed: Any) -> Any:
    """The seed that serves all requests, as an option; None where each has its own."""
    return None if isinstance(seed, (list, tuple, Tensor)) else seed
