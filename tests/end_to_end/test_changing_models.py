"""A model is what it is at the call: whatever its forward reads may change between calls, and change back."""

from __future__ import annotations

import functools
import logging
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers.models import CACHEABLE
from helpers.toys import TableLM
from torch import Tensor, nn

import smc_compile
from smc_compile.program import from_model
from smc_compile.program.guards import model_state

SIGN = 1.0  # a global that the forward reads
TABLE = {"shift": 0}
SETTINGS = types.SimpleNamespace(scale=1.0)
OFFSET = torch.zeros(17)
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])

pytestmark = pytest.mark.usefixtures("untraced_regions")


def shifted(logits: Tensor) -> Tensor:
    return logits.roll(TABLE["shift"], -1)


class Readable(nn.Module):
    """Reads its surroundings in every way in which Python code can."""

    extra = 0.0  # of the class

    def __init__(self) -> None:
        super().__init__()
        self.inner = CACHEABLE["llama"](layers=1).double()
        self.scale, self.flags, self.options = 1.0, ["plain"], {"cap": 0.0}
        self.vector = torch.zeros(17)  # neither parameter nor buffer
        self.config = types.SimpleNamespace(power=1)
        self.function: Callable[[Tensor], Tensor] = shifted
        self.calls: list[int] = []
        self.adapter = nn.Linear(17, 17, bias=False).double()

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.inner(ids) * self.scale * SIGN * SETTINGS.scale + self.extra * torch.arange(17) + self.vector
        if "adapted" in self.flags:
            logits = logits + self.adapter(logits)
        if self.options["cap"]:
            logits = self.options["cap"] * torch.sin(logits)
        return self.function(logits**self.config.power + OFFSET)


@contextmanager
def value(holder: object, name: str, new: object) -> Iterator[None]:
    """Another value of an attribute, of a weight, or of a module."""
    own = name in vars(holder) or (name in dir(holder) and name not in dir(type(holder)))
    before = getattr(holder, name)
    setattr(holder, name, new)
    try:
        yield
    finally:
        setattr(holder, name, before) if own or name == "__class__" else delattr(holder, name)


