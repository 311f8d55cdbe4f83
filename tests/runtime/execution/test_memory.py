"""A call that cannot fit is refused before it allocates; the bytes counted are those that a session allocates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.models import CACHEABLE
from helpers.toys import GRUStep

from smc_compile import generate
from smc_compile.errors import InputError
from smc_compile.runtime.execution import memory
from smc_compile.runtime.execution.incremental import CachedModel

GB = 10**9
IDS = torch.tensor([[1, 0, 2], [2, 2, 1]])
OPTIONS = {"max_new_tokens": 9, "n_particles": 4, "lookahead": 3, "compiler": "eager", "validate": False, "seed": 0}
pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.fixture(scope="module")
def pair():
    target = CACHEABLE["llama"](vocab=7)
    return target, perturbed(target)


def free(monkeypatch, count: int | None) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: count)


METHODS = {"smc": {}, "speculative": {"method": "speculative"}, "one token": {"method": "autoregressive"}}


@pytest.mark.parametrize("method", METHODS)
def test_what_fits_runs_and_one_byte_less_is_refused(pair, method, monkeypatch):
    """What is asked for covers the caches that the session then makes, its logits and its tokens."""
    options, generated, asked = {**OPTIONS, **METHODS[method]}, [], []
    begin, need_of = CachedModel.begin, memory.need_of

    def watched(self, *args):
        found = begin(self, *args)
        generated.extend([*found[1][0], *found[2]])
        return found

    def noted(*args):
        asked.append(need_of(*args))
        return asked[-1]

    monkeypatch.setattr(CachedModel, "begin", watched)
    monkeypatch.setattr(memory, "need_of", noted)
    free(monkeypatch, 0)
    with pytest.raises(InputError):
        generate(*pair, IDS, **options)
    n, width = (1, 1) if method == "one token" else (4, 4)
    needed = asked[0].shared + n * asked[0].each
    free(monkeypatch, needed - 1)
    with pytest.raises(InputError):
        generate(*pair, IDS, **options)
    assert not generated, "nothing was allocated"
    free(monkeypatch, needed)
    generate(*pair, IDS, **options)
    beside = needed - sum(cache.nbytes for cache in generated) - len(IDS) * n * width * 7 * 4
    slots = 9 + width  # behind any token a cycle has room
    assert beside == len(IDS) * n * slots * memory.OF_A_TOKEN


def test_the_largest_number_that_fits_is_named_and_fits(pair, monkeypatch):
    free(monkeypatch, 100_000)
    with pytest.raises(InputError, match="500 particles a request do not fit into memory") as caught:
        generate(*pair, IDS, **{**OPTIONS, "n_particles": 500})
    assert "0.1 MB are free on cpu" in str(caught.value)
    fits = int(re.search(r"n_particles=(\d+) at most", str(caught.value))[1])
    assert 1 < fits < 500
    generate(*pair, IDS, **{**OPTIONS, "n_particles": fits})
    with pytest.raises(InputError, match=f"n_particles={fits} at most"):
        generate(*pair, IDS, **{**OPTIONS, "n_particles": fits + 1})


def test_where_one_particle_is_too_many_there_is_other_advice(pair, monkeypatch):
    free(monkeypatch, 10)
    for options in (OPTIONS, {**OPTIONS, "method": "autoregressive"}):
        with pytest.raises(InputError, match="fix: ask for fewer new tokens or fewer requests"):
            generate(*pair, IDS, **options)
    with pytest.raises(InputError, match="this call does not fit"):
        generate(*pair, IDS, **options)


def test_the_state_of_a_model_of_its_own_counts(monkeypatch):
    model = GRUStep(7)
    free(monkeypatch, None)
    program = generate(model, perturbed(model), IDS, **OPTIONS).program
    assert program.target.runtime.state_bytes(100) == model.initial_state(1)["h"].nbytes
    free(monkeypatch, 10)
    with pytest.raises(InputError, match="do not fit into memory"):
        generate(model, perturbed(model), IDS, **OPTIONS)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells")
def test_an_absurd_number_of_particles_is_refused_by_the_machine_itself(pair):
    with pytest.raises(InputError, match=r"why: .* take at least [\d,]{5,}\.\d GB, and .* GB are free on cpu"):
        generate(*pair, IDS, **{**OPTIONS, "n_particles": 10**10})


def test_what_linux_and_containers_say_is_read(tmp_path):
    table = tmp_path / "meminfo"
    table.write_text("MemTotal:       2000 kB\nMemAvailable:    1000 kB\n")
    assert memory._available(table) == 1_024_000
    assert memory._available(tmp_path / "none") is None
    assert memory._left_to_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert memory._left_to_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._left_to_group(tmp_path) == 300
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 250\n")
    assert memory._left_to_group(tmp_path) == 550
    (tmp_path / "memory").mkdir()
    for name, text in (("limit_in_bytes", "500"), ("usage_in_bytes", "600"), ("stat", "total_inactive_file 50")):
        (tmp_path / "memory" / f"memory.{name}").write_text(text)
    (tmp_path / "memory.max").unlink()
    assert memory._left_to_group(tmp_path) == 0


def test_sizes_are_told_in_the_unit_that_shows_them():
    assert [memory.readable(n) for n in (3 * GB, 300_000_000, 7_000_000, 900)] == [
        "3.0 GB",
        "0.3 GB",
        "7.0 MB",
        "0.9 kB",
    ]
