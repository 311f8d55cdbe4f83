"""A function's twin: the same function, with calls in the places where Python needs a token's value."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from smc_compile.program.twin import Twin, twin_of
from smc_compile.program.twin_calls import following, noting

OFFSET = 2


def twin(function: Any) -> Twin:
    found = twin_of(function)
    assert found is not None
    return found


def mixed(x: Tensor, n: int, *rest: int, flag: bool = False, **more: int) -> list[Any]:
    """Branches of all kinds: each does in the twin what it does here."""
    total, seen = 0, []
    while total < n and not (flag and total > 3):
        total += 1
        seen.append(total if total % 2 else -total)
        if x.sum().item() > 100 or total in (7, 9):
            break
    name = more.get("name", 0) or OFFSET
    start = time.time()
    assert total <= n, "never"
    return [total, seen, name, rest, [i for i in range(n) if i not in seen], int(x.sum()), start <= time.time()]


@pytest.mark.parametrize("call", [(1,), (5, 6), (20, 1, 2)])
@pytest.mark.parametrize("flag", [False, True])
def test_it_does_what_the_function_does(call, flag):
    made = twin(mixed).function
    with noting({}, set()):
        assert made(torch.ones(2), *call, flag=flag, name=3) == mixed(torch.ones(2), *call, flag=flag, name=3)
    with pytest.raises(AssertionError, match="never"):
        made(torch.full((1,), 200.0), -1)


def test_defaults_closures_and_globals_are_the_functions_own(monkeypatch):
    kept = [1]

    def closed(x: Tensor, by: int = 3) -> Tensor:
        return x + by + kept[0] + OFFSET if x.dim() else x

    made = twin(closed).function
    assert float(made(torch.zeros(1))) == 6
    kept[0] = 10
    monkeypatch.setitem(globals(), "OFFSET", 20)
    assert float(made(torch.zeros(1))) == 33


def test_the_plan_goes_on():
    def loop(token, eos, n):
        for _ in range(n):
            if eos is not None and token == eos:
                break
            if not (token != eos).any():
                return token
            if token != eos:
                token = token + 1
            else:
                break
        while token != eos:
            token = token + 1
        return token

    found = twin(loop)
    plan = {line.partition(": ")[2]: found.plan[at] for at, line in found.branches.items()}
    assert plan["token == eos"] is False
    assert plan["(token != eos).any()"] is True
    assert plan["token != eos"] is True
    assert all(line.startswith("test_twin.py:") for line in found.branches.values())


def test_a_branch_on_a_tensor_is_traced_as_planned_and_noted_in_a_run():
    def clipped(x: Tensor) -> Tensor:
        if (x > 1).all():
            return x * 0
        print("small")
        return x + 1

    found, asked, graphs = twin(clipped), set(), []
    assert found.quiet

    def backend(gm, _):
        graphs.append(gm)
        return gm.forward

    with following(found.plan, asked):
        torch.compile(found.function, backend=backend, fullgraph=True)(torch.ones(2))
    assert asked == {0}
    assert [n for n in graphs[0].graph.nodes if n.target is torch.ops.smc_compile.branch]
    for value, left in ((0.5, []), (2.0, [0])):
        with noting(found.plan, asked) as noted:
            assert torch.equal(found.function(torch.full((2,), value)), clipped(torch.full((2,), value)))
        assert noted == left


def test_code_whose_source_is_not_known_has_no_twin():
    names: dict[str, Any] = {}
    exec("def made(x):\n    return x", names)
    assert twin_of(names["made"]) is None
