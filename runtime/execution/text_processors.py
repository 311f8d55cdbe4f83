"""Rules that read the text so far: the same for target and draft, applied to every particle outside the regions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smc_compile.errors import GenerationError
from smc_compile.runtime.algorithms.tensors import mark_dynamic
from smc_compile.runtime.execution.region import Region
from smc_compile.runtime.state.request import Request, Rows, Rule


class Rules:
    """Logits processors in order, ``(text [R, L], scores [R, V], rows) -> scores [R, V]``, before a law's stages.

    Rules in ``traced`` are tensor code and compile into one region for texts of every length. Others may keep a state:
    with ``by_hand`` each request brings its own, and they run as they are, once a position.
    """

    def __init__(self, traced: Sequence[Rule] = (), by_hand: bool = False, compiler: str = "inductor") -> None:
        self.rules, self._by_hand_too = tuple(traced), by_hand
        self.region = Region("rules", _in_order(self.rules), compiler) if traced else None
        self.seconds = 0.0

    def __bool__(self) -> bool:
        return self.region is not None or self._by_hand_too

    def told(self) -> list[str]:
        """Each rule and where it runs."""
        where = "compiled" if self.region is not None else "on the host, once a position"
        return [f"{name_of(rule)}: {where}, on target and draft" for rule in self.rules]

    def begin(self, request: Request) -> None:
        """Take the rules of a request."""
        self.seconds = 0.0
        if self.region is None:
            self.rules = request.rules

    def apply(self, text: Tensor, scores: Tensor, rows: Rows, live: Tensor) -> Tensor:
        """Scores [R, T, V] after the T last prefixes of text [R, L].

        Prefixes that are not ``live`` [R, T] count for nothing: no rule is asked about them.

        Raises:
            GenerationError: without a partial result, when a rule raises, changes the shape, or leaves no token.
        """
        start = time.perf_counter()
        count = scores.shape[1]
        columns = []
        for t in range(count):
            prefix = text[:, : text.shape[1] - count + 1 + t].contiguous()
            columns.append(self._position(prefix, scores[:, t].contiguous(), rows, live[:, t]))
        self.seconds += time.perf_counter() - start
        return torch.stack(columns, 1)

    def _position(self, text: Tensor, scores: Tensor, rows: Rows, live: Tensor) -> Tensor:
        if self.region is not None:
            try:
                after = self.region(mark_dynamic(text, 1), scores.clone(), rows)
            except Exception as error:
                raise rule_error(self.rules, f"compiled, it raised {type(error).__name__}: {error}") from error
            check_scores(after[live], scores[live], self.rules)
            return torch.where(live[:, None], after, scores)
        if live.any():
            some = Rows(rows.request[live], rows.padding[live])
            scores[live] = self._by_hand(text[live], scores[live], some)
        return scores

    def _by_hand(self, text: Tensor, scores: Tensor, rows: Rows) -> Tensor:
        for rule in self.rules:
            before = scores
            try:
                scores = rule(text, before.clone(), rows)
            except Exception as error:
                raise rule_error(rule, f"it raised {type(error).__name__}: {error}") from error
            check_scores(scores, before, (rule,))
        return scores


def _in_order(rules: Sequence[Rule]) -> Callable[[Tensor, Tensor, Rows], Tensor]:
    def apply_rules(text: Tensor, scores: Tensor, rows: Rows) -> Tensor:
        for rule in rules:
            scores = rule(text, scores, rows)
        return scores

    return apply_rules


def check_scores(after: object, before: Tensor, rules: Sequence[Rule]) -> None:
    """Raises GenerationError when rules returned something else than scores of a law, though they were given some."""
    rule = rules[0] if len(rules) == 1 else rules
    if not isinstance(after, Tensor) or after.shape != before.shape:
        found = f"a tensor of shape {tuple(after.shape)}" if isinstance(after, Tensor) else type(after).__name__
        raise rule_error(rule, f"it returned {found} for scores of shape {tuple(before.shape)}")
    if after.isnan().any() and not before.isnan().any():
        raise rule_error(rule, "it returned NaN")
    if bool((after == -torch.inf).all(-1).any()) and not bool((before == -torch.inf).all(-1).any()):
        raise rule_error(rule, "it removed every token: nothing is left to draw")


def rule_error(rule: object, why: str) -> GenerationError:
    names = [name_of(r) for r in (rule if isinstance(rule, Sequence) else [rule])]
    return GenerationError(
        f"the logits processor {' or '.join(names)} broke the law of the next token",
        why,
        "return scores of the same shape [rows, vocabulary] in which every row keeps a finite score",
    )


def name_of(rule: object) -> str:
    """What a reader knows a rule by."""
    return str(getattr(rule, "name", None) or getattr(rule, "__name__", None) or type(rule).__name__)
