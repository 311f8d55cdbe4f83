"""What pays on a machine, in a sentence that follows from what was measured."""

from __future__ import annotations

import pytest

from smc_compile.auto.choice import Candidate, Choice
from smc_compile.bench.what_pays import of_method, what_pays

LOOP = Candidate(1, 0, 1.0, 1, 1.0, method="autoregressive")
EXACT = Candidate(1, 3, 1.0, 2.5, 0.4, method="speculative")


def told(loop: float, exact: float, smc: float, kl: float = 0.01) -> str:
    speeds = {"eager": 1.0, "autoregressive": loop, "speculative": exact, "smc": smc}
    rows = [{"method": m, "tokens_per_second": s, "kl_per_token": kl if m == "smc" else 0.0} for m, s in speeds.items()]
    return " ".join(what_pays(rows, Choice((LOOP, EXACT), EXACT, ""), 13_000_000))


@pytest.mark.parametrize(
    ("given", "fastest", "elsewhere"),
    [
        ((700.0, 650.0, 600.0), "the one-token loop, 700", "13.0 MB"),
        ((300.0, 450.0, 400.0), "exact speculation, 450 tokens/s (1.50x", "with larger targets"),
        ((300.0, 450.0, 600.0), "SMC, 600", "auto"),
        ((300.0, 450.0, 600.0, 0.3), "exact speculation, 450", "0.300 nats a token off"),
    ],
)
def test_the_fastest_of_those_that_are_near_enough(given, fastest, elsewhere):
    words = told(*given)
    assert fastest in words
    assert elsewhere in words
    assert 'method="auto" takes exact speculation' in words


def test_a_method_without_a_candidate_is_none():
    assert of_method(Choice((LOOP, EXACT), EXACT, ""), "smc") is None
