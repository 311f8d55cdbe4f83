"""What is read of Dynamo's private state means what we take it to mean.

A failure here says that torch has changed it. ``admitted_code`` must then change too, or give None: then guards are
checked at every call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo import eval_frame

from smc_compile.runtime.execution.admitted_code import admitted_code, with_own_code


class Backend:
    """A backend that notes which of its graphs run."""

    def __init__(self) -> None:
        self.compiled = 0
        self.ran: list[int] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        number, self.compiled = self.compiled, self.compiled + 1

        def run(*arguments: Any) -> Any:
            self.ran.append(number)
            return graph.forward(*arguments)

        return run


@pytest.fixture
def backend() -> Backend:
    return Backend()


def doubled(x: Tensor) -> Tensor:
    return x * 2


INPUTS = [torch.ones(3), torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.int32), torch.ones(2, 2)]


def test_private_names_of_dynamo_exist():
    assert list(inspect.signature(eval_frame._debug_get_cache_entry_list).parameters) == ["code"]
    assert eval_frame._stance.stance == "default"


def test_nothing_is_admitted_before_a_call():
    assert admitted_code(with_own_code(doubled, "doubled"), INPUTS[:1]) is None


def test_the_code_whose_guards_hold_is_found_among_all(backend):
    own = with_own_code(doubled, "doubled")
    compiled = torch.compile(own, backend=backend, fullgraph=True, dynamic=False)
    for x in INPUTS:
        compiled(x)
    for number, x in [*enumerate(INPUTS), *reversed(list(enumerate(INPUTS)))]:
        code = admitted_code(own, [x])
        assert code is not None
        assert torch.equal(code(x), 2 * x)
        assert backend.ran[-1] == number
    assert admitted_code(own, [torch.ones(7)]) is None
    assert backend.compiled == len(INPUTS), "calls of admitted code compile nothing"


def test_guards_on_nested_arguments_and_closures_are_asked(backend):
    """Regions have lists and named tuples of tensors as arguments, and close over Python values."""
    factor = 2.0

    def weighted(xs: list[Tensor], *more: Tensor, shift: float = 1.0) -> Tensor:
        return sum(x * factor for x in (*xs, *more)) + shift

    own = with_own_code(weighted, "weighted")
    compiled = torch.compile(own, backend=backend, fullgraph=True, dynamic=False)
    given = ([INPUTS[0], INPUTS[0]], INPUTS[0])
    assert torch.equal(compiled(*given), torch.full((3,), 7.0))
    assert admitted_code(own, given) is not None
    assert admitted_code(own, ([INPUTS[0]], INPUTS[0])) is None
    assert admitted_code(own, ([INPUTS[0], INPUTS[1]], INPUTS[0])) is None
    factor = 3.0
    assert admitted_code(own, given) is None


def test_admitted_code_checks_no_guards(backend):
    """Which is what it is for: it was compiled for the number 2, and multiplies by 2 whatever it is given."""
    own = with_own_code(lambda x, factor: x * factor, "scaled")
    torch.compile(own, backend=backend, fullgraph=True, dynamic=False)(torch.ones(3), 2.0)
    assert admitted_code(own, [torch.ones(3), 5.0]) is None
    code = admitted_code(own, [torch.ones(3), 2.0])
    assert code is not None
    assert torch.equal(code(torch.ones(3), 5.0), torch.full((3,), 2.0))
    assert backend.compiled == 1


def test_closures_defaults_and_keywords_are_kept(backend):
    offset = torch.ones(3)

    def shifted(x: Tensor, by: float = 1.0, *, times: float = 3.0) -> Tensor:
        return (x + by * offset) * times

    own = with_own_code(shifted, "shifted")
    assert own.__code__.co_name == "smc_shifted"
    assert own.__code__ is not shifted.__code__
    assert torch.equal(torch.compile(own, backend=backend, fullgraph=True)(offset), torch.full((3,), 6.0))
    assert admitted_code(own, [offset]) is not None
    assert admitted_code(with_own_code(own, "again"), [offset]) is None, "a copy shares no compiled code"

    own = with_own_code(lambda x: x + offset, "closed")
    torch.compile(own, backend=backend, fullgraph=True)(offset)
    code = admitted_code(own, [offset])
    assert code is not None
    assert torch.equal(code(offset), 2 * offset)


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_a_stance_is_obeyed(backend, stance):
    own = with_own_code(doubled, "doubled")
    compiled = torch.compile(own, backend=backend, fullgraph=True)
    compiled(INPUTS[0])
    assert admitted_code(own, INPUTS[:1]) is not None
    with torch.compiler.set_stance(stance):
        compiled(INPUTS[0])
        assert admitted_code(own, INPUTS[:1]) is None
    assert admitted_code(own, INPUTS[:1]) is not None