@contextmanager
def item(holder: dict[str, object], name: str, new: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(holder, name, new)
        yield


@contextmanager
def undone(do: Callable[[], object], undo: Callable[[], object]) -> Iterator[None]:
    do()
    try:
        yield
    finally:
        undo()


@contextmanager
def hook(module: nn.Module, function: Callable[..., object], pre: bool = False) -> Iterator[None]:
    handle = module.register_forward_pre_hook(function) if pre else module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


class LowRank(nn.Module):
    """An adapter by hand around a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        torch.manual_seed(5)
        self.down = nn.Parameter(torch.randn(layer.weight.shape[1], 2).double())
        self.up = nn.Parameter(torch.randn(2, layer.weight.shape[0]).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down @ self.up


def here() -> types.ModuleType:
    return sys.modules[__name__]


def negated(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return -output


def other_forward(self: Readable, ids: Tensor) -> Tensor:
    return self.inner(ids).flip(-1)


CHANGES: dict[str, Callable[[Readable], object]] = {
    "a number": lambda m: value(m, "scale", -1.0),
    "a number deep inside": lambda m: value(m.inner.blocks[0].attention, "heads", 4),
    "a list that grows": lambda m: undone(lambda: m.flags.append("adapted"), lambda: m.flags.pop()),
    "an equal list with another item": lambda m: value(m, "flags", ["adapted"]),
    "an entry": lambda m: item(m.options, "cap", 2.0),
    "a configuration": lambda m: value(m.config, "power", 2),
    "a plain tensor": lambda m: value(m, "vector", torch.linspace(9, -9, 17)),
    "a plain tensor, in place": lambda m: undone(lambda: m.vector[3].add_(50), lambda: m.vector[3].sub_(50)),
    "a global number": lambda m: value(here(), "SIGN", -1.0),
    "a global dictionary": lambda m: item(TABLE, "shift", 3),
    "an attribute of a global": lambda m: value(SETTINGS, "scale", -2.0),
    "a global tensor": lambda m: value(here(), "OFFSET", torch.linspace(9, -9, 17)),
    "a function": lambda m: value(m, "function", lambda logits: -logits),
    "a closure": lambda m: value(m, "function", (lambda by: lambda logits: logits.roll(by, -1))(5)),
    "a partial function": lambda m: value(m, "function", functools.partial(torch.mul, -1)),
    "an attribute of the class": lambda m: value(Readable, "extra", 1.0),
    "the forward of the class": lambda m: value(Readable, "forward", other_forward),
    "the forward of the object": lambda m: value(m, "forward", types.MethodType(other_forward, m)),
    "the class of a module": lambda m: value(m, "__class__", type("Other", (Readable,), {"forward": other_forward})),
    "a hook": lambda m: hook(m.inner, negated),
    "a hook before": lambda m: hook(m.inner, lambda _, inputs: ((inputs[0] + 1) % 17,), pre=True),
    "a wrapped layer": lambda m: value(m.inner.blocks[0].mlp, "down", LowRank(m.inner.blocks[0].mlp.down)),
    "another layer": lambda m: value(m.inner, "head", nn.Linear(16, 17).double()),
    "a layer more": lambda m: value(m.inner, "blocks", nn.ModuleList([*m.inner.blocks, *m.inner.blocks])),
    "other weights": lambda m: value(m.inner.head, "weight", nn.Parameter(-m.inner.head.weight.data)),
    "weights, in place": lambda m: undone(m.inner.head.weight.data.neg_, m.inner.head.weight.data.neg_),
    "untied from nothing": lambda m: value(m.inner.embed, "weight", m.inner.head.weight),
    "narrow weights": lambda m: undone(lambda: m.float(), lambda: m.double()),
}


def eager(model: nn.Module, ids: Tensor, n: int = 6) -> Tensor:
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def compiled(model: nn.Module, draft: nn.Module | None = None, **options: object) -> Tensor:
    options = {"max_new_tokens": 6, "compiler": "eager", "temperature": 0, "validate": False, **options}
    return smc_compile.generate(model, draft, PROMPT, **options).sequences


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """One model for all changes: each is undone, and what it was is known then."""
    return Readable().eval()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_and_undone(model: nn.Module, name: str) -> None:
    before = eager(model, PROMPT)
    assert torch.equal(compiled(model), before)
    with CHANGES[name](model):  # type: ignore[attr-defined]
        assert torch.equal(compiled(model), eager(model, PROMPT))
        known = set(from_model.programs)
        assert torch.equal(compiled(model), eager(model, PROMPT))
        assert set(from_model.programs) == known
    assert torch.equal(compiled(model), before)
    assert set(from_model.programs) == known


@pytest.mark.parametrize("method", ["smc", "speculative"])
def test_a_draft_that_changes_is_seen(method: str) -> None:
    """What it proposes with is what it says now: a draft that is the target itself is always accepted."""
    model, draft = Readable().eval(), Readable().eval()
    options = {"method": method, "temperature": 1.0, "lookahead": 3, "n_particles": 2, "seed": 0, "max_new_tokens": 12}
    alike = smc_compile.generate(model, draft, PROMPT, compiler="eager", validate=False, **options)
    with value(draft, "scale", -1.0):
        other = smc_compile.generate(model, draft, PROMPT, compiler="eager", validate=False, **options)
    again = smc_compile.generate(model, draft, PROMPT, compiler="eager", validate=False, **options)
    assert torch.equal(again.sequences, alike.sequences)
    if method == "smc":
        assert alike.log_evidence.abs().max() < 1e-9 < other.log_evidence.abs().max()
    else:
        assert other.stats.accepted < alike.stats.accepted == 3


def loop(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


OPTIONS = {"compiler": "eager", "validate": False}
WAYS = {
    "decode": lambda: smc_compile.decode(loop, **OPTIONS),
    "compile": lambda: torch.compile(loop, backend="smc", options=OPTIONS, fullgraph=True),
}


class Small(nn.Module):
    """Few nodes to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = TableLM(17), 1.0

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids) * self.scale


