"""Our own contestants."""

from __future__ import annotations

import torch

from smc_compile.bench.ceilings import ModelSize, cycle_passes, loop_passes
from smc_compile.bench.contestants import contest, plain_loop


def test_plain_loop_appends_tokens():
    ids = plain_loop(lambda ids: torch.eye(5)[(ids + 1) % 5] * 1e3, torch.tensor([[0, 1], [2, 3]]), 4, 0.8)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 0], [2, 3, 4, 0, 1, 2]]


def test_everybody_takes_part_at_each_shape_and_knows_what_a_step_costs():
    ids, sizes = torch.zeros(1, 6, dtype=torch.int64), (ModelSize(100, 4, 8), ModelSize(10, 4, 2))
    found = contest(
        torch.nn.Identity(), torch.nn.Identity(), ids, max_new_tokens=8, temperature=1.0, shapes=[(4, 3), (2, 3)],
        eager_tokens=4, speculative=[(1, 3)], sizes=sizes, auto=True,
    )  # fmt: skip
    assert [c.name for c in found] == [
        "eager loop", "compiled loop", "speculative  K=3", "smc  N=4 K=3", "smc  N=2 K=3", "auto",
    ]  # fmt: skip
    assert found[0].passes is None
    assert found[1].passes == loop_passes(sizes[0], 6, 8)
    assert found[3].passes == cycle_passes(*sizes, 4, 3, 6, 8)
