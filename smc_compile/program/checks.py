"""Check before anything runs whether target, draft and request fit each other."""

from __future__ import annotations

import torch

from smc_compile.errors import InputError
from smc_compile.program.model import Model
from smc_compile.runtime.execution.incremental import CachedModel
from smc_compile.runtime.state.request import Request

PADDED_SHARE = 0.01  # heads that differ by less are padded differently; more is another vocabulary


def check_devices(target: Model, draft: Model) -> None:
    """Target and draft run side by side, each in its own dtype.

    Raises:
        InputError: they are on different devices.
    """
    mine, theirs = target.placement, draft.placement
    if mine and theirs and mine[0] != theirs[0]:
        raise InputError(
            "draft and target are on different devices",
            f"the target is on {mine[0]}, the draft on {theirs[0]}",
            f"move the draft: draft.to({str(mine[0])!r})",
        )


def shared_vocabulary(target: Model, draft: Model) -> int | None:
    """How many rows of the logits are tokens of both models; None when all are.

    Heads are often padded to a round number of rows, differently in models of one tokenizer. A difference of less than
    a hundredth is taken for such padding and cut off; a larger one is another vocabulary.

    Raises:
        InputError: the vocabularies differ.
    """
    sizes = [model.vocab_size for model in (target, draft) if model.vocab_size is not None]
    if len(set(sizes)) < 2:
        return None
    if max(sizes) - min(sizes) >= PADDED_SHARE * max(sizes):
        raise InputError(
            "draft and target have different vocabularies",
            f"the target has {target.vocab_size} tokens, the draft {draft.vocab_size}",
            "use a draft trained with the target's tokenizer",
        )
    return min(sizes)


def cut_off(target: Model, draft: Model, vocab: int | None) -> list[str]:
    """A warning that rows of the logits are taken for padding, where there are any."""
    if vocab is None:
        return []
    return [
        f"the target has {target.vocab_size} rows of logits, the draft {draft.vocab_size}: rows from {vocab} on are "
        "taken for padding and never drawn"
    ]


def check_request(request: Request, target: Model, draft: Model | None) -> None:
    """Check devices, tokens and lengths of a request against the models.

    Raises:
        InputError: one of them does not fit.
    """
    ids = request.ids
    place = target.placement
    if place and place[0] != ids.device:
        raise InputError(
            "prompt and model are on different devices", f"{ids.device} and {place[0]}", "move one of them"
        )
    vocab = target.distribution.vocab or target.vocab_size
    padding = torch.arange(ids.shape[1], device=ids.device) < (ids.shape[1] - request.lengths)[:, None]
    given = ids.masked_fill(padding, 0)
    low, high = int(given.min()), int(given.max())
    if low < 0 or (vocab is not None and high >= vocab):
        bad = low if low < 0 else high
        raise InputError(
            "a prompt token is out of range", f"id {bad}, vocabulary {vocab}", "use the model's own tokenizer"
        )
    pad = [p for p in request.pad.tolist() if p < 0 or (vocab is not None and p >= vocab)]
    if pad:
        raise InputError(
            "pad_token_id is out of range", f"id {pad[0]}, vocabulary {vocab}", "use one of the vocabulary"
        )
    total = int(request.positions_read.max())  # the last token is drawn, not read
    for name, model in (("target", target), ("draft", draft)):
        limit = position_limit(model, total) if model is not None else None
        if limit is not None and total > limit:
            row = int(request.positions_read.argmax())
            length, n = int(request.lengths[row]), int(request.new_tokens[row])
            raise InputError(
                f"prompt plus new tokens exceed the {name}'s maximum positions",
                f"{length} + {n} - 1 > {limit}",
                f"ask for at most {limit - length + 1} new tokens" if length <= limit else "shorten the prompt",
            )


def beyond_training(request: Request, *models: Model | None) -> list[str]:
    """A warning for each model that ran past the positions its configuration names, though its tables go on."""
    total = int(request.positions_read.max())
    limits = {name: model.trained_positions for name, model in zip(("target", "draft"), models, strict=True) if model}
    return [
        f"the {name} was asked for {total} positions, and its configuration names {limit}: beyond them it may do worse"
        for name, limit in limits.items()
        if isinstance(limit, int) and total > limit
    ]


def position_limit(model: Model, length: int) -> int | None:
    """The longest sequence a model takes, if it is below ``length``: what the trace says, or where its tables end."""
    if model.max_positions is not None and model.max_positions < length:
        return model.max_positions
    if not isinstance(model.runtime, CachedModel) or model.runtime.has_tables(length):
        return model.max_positions
    low, high = 0, length  # tables exist at ``low`` and not at ``high``
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if model.runtime.has_tables(middle) else (low, middle)
    return low
