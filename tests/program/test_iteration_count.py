"""Which argument counts the iterations, from traces that are made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, fx

from smc_compile.errors import InputError, LoopError, SMCError
from smc_compile.passes.loop.recover import DecodeLoop, OutputLayout
from smc_compile.program.iteration_count import IterationCount, find_iteration_count

P = 4
GROWS = OutputLayout(("prompt", "tokens"))


def loop(iterations: int, *outputs: OutputLayout, power: int = 1) -> DecodeLoop:
    def step(ids: Tensor) -> Tensor:
        return ids**power

    return DecodeLoop(fx.symbolic_trace(step), 0, (), iterations, P, 1, outputs or (GROWS,))


def find(look: Callable[[str, int], DecodeLoop | SMCError | None], *names: str) -> IterationCount:
    return find_iteration_count(names or ("n",), P, look)


def test_the_number_of_new_tokens() -> None:
    assert find(lambda _, n: loop(n)) == IterationCount("n", fillers=(None,))


def test_a_total_length() -> None:
    count = find(lambda _, n: loop(n - P) if n > P else None)
    assert (count.is_total, count.extra) == (True, 0)
    assert count.iterations(10, prompt_length=6) == 4
    assert count.value(3, prompt_length=6) == 9


def test_a_token_before_the_loop() -> None:
    count = find(lambda _, n: loop(n + 1))
    assert (count.is_total, count.extra) == (False, 1)
    assert count.iterations(5, P) == 6
    assert count.value(3, P) == 3


def test_the_argument_among_others() -> None:
    asked: list[str] = []

    def look(name: str, value: int) -> DecodeLoop | SMCError:
        asked.append(name)
        return loop(value) if name == "n" else LoopError("k is too large")

    assert find(look, "k", "n").name == "n"
    assert asked == ["k", "n", "n"]


def test_an_argument_that_takes_part_in_the_step() -> None:
    with pytest.raises(LoopError, match="what an iteration computes differs"):
        find(lambda _, n: loop(n, power=n))


def test_an_argument_that_counts_only_sometimes() -> None:
    with pytest.raises(LoopError, match="with n=3 the loop has 3 iterations, with 2 5"):
        find(lambda _, n: loop(3 if n == 3 else 5))
    with pytest.raises(LoopError, match="with 2 0"):
        find(lambda _, n: loop(3) if n == 3 else None)


def test_the_first_reason_is_given() -> None:
    with pytest.raises(LoopError, match="of k"):
        find(lambda name, _: LoopError(f"of {name}"), "k", "n")
    with pytest.raises(LoopError, match=r"no argument counts the iterations[\s\S]*integer arguments: none"):
        find_iteration_count([], P, lambda *_: None)


@pytest.mark.parametrize("asked", [0, -1, True, 2.0, None])
def test_a_call_asks_for_a_token_at_least(asked: object) -> None:
    with pytest.raises(InputError, match="n asks for no tokens"):
        IterationCount("n").iterations(asked, P)


def filled(tokens: int) -> OutputLayout:
    """A buffer of five columns behind the prompt, zeros behind the tokens."""
    return OutputLayout(("prompt", "tokens"), padding=(0,) * (5 - tokens))


def test_an_output_of_fixed_length_is_filled_up() -> None:
    count = find(lambda _, n: loop(n, filled(n), GROWS))
    assert count.fillers == (0, None)
    for iterations in (1, 2, 3, 5):
        assert count.stretched(loop(3, filled(3), GROWS), iterations).outputs == (filled(iterations), GROWS)
    with pytest.raises(InputError, match="6 new tokens were asked for, and there is room for 5"):
        count.stretched(loop(3, filled(3), GROWS), 6)


def test_an_output_that_changes_otherwise_is_refused() -> None:
    with pytest.raises(LoopError, match="in other ways than by its tokens"):
        find(lambda _, n: loop(n, OutputLayout(("tokens",), padding=(n,))))
