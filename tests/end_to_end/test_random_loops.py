"""Random loops, random calls, random changes between the calls: the plain loop's result, or a refusal by name."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from helpers.random_loops import STATES, Call, Mixed, as_function, random_calls, random_source
from torch import Tensor

import smc_compile

LOOPS, CALLS = 6, 20
pytestmark = pytest.mark.usefixtures("untraced_regions")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


@torch.no_grad()
def outcome(compiled: Any, plain: Any, model: Mixed, call: Call) -> str:
    """What comes of one call: "equal", the name of a refusal, or "DIFFERENT"."""
    with STATES[call.state](model):
        ids = call.ids.clone()
        expected = plain(model, call.ids, call.n)
        try:
            actual = compiled(model, ids, call.n)
        except smc_compile.SMCError as error:
            return type(error).__name__
        if not torch.equal(ids, call.ids):
            return "DIFFERENT prompt"
        return "equal" if same(actual, expected) else "DIFFERENT"


def outcomes(seed: int, loops: int, calls: int) -> tuple[Counter[str], list[str]]:
    """How often each outcome came, and what differed."""
    rng, counts, wrong = random.Random(seed), Counter[str](), []
    for number in range(loops):
        source = random_source(rng)
        plain, model = as_function(source), Mixed(number)
        compiled = smc_compile.decode(plain, compiler="eager", method="autoregressive", validate=False)
        for call in random_calls(rng, calls):
            found = outcome(compiled, plain, model, call)
            counts[found] += 1
            if found.startswith("DIFFERENT"):
                wrong.append(f"{source}{call}")
    return counts, wrong


@pytest.mark.slow
def test_no_result_differs_from_the_plain_loops() -> None:
    counts, wrong = outcomes(seed=0, loops=LOOPS, calls=CALLS)
    print(dict(counts))
    assert not wrong, "\n".join(wrong[:5])
    assert counts["equal"] > LOOPS * CALLS / 4


if __name__ == "__main__":
    import sys

    found, different = outcomes(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print(dict(found))
    print("\n".join(different))
