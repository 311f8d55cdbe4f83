"""Run a decode loop as it was written on tokens that are known already, with its models replaced.

Every call of a model gives logits that leave one token: the next one of the text. So whatever samples from them, the
loop draws this text, and everything else that it does is its own: it breaks, pads, prints, counts, decodes and returns.
What it feeds its model is compared with the text at every call.
"""

from __future__ import annotations

import copy
import math
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smc_compile.errors import LoopError
from smc_compile.program.callables import cells_of


@dataclass
class Outputs:
    """What the calls of models look like, learnt from a first call for real.

    Attributes:
        template: what the first call of a module returned, by the module.
    """

    template: WeakKeyDictionary[nn.Module, Any] = field(default_factory=WeakKeyDictionary)


@dataclass
class ForcedText:
    """The text that a loop is made to draw.

    Attributes:
        prompt: [B, P].
        drawn: [B, n], the tokens that are drawn.
        appended: [B, n], those that stand in the text; others where rows have ended.
        known: how many of the tokens are part of the text: a loop that goes on behind them asks for too many.
        vocabulary: entries of a row of logits.
        left: branches that left the plan; after one the loop must end.
        branches: the lines of branches.
    """

    prompt: Tensor
    drawn: Tensor
    appended: Tensor
    known: int
    vocabulary: int
    left: list[int]
    branches: dict[int, str]
    calls: int = 0
    picked: list[Tensor] = field(default_factory=list)  # [B] each, what is drawn behind the latest call

    def next_logits(self, given: Sequence[Tensor]) -> Tensor:
        """[B, V]: logits that leave the token behind the text; one of the integers that a model is ``given`` is that
        text [B, T], or the end of it.

        Raises:
            LoopError: the loop does something else than what was traced.
        """
        if self.left:
            raise LoopError(
                "A branch on a token does something else than to end the loop.",
                f"{self.branches[self.left[0]]}: the loop went on after it had gone another way than in the trace",
                "end the loop there with break or return, or write what it does as tensor code (torch.where)",
            )
        self._require_text(given)
        batch, drawn = self.drawn.shape[0], self.calls
        self.calls += 1
        self.picked.clear()
        if drawn > self.known:
            raise LoopError(
                "The loop draws more tokens than it seems to.",
                f"it goes on behind {self.known} tokens, where the text ends by what was traced",
                "end the loop after a number of tokens that is an argument of the function",
            )
        logits = torch.full((batch, self.vocabulary), -math.inf, device=self.drawn.device)
        if drawn == self.known:  # a call whose logits nothing is drawn from
            return logits.fill_(math.nan)
        return logits.scatter_(1, self.drawn[:, drawn : drawn + 1], 0.0)

    def require_last(self) -> None:
        """No call of the model shows what became of the last token: what was drawn must be that token.

        Raises:
            LoopError: it is another.
        """
        at = self.calls - 1
        if 0 <= at < self.known and self.picked and not any(torch.equal(p, self.drawn[:, at]) for p in self.picked):
            raise LoopError(
                "The loop draws other tokens than those that its distribution gives.",
                f"of logits that leave {self.drawn[:, at].tolist()} it draws {self.picked[-1].tolist()}",
                "draw with torch.multinomial or argmax from the model's logits, without adding up or averaging them",
            )

    def _require_text(self, given: Sequence[Tensor]) -> None:
        text = torch.cat([self.prompt, self.appended[:, : self.calls]], 1)
        if not any(_is_text(value, text) for value in given):
            raise LoopError(
                "The loop gives its model other tokens than those that were drawn.",
                f"at call {self.calls + 1} the last ones are {given[0][..., -3:].tolist()}, and those of the text "
                f"{text[:, -3:].tolist()}",
                "feed back every token as it was drawn; rows that have ended may be filled up with one token",
            )


def _is_text(given: Tensor, text: Tensor) -> bool:
    """Whether a model is given the text [B, L], perhaps with padding behind, or its last tokens."""
    rows = given.reshape(-1, given.shape[-1]) if given.dim() else given.reshape(1, 1)
    length = min(rows.shape[1], text.shape[1])
    ends = ((rows[:, :length], text[:, :length]), (rows[:, -length:], text[:, -length:]))
    return rows.shape[0] == text.shape[0] and any(torch.equal(*pair) for pair in ends)


def forced_run(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    models: Sequence[nn.Module],
    text: ForcedText,
    outputs: Outputs,
) -> Any:
    """What ``function`` returns when its models make it draw ``text``."""
    with _uncompiled(function, args), answering(models, text, outputs), _Watched(text):
        result = function(*args, **kwargs)
    text.require_last()
    if text.calls == 0 and not text.left:
        raise not_replaceable("the function called no module with the tokens")
    return result


