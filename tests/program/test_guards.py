"""Which requests share a program."""

from __future__ import annotations

import copy

import pytest
from helpers.toys import TableLM

from smc_compile.options import Options
from smc_compile.program.guards import model_state, program_key

MODEL, DRAFT = TableLM(5), TableLM(5, seed=1)


def key(target: object = MODEL, **options: object) -> object:
    return program_key(Options.parse({"draft": DRAFT, **options}), model_state(target))


def test_the_options_of_a_request_are_no_part_of_it() -> None:
    assert key() == key(seed=3) == key(eos_token_id=1)


@pytest.mark.parametrize(
    "other",
    [{"n_particles": 3}, {"method": "speculative"}, {"compiler": "eager"}, {"draft": MODEL}, {"target": DRAFT}],
)
def test_another_model_or_option_is_another_key(other: dict[str, object]) -> None:
    assert key(**other) != key()


def test_weights_may_change_and_their_dtype_may_not() -> None:
    model = copy.deepcopy(MODEL)
    before = key(model), key(draft=model)
    model.table.data.neg_()
    assert (key(model), key(draft=model)) == before
    model.double()
    assert key(model) != before[0]
    assert key(draft=model) != before[1]
