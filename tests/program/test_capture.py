"""A function is captured without running it, and its result is made from outputs that were computed elsewhere."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from torch import Tensor, nn

from smc_compile.program.capture import Capture, CapturedCall

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
FACTOR = 2.0
X = torch.arange(3.0)


def scaled(x: Tensor) -> dict[str, Tensor]:
    return {"scaled": x * FACTOR}


def test_the_result_has_the_functions_structure_and_the_given_outputs() -> None:
    capture = Capture(scaled)
    call = capture.captured(X)
    assert call is not None
    assert any(argument is X for argument in call.arguments)
    assert capture.result([7 * X], X)["scaled"].equal(7 * X)


def test_a_graph_is_kept_while_its_guards_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = Capture(scaled)
    first, again = capture.captured(X), capture.captured(X + 1)
    assert first is not None
    assert again is not None
    assert again.finder is first.finder
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    other = capture.captured(X)
    assert other is not None
    assert other.finder is not first.finder


def test_an_attribute_that_the_function_reads_is_guarded() -> None:
    model = nn.Linear(3, 3)
    model.negate = False

    def called(x: Tensor) -> Tensor:
        return -model(x) if model.negate else model(x)

    capture = Capture(called)
    first = capture.captured(X)
    model.negate = True
    second = capture.captured(X)
    assert first is not None
    assert second is not None
    assert first.finder is not second.finder


def test_what_is_written_behind_the_graph_is_written_once() -> None:
    kept: list[Tensor] = []

    def keeping(x: Tensor) -> Tensor:
        kept.append(x + 1)
        return kept[-1]

    capture = Capture(keeping)
    capture.captured(X)
    assert kept == []
    assert capture.result([5 * X], X).equal(5 * X)
    (one,) = kept
    assert one.equal(5 * X)


def test_a_function_without_tensors_has_no_graph() -> None:
    assert Capture(lambda n: n + 1).captured(3) is None


def test_the_functions_own_error_is_raised() -> None:
    def failing(x: Tensor) -> Tensor:
        raise ValueError("mine")

    with pytest.raises(Exception, match="mine"):
        Capture(failing).captured(X)


def test_an_answer_is_for_the_thread_that_made_it() -> None:
    """While one thread makes its result, a call of another one is captured: it never gets the other's tokens."""
    capture = Capture(scaled)
    capture.captured(X)
    found: list[CapturedCall | None] = []
    with capture._answering([7 * X]):
        other = Thread(target=lambda: found.append(capture.captured(X + 1)))
        other.start()
        other.join()
    (call,) = found
    assert call is not None
    assert any(torch.is_tensor(argument) and argument.equal(X + 1) for argument in call.arguments)
