"""A generation is compared with the model itself; a token whose log-probability is another's is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.models import CACHEABLE

from smc_compile import Generation, generate
from smc_compile.bench.against_eager import ALLOWED, Agreement, checked, difference
from smc_compile.errors import SMCError

pytestmark = pytest.mark.usefixtures("interpreted")
TARGET = CACHEABLE["llama"]().double()


@pytest.fixture(scope="module", params=["smc", "autoregressive", "speculative"])
def generation(request) -> Generation:
    ids = torch.tensor([[1, 5, 2], [3, 3, 4]])
    options = {"method": request.param, "n_particles": 3, "lookahead": 2, "compiler": "eager", "seed": 0}
    with torch.compiler.set_stance("force_eager"):
        return generate(TARGET, perturbed(TARGET), ids, max_new_tokens=9, temperature=0.7, **options)


def test_a_right_one_agrees_and_another_temperature_does_not(generation):
    assert difference(TARGET, generation, 0.7).largest < 1e-12
    assert difference(TARGET, generation, 0.8).mean > 1e-3


def test_what_stands_behind_an_end_does_not_count():
    ids = torch.tensor([[1, 5, 2]]).expand(6, -1)
    options = {"method": "autoregressive", "compiler": "eager", "eos_token_id": 3, "seed": 0}
    given = generate(TARGET, None, ids, max_new_tokens=30, **options)
    assert (given.particle_lengths < 30).any()
    assert difference(TARGET, given, 1.0).largest < 1e-12


def test_one_wrong_token_is_seen(generation):
    other = generation.particles.clone()
    other[0, 0, 4] = (other[0, 0, 4] + 1) % 11
    assert difference(TARGET, replace(generation, particles=other), 0.7).largest > 1e-3


def test_what_is_off_by_more_than_rounding_raises():
    good = Agreement(ALLOWED[torch.float32] / 2, 0.5)
    assert checked("smc", good, torch.float32) is good
    for mean in (2 * ALLOWED[torch.float32], float("nan")):
        with pytest.raises(SMCError, match="smc does not compute what the model computes in eager mode"):
            checked("smc", Agreement(mean, 1.0), torch.float32)
