"""Everything that can be called and holds a decode loop goes into `decode`, and is called as before."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from helpers.toys import TableLM
from torch import Tensor, nn

from smc_compile import decode
from smc_compile.errors import OptionError
from smc_compile.program.callables import bound_function, innermost

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "untraced_regions")
MODEL, IDS, N = TableLM(7).double(), torch.tensor([[0, 1, 2]]), 5
QUICK: dict[str, Any] = {"compiler": "eager", "validate": False}


def greedy(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@torch.no_grad()
def until(model: nn.Module, ids: Tensor, n: int, eos: int) -> Tensor:
    for _ in range(n):
        token = model(ids)[:, -1].argmax(-1, keepdim=True)
        if token == eos:
            break
        ids = torch.cat([ids, token], 1)
    return ids


def around(model: nn.Module, ids: Tensor, n: int, eos: int) -> Tensor:
    return until(model, ids, n, eos)


class Speaker(nn.Module):
    """Calls itself, as nanoGPT does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = MODEL

    def forward(self, ids: Tensor) -> tuple[Tensor, None]:
        return self.model(ids), None

    @torch.no_grad()
    def generate(self, ids: Tensor, n: int, eos: int | None = None) -> Tensor:
        for _ in range(n):
            logits, _ = self(ids)
            token = logits[:, -1].argmax(-1, keepdim=True)
            if eos is not None and (token == eos).all():
                break
            ids = torch.cat([ids, token], 1)
        return ids

    compiled = decode(**QUICK)(generate)

    @staticmethod
    def apart(model: nn.Module, ids: Tensor, n: int) -> Tensor:
        return greedy(model, ids, n)

    @classmethod
    def of_the_class(cls, model: nn.Module, ids: Tensor, n: int) -> Tensor:
        return cls.apart(model, ids, n)


class Caller:
    """No module, but it has one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, ids: Tensor, n: int) -> Tensor:
        return greedy(self.model, ids, n)

    def until(self, ids: Tensor, n: int, eos: int) -> Tensor:
        return around(self.model, ids, n, eos)


CALLS = {
    "bound method": (Speaker().generate, (IDS, N)),
    "static method": (Speaker.apart, (MODEL, IDS, N)),
    "static method itself": (Speaker.__dict__["apart"], (MODEL, IDS, N)),
    "class method": (Speaker.of_the_class, (MODEL, IDS, N)),
    "partial": (functools.partial(greedy, MODEL), (IDS, N)),
    "partial of a partial": (functools.partial(functools.partial(greedy, MODEL), IDS), (N,)),
    "partial by name": (functools.partial(greedy, n=N), (MODEL, IDS)),
    "object": (Caller(MODEL), (IDS, N)),
    "lambda": (lambda ids, n: greedy(MODEL, ids, n), (IDS, N)),
}
ENDING = {
    "decorated": (until, (MODEL, IDS, N)),
    "inference mode": (torch.inference_mode()(innermost(until)), (MODEL, IDS, N)),
    "bound": (Speaker().generate, (IDS, N)),
    "held by another function": (around, (MODEL, IDS, N)),
    "held by another function of a method": (Caller(MODEL).until, (IDS, N)),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_callable_is_called_as_before(name):
    called, args = CALLS[name]
    assert torch.equal(decode(called, **QUICK)(*args), greedy(MODEL, IDS, N))


@pytest.mark.parametrize("name", ENDING)
def test_so_it_is_where_the_loop_ends_a_text(name):
    called, args = ENDING[name]
    compiled, eos = decode(called, **QUICK), int(greedy(MODEL, IDS, 3)[0, -1])
    for end in (eos, 99):
        assert torch.equal(compiled(*args, end), until(MODEL, IDS, N, end))
    assert until(MODEL, IDS, N, eos).shape[1] < 3 + N


def test_a_decorated_method():
    speaker, eos = Speaker(), int(greedy(MODEL, IDS, 2)[0, -1])
    assert torch.equal(speaker.compiled(IDS, N, eos), until(MODEL, IDS, N, eos))
    assert torch.equal(Speaker.compiled(speaker, IDS, N), greedy(MODEL, IDS, N))


def test_a_function_that_is_called_may_be_replaced(monkeypatch):
    compiled, eos = decode(around, **QUICK), int(greedy(MODEL, IDS, 2)[0, -1])
    assert torch.equal(compiled(MODEL, IDS, N, eos), until(MODEL, IDS, N, eos))
    monkeypatch.setitem(globals(), "until", lambda model, ids, n, eos: greedy(model, ids, n))
    assert torch.equal(compiled(MODEL, IDS, N, eos), greedy(MODEL, IDS, N))


def test_many_functions_of_one_decorator_do_not_share_a_limit():
    for _ in range(10):
        assert torch.equal(decode(torch.no_grad()(greedy), **QUICK)(MODEL, IDS, 2), greedy(MODEL, IDS, 2))


def test_functions_that_hand_out_tokens_are_refused():
    def stream(model, ids, n):
        yield from greedy(model, ids, n)

    with pytest.raises(OptionError, match=r"generator function[\s\S]*streamer"):
        decode(stream)
    for thing in (3, int, len):
        with pytest.raises(OptionError, match="compiles a Python function"):
            bound_function(thing)
