"""Where a sequence ends: its length, its eos ids, and what its text is: stop strings and stopping criteria."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smc_compile.errors import OptionError
from smc_compile.inputs.prompts import Prompts
from smc_compile.runtime.state.request import Rows, Stop


@dataclass(frozen=True)
class Stopping:
    """Where sequences end, as a user says: each is one value for all requests or one for each prompt.

    Attributes:
        max_new_tokens: the most new tokens.
        eos_ids: tokens that end a sequence, as for ``build_request``.
        pad: the token after an end.
        strings: strings that end a sequence, a list for all or a list of lists; they need a ``tokenizer``.
        criteria: for all requests, ``(input_ids [R, L], scores=None) -> bool [R]``.
    """

    max_new_tokens: Any
    eos_ids: Any = None
    pad: Any = None
    strings: Any = None
    tokenizer: Any = None
    criteria: Sequence[Any] = ()

    def of(self, prompts: Prompts) -> dict[str, Any]:
        """The arguments of ``build_request`` for these prompts.

        Raises:
            OptionError: stop strings without a tokenizer, or some that cannot occur.
        """
        each, width = prompts.each, prompts.ids.shape[1]
        by_string = strings_stop(each(self.strings), self.tokenizer, prompts.batch, width)
        return {
            "new_tokens": each(self.max_new_tokens),
            "eos_ids": each(self.eos_ids),
            "pad": each(self.pad),
            "stop": any_stop(by_string, criteria_stop(self.criteria)),
        }


class StopStrings:
    """Ends a sequence with the token that completes one of its request's strings; the prompt does not count.

    Args:
        strings: for each request, the strings that end it.
        tokenizer: anything with ``encode`` and ``decode``: of transformers or of tokenizers.
        prompt: the width of the prompts, padding included.
    """

    def __init__(self, strings: Sequence[Sequence[str]], tokenizer: Any, prompt: int) -> None:
        self._strings, self._tokenizer, self._prompt = [list(s) for s in strings], tokenizer, prompt
        for string in {s for each in self._strings for s in each}:
            self._check(string)
        longest = max((len(s.encode()) for each in self._strings for s in each), default=0)
        self._window = 2 * longest + 16  # tokens; a token that shows no character (part of one) is rare

    def _check(self, string: str) -> None:
        if not isinstance(string, str) or not string:
            raise OptionError("stop_strings must be strings that are not empty", f"got {string!r}")
        if string not in self._decode(ids_of(self._tokenizer, string)):
            raise OptionError(
                f"the tokenizer cannot make the stop string {string!r}",
                f"encoded and decoded it reads {self._decode(ids_of(self._tokenizer, string))!r}",
                "use a string of the tokenizer's alphabet; mind that it may fold case or drop spaces",
            )

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def __call__(self, text: Tensor, rows: Rows) -> Tensor:
        found = []
        for request, tokens in zip(rows.request.tolist(), text[:, self._prompt :].tolist(), strict=True):
            tail = self._decode(tokens[-self._window :]) if self._strings[request] else ""
            found.append(any(string in tail for string in self._strings[request]))
        return torch.tensor(found, dtype=torch.bool, device=text.device)


def ids_of(tokenizer: Any, string: str) -> list[int]:
    """Token ids of a string without special tokens."""
    encoded = tokenizer.encode(string, add_special_tokens=False)
    return list(getattr(encoded, "ids", encoded))


def strings_stop(given: Any, tokenizer: Any, batch: int, prompt: int) -> Stop | None:
    """From one string or a list for all, or a list of lists, one a request.

    Raises:
        OptionError: without a tokenizer, or when a string cannot occur.
    """
    if not given:
        return None
    if tokenizer is None:
        raise OptionError("stop_strings need a tokenizer", "tokens are compared as text", "pass tokenizer=")
    given = [given] if isinstance(given, str) else list(given)
    nested = any(not isinstance(s, str) for s in given)
    each = [list(s or []) if not isinstance(s, str) else [s] for s in given] if nested else [given] * batch
    if len(each) != batch:
        raise OptionError(f"stop_strings has {len(each)} lists for {batch} requests", f"got {given!r}")
    return StopStrings(each, tokenizer, prompt)


def criteria_stop(criteria: Sequence[Any]) -> Stop | None:
    """Stopping criteria ``(input_ids [R, L], scores) -> [R] bool or bool``; any of them ends a sequence."""
    if not criteria:
        return None

    def stop(text: Tensor, rows: Rows) -> Tensor:
        ended = torch.zeros(text.shape[0], dtype=torch.bool, device=text.device)
        for criterion in criteria:
            answer = criterion(text, None)
            answer = answer if isinstance(answer, Tensor) else torch.tensor(bool(answer), device=text.device)
            if answer.dim() > 1 or (answer.dim() == 1 and len(answer) != len(text)):
                raise ValueError(f"{type(criterion).__name__} answered {tuple(answer.shape)} for {len(text)} rows")
            ended |= answer.bool()
        return ended

    return stop


def any_stop(*stops: Stop | None) -> Stop | None:
    """Ends where any of these does."""
    given = [stop for stop in stops if stop is not None]
    if len(given) < 2:
        return given[0] if given else None

    def stop(text: Tensor, rows: Rows) -> Tensor:
        return torch.stack([one(text, rows) for one in given]).any(0)

    return stop