def rolled(self: Small, ids: Tensor) -> Tensor:
    return self.inner(ids).roll(2, -1)


CHANGES_OF_SMALL: dict[str, Callable[[Small], object]] = {
    "a number": lambda m: value(m, "scale", -1.0),
    "a hook": lambda m: hook(m.inner, negated),
    "a hook before": lambda m: hook(m.inner, lambda _, inputs: ((inputs[0] + 1) % 17,), pre=True),
    "the forward of the class": lambda m: value(Small, "forward", rolled),
}
UNSEEN = "the forward of the class"  # by what Dynamo guards, with any backend


@pytest.mark.parametrize(
    ("way", "name"), [(w, n) for w in WAYS for n in CHANGES_OF_SMALL if w == "decode" or n != UNSEEN]
)
@torch.no_grad()
def test_a_loop_sees_a_change_and_its_end(way: str, name: str) -> None:
    torch._dynamo.reset()
    model, compiled_loop = Small().eval(), WAYS[way]()
    before = eager(model, PROMPT, 3)
    assert torch.equal(compiled_loop(model, PROMPT, 3), before)
    with CHANGES_OF_SMALL[name](model):  # type: ignore[attr-defined]
        assert torch.equal(compiled_loop(model, PROMPT, 3), eager(model, PROMPT, 3))
    assert torch.equal(compiled_loop(model, PROMPT, 3), before)


@pytest.mark.parametrize("way", WAYS)
def test_no_variant_is_one_too_many(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo compiles eight variants of a function and runs the ninth as plain Python. Ours are all compiled."""
    torch._dynamo.reset()
    answers = []
    for module in (smc_compile.backend, sys.modules["smc_compile.decode"]):
        answer = module.answer_loop
        monkeypatch.setattr(module, "answer_loop", lambda *given, answer=answer: answers.append(1) or answer(*given))
    table = TableLM(5)
    table.rolled = 0
    table.forward = lambda ids: TableLM.forward(table, ids).roll(table.rolled, -1)
    compiled_loop = WAYS[way]()
    with torch._dynamo.config.patch(recompile_limit=3):
        for table.rolled in range(5):
            assert torch.equal(compiled_loop(table, PROMPT % 5, 3), eager(table, PROMPT % 5, 3))
    assert len(answers) == 5


def test_a_processor_whose_closure_changes_is_seen(model: nn.Module) -> None:
    banned = [13]

    def ban(ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, banned] = -float("inf")
        return scores

    def loop() -> Tensor:
        ids = PROMPT
        with torch.no_grad():
            for _ in range(6):
                ids = torch.cat([ids, ban(ids, model(ids)[:, -1]).argmax(-1, keepdim=True)], 1)
        return ids

    assert torch.equal(compiled(model, logits_processor=[ban]), loop())
    banned[0] = 5
    assert torch.equal(compiled(model, logits_processor=[ban]), loop())


def test_what_changes_at_every_call_is_named(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    counting = Readable().eval()
    with caplog.at_level(logging.WARNING, "smc_compile.program.guards"):
        for call in range(8):
            counting.calls.append(call)
            model_state(counting)
    assert "calls" in caplog.text
    assert "outside of the model" in caplog.text


def test_a_model_is_left_as_it_was(model: nn.Module) -> None:
    fresh = Readable().eval()
    shared = fresh.flags, fresh.options, fresh.calls
    compiled(fresh)
    assert all(one is other for one, other in zip(shared, (fresh.flags, fresh.options, fresh.calls), strict=True))


def test_hooks_of_all_modules_are_refused_by_name(model: nn.Module) -> None:
    handle = nn.modules.module.register_module_forward_hook(negated)
    try:
        with pytest.raises(smc_compile.InputError, match="negated"):
            compiled(model)
        with pytest.raises(smc_compile.InputError, match="own modules"):
            WAYS["decode"]()(Small(), PROMPT, 3)
    finally:
        handle.remove()
