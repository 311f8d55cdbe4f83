"""Random decode loops in the words of their users, and random changes of a model between calls.

A loop is drawn as source text and becomes a function with that source, so that whatever reads it finds it. All loops
are greedy: what they return follows from the model, and can be compared token by token with the plain loop.
"""

from __future__ import annotations

import itertools
import linecache
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCAB = 7
_numbers = itertools.count()


class Call(NamedTuple):
    """One call of a loop: the prompt [B, P], the number of new tokens, and the state that the model is in."""

    ids: Tensor
    n: int
    state: str


class Mixed(nn.Module):
    """Reads all of its text: each token's logits are those of an attention-free mixture over the tokens so far."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(VOCAB, 8, generator=generator).double())
        self.query = nn.Parameter(torch.randn(8, 8, generator=generator).double())
        self.head = nn.Linear(8, VOCAB, bias=False).double()
        self.head.weight.data = torch.randn(VOCAB, 8, generator=generator).double()
        self.scale, self.flip = 1.0, False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed[ids]  # [B, S, 8]
        scores = x @ self.query @ x.transpose(1, 2)
        hidden = torch.ones_like(scores).tril() == 0
        y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ x + x
        logits = self.head(y) * self.scale
        return -logits if self.flip else logits


# ---- loops -----------------------------------------------------------------------------------------------------------


def random_source(rng: random.Random) -> str:
    """The source of a loop ``loop(model, ids, n)``."""
    window = rng.randint(2, 9)
    reads = [
        *["ids"] * 4,
        f"ids[:, -{window}:]",
        f"ids if ids.size(1) <= {window} else ids[:, -{window}:]",
        f"ids[:, max(0, ids.shape[1] - {window}):]",
    ]
    token, other, number = rng.randrange(VOCAB), rng.randrange(VOCAB), rng.randint(1, 6)
    changes = [
        "logits = logits / 0.7",
        f"logits[:, {token}] = -float('inf')",
        f"logits[:, {token}] += 1.5",
        f"if i < {number}: logits[:, {token}] = -float('inf')",
        f"if i % {number + 1} == {number // 2}: logits = logits.roll(1, -1)",
        f"if ids.shape[1] >= {number + 4}: logits = -logits",
        f"if i == n - 1: logits[:, {other}] += 9",
        "logits = logits * (1.0 / (1 + i))",
        "seen = torch.gather(logits, 1, ids); "
        "logits = logits.scatter(1, ids, torch.where(seen < 0, seen * 1.3, seen / 1.3))",
        f"logits = logits.scatter(1, ids[:, -{number}:], -5.0)",
        "logits = torch.log_softmax(logits, -1)",
        "top = logits.topk(3, -1).values; logits = logits.masked_fill(logits < top[:, -1:], -float('inf'))",
    ]
    numbered = [change for change in changes if change.startswith("if ") or "(1 + i)" in change]
    plain = [change for change in changes if change not in numbered]
    chosen = rng.sample(plain, rng.choice([0, 1, 1, 2])) + rng.sample(numbered, rng.choice([0, 0, 1, 1, 2]))
    body = [f"logits = model({rng.choice(reads)})[:, -1]", *chosen]
    body.append("token = logits.argmax(-1, keepdim=True)")
    append = "ids = torch.cat([ids, token], 1)"
    end = rng.choice([None, None, None, f"if (token == {other}).all(): break", f"if token[0, 0] == {other}: break"])
    order = [append, end] if rng.random() < 0.5 else [end, append]
    body += [line for line in order if line is not None]
    result = rng.choice(["ids", "ids", "ids[:, start:]"])
    lines = ["start = ids.shape[1]", "for i in range(n):", *("    " + line for line in body), f"return {result}"]
    return "def loop(model, ids, n):\n" + "\n".join("    " + line for line in lines) + "\n"


def as_function(source: str) -> Callable[..., Any]:
    """The function that a source defines; ``inspect.getsource`` finds it."""
    name = f"<random loop {next(_numbers)}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    space: dict[str, Any] = {"torch": torch}
    exec(compile(source, name, "exec"), space)
    loop: Callable[..., Any] = space["loop"]
    return loop


# ---- changes ---------------------------------------------------------------------------------------------------------


@contextmanager
def attribute(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    before = getattr(model, name)
    setattr(model, name, value)
    yield
    setattr(model, name, before)


@contextmanager
def hooked(module: nn.Module) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _module, _inputs, output: output.roll(2, -1))
    yield
    handle.remove()


@contextmanager
def other_weights(model: Mixed) -> Iterator[None]:
    model.head.weight.data.neg_()
    yield
    model.head.weight.data.neg_()


@contextmanager
def narrow(model: nn.Module) -> Iterator[None]:
    model.float()
    yield
    model.double()


class Adapted(nn.Module):
    """A layer with something beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.beside = layer, nn.Linear(8, VOCAB, bias=False).double()
        self.beside.weight.data = torch.linspace(-2, 2, 8 * VOCAB).view(VOCAB, 8).cos().double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.beside(x)


STATES: dict[str, Callable[[Mixed], AbstractContextManager[object]]] = {
    "as it was": lambda model: nullcontext(),
    "an attribute": lambda model: attribute(model, "scale", -0.5),
    "a flag": lambda model: attribute(model, "flip", True),
    "a hook": lambda model: hooked(model.head),
    "weights": other_weights,
    "a wrapped layer": lambda model: attribute(model, "head", Adapted(model.head)),
    "a dtype": narrow,
}


def random_calls(rng: random.Random, count: int) -> list[Call]:
    """Calls of a loop: prompts of one or two rows, short and long texts, the model in states that come back."""
    batch, states = rng.choice([1, 1, 2]), rng.sample(list(STATES), 2)
    calls = []
    for _ in range(count):
        length = rng.randint(2, 9)
        ids = torch.tensor([[rng.randrange(VOCAB) for _ in range(length)] for _ in range(batch)])
        calls.append(Call(ids, rng.randint(1, 14), rng.choice(states)))
    return calls