@contextmanager
def _uncompiled(function: Callable[..., Any], args: Sequence[Any]) -> Iterator[None]:
    """Inside, functions that were compiled by themselves and that ``function`` may call run as they are written.

    That holds for all threads, and so only where there is such a function.
    """
    reach = [*args]
    if isinstance(function, types.FunctionType):
        reach += [function.__globals__.get(name) for name in function.__code__.co_names]
        reach += [cell.cell_contents for cell in cells_of(function).values()]
    if any(hasattr(value, "_torchdynamo_orig_callable") for value in reach):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


class _Watched(TorchFunctionMode):
    """Inside, what is drawn is noted."""

    def __init__(self, text: ForcedText) -> None:
        super().__init__()
        self.text = text

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        drawn = getattr(func, "__name__", "") in ("multinomial", "argmax")
        if drawn and isinstance(result, Tensor) and result.numel() == self.text.drawn.shape[0]:
            self.text.picked.append(result.flatten().clone())
        return result


@contextmanager
def answering(models: Sequence[nn.Module], text: ForcedText, outputs: Outputs) -> Iterator[None]:
    """Inside, and in this thread alone, the outermost module that is called with tokens answers from ``text``."""
    thread = threading.get_ident()
    with ExitStack() as stack:
        for module in {module: None for model in models for module in model.modules()}:
            forward, had = module.forward, "forward" in vars(module)
            stack.callback(_restore, module, forward if had else None)
            module.forward = _stand_in(module, forward, text, outputs, thread)
        yield


def _restore(module: nn.Module, forward: Any) -> None:
    if forward is not None:
        module.forward = forward
    else:
        del module.forward


def _stand_in(
    module: nn.Module, forward: Callable[..., Any], text: ForcedText, outputs: Outputs, thread: int
) -> Callable[..., Any]:
    def answer(*args: Any, **kwargs: Any) -> Any:
        given = _tokens_in((*args, *kwargs.values()))
        if threading.get_ident() != thread or not given or getattr(_inside, "real", False):
            return forward(*args, **kwargs)
        row = text.next_logits(given)
        if module not in outputs.template:
            outputs.template[module] = _real(forward, args, kwargs)
        return _like(outputs.template[module], row, given[0].shape[-1])

    return answer


_inside = threading.local()


def _real(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    _inside.real = True
    try:
        with torch.no_grad():
            return forward(*args, **kwargs)
    finally:
        _inside.real = False


def _tokens_in(values: Sequence[Any]) -> list[Tensor]:
    """The tensors of integers among the arguments of a call."""
    tensors = (value for value in values if isinstance(value, Tensor))
    return [value for value in tensors if value.dtype in (torch.int64, torch.int32) and value.dim() < 3]


def _like(template: Any, row: Tensor, length: int) -> Any:
    """An output like ``template`` whose logits are ``row`` [B, V] at every position."""

    def logits(old: Tensor) -> Tensor:
        more = old.shape[-1] - row.shape[-1] if old.dim() > 1 else -1  # rows that the loop's sampler cuts off
        if more < 0 or not old.is_floating_point():
            raise not_replaceable(f"a module returned {tuple(old.shape)} for tokens, and logits were expected")
        wide = torch.nn.functional.pad(row, (0, more), value=-math.inf).to(old.dtype)
        if old.dim() == 2:
            return wide if old.shape[0] == row.shape[0] else wide.expand(length, -1)
        return wide[:, None].expand(-1, 1 if old.shape[1] == 1 else length, -1)

    if isinstance(template, Tensor):
        return logits(template)
    if isinstance(template, tuple | list) and not hasattr(template, "_fields") and template:
        first, *rest = template
        return type(template)([_like(first, row, length), *rest])
    found = template.get("logits") if isinstance(template, dict) else getattr(template, "logits", None)
    if not isinstance(found, Tensor):
        raise not_replaceable(f"a module returned {type(template).__name__} for tokens, which holds no logits")
    changed = copy.copy(template)
    if isinstance(changed, dict):
        changed["logits"] = logits(found)
    if not isinstance(changed, dict) or hasattr(changed, "logits"):
        changed.logits = logits(found)
    return changed


def not_replaceable(why: str) -> LoopError:
    return LoopError(
        "The loop's own code must run beside its tokens, and its model cannot be replaced there.",
        why,
        "call the model as one module on the tokens, model(ids); keep branches, prints and .item() out of the function",
    )
