"""The genealogy and its picture, on hand-made and random generations."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from helpers.generations import generation as generated

from smc_compile.bench.genealogy import draw_ancestry, texts_by_cycle, trace_genealogy, visible
from smc_compile.errors import InputError, OptionError
from smc_compile.result import Generation, Stats


def random_generation(batch: int = 2, n_particles: int = 6, n_cycles: int = 9, seed: int = 0) -> Generation:
    """A genealogy that resamples every third cycle, with distinct particles."""
    generator = torch.Generator().manual_seed(seed)
    identity = torch.arange(n_particles).expand(batch, n_cycles, n_particles)
    drawn = torch.randint(0, n_particles, (batch, n_cycles, n_particles), generator=generator)
    resampled = (torch.arange(n_cycles) % 3 == 2)[None, :, None]
    particles = torch.arange(batch * n_particles * 7).view(batch, n_particles, 7)
    log_weights = torch.randn(batch, n_particles, generator=generator)
    return generated(
        sequences=particles[:, 3],
        particles=particles,
        log_weights=log_weights,
        log_evidence=torch.zeros(batch),
        ess=torch.rand(batch, n_cycles, generator=generator) * n_particles,
        ancestors=torch.where(resampled, drawn, identity),
        stats=Stats("smc", new_tokens=5, cycles=n_cycles),
    )


def classes(path) -> list[set[str]]:
    """The class names of every path element of the picture."""
    root = ElementTree.parse(path).getroot()
    return [set(element.get("class", "").split()) for element in root.iter("{http://www.w3.org/2000/svg}path")]


def test_a_known_genealogy():
    ancestors = torch.tensor([[[0, 1, 2], [1, 1, 2], [0, 2, 2]]])
    particles = torch.arange(3)[None, :, None].expand(1, 3, 4)
    generation = generated(
        sequences=particles[:, 0],
        particles=particles,
        log_weights=torch.zeros(1, 3),
        log_evidence=torch.zeros(1),
        ess=torch.ones(1, 3),
        ancestors=ancestors,
        stats=Stats("smc", new_tokens=3, cycles=3),
    )
    genealogy = trace_genealogy(generation)
    assert genealogy.lineage == [1, 1, 0, 0]
    assert genealogy.families == [[0, 1, 2], [0, 1, 2], [1, 0, 2], [1, 1, 1]]
    assert [genealogy.resampled(cycle) for cycle in range(3)] == [False, True, True]
    assert genealogy.weights == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("request_index", [0, 1])
def test_the_picture_has_one_line_per_parent_link(tmp_path, request_index):
    generation = random_generation()
    path = draw_ancestry(generation, tmp_path / "a.svg", request=request_index)
    names = classes(path)
    _, n_cycles, n_particles = generation.ancestors.shape
    assert sum("link" in name for name in names) == n_cycles * n_particles
    assert sum("root" in name for name in names) == n_particles
    assert sum({"link", "returned"} <= name for name in names) == n_cycles
    genealogy = trace_genealogy(generation, request_index)
    survivors = sum(family > 0 for level in genealogy.families[1:] for family in level)
    assert sum({"link", "survived"} <= name for name in names) == survivors - n_cycles


def test_the_returned_lineage_follows_the_ancestors():
    generation = random_generation(seed=4)
    lineage = trace_genealogy(generation, 1).lineage
    particle = 3
    for cycle in reversed(range(generation.ancestors.shape[1])):
        assert lineage[cycle + 1] == particle
        particle = int(generation.ancestors[1, cycle, particle])
    assert lineage[0] == particle


def test_the_returned_lineage_is_drawn_connected(tmp_path):
    path = draw_ancestry(random_generation(seed=2), tmp_path / "a.svg")
    data = re.findall(r'class="(?:link|root) returned" d="([^"]*)"', path.read_text())
    ends = {}
    for piece in data:
        numbers = [float(number) for number in re.findall(r"[\d.]+", piece)]
        ends[numbers[0], numbers[1]] = (numbers[2], numbers[1]) if "H" in piece else (numbers[-2], numbers[-1])
    point, steps = min(ends), 0
    while point in ends:
        point, steps = ends[point], steps + 1
    assert steps == len(data) == 10


@pytest.mark.parametrize("seed", range(5))
def test_lines_do_not_cross(seed):
    genealogy = trace_genealogy(random_generation(n_particles=12, seed=seed))
    for cycle, parents in enumerate(genealogy.parents):
        assert sorted(genealogy.rows[cycle + 1]) == list(range(12))
        children = sorted(range(12), key=genealogy.rows[cycle + 1].__getitem__)
        parent_rows = [genealogy.rows[cycle][parents[child]] for child in children]
        assert parent_rows == sorted(parent_rows)


def test_equal_particles_give_the_heaviest():
    generation = random_generation()
    same = torch.zeros_like(generation.particles)
    weights = torch.tensor([[0.0, 5.0, 0.0, 0.0, 0.0, 0.0]] * 2)
    generation = replace(generation, particles=same, sequences=same[:, 0], log_weights=weights)
    assert trace_genealogy(generation).lineage[-1] == 1


def test_all_weights_zero_still_draws(tmp_path):
    generation = replace(random_generation(), log_weights=torch.full((2, 6), -torch.inf))
    assert trace_genealogy(generation).weights == pytest.approx([1 / 6] * 6)
    draw_ancestry(generation, tmp_path / "a.svg")


def test_tokens_are_escaped_and_cut_by_cycle(tmp_path):
    tokens = ["<a", "&", "b>", "\n", " x"]
    assert texts_by_cycle(list("abcdefg"), [2, 2, 2]) == ["abc", "de", "fg"]
    assert texts_by_cycle(list("abcdefg"), [1, 4, 3]) == ["ab", "cdef", "g"]
    generation = replace(random_generation(n_cycles=2), widths=torch.full((2, 2), 2))
    path = draw_ancestry(generation, tmp_path / "a.svg", tokens=tokens)
    texts = [element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]
    assert texts[-2:] == ["<a&b>", "⏎ x"]
    assert visible("x" * 99, 5) == "xxxx…"


def test_control_characters_in_tokens_stay_valid_xml(tmp_path):
    path = draw_ancestry(random_generation(n_cycles=1), tmp_path / "a.svg", tokens=["a\x00\x0bb", "\ud800"])
    assert ElementTree.parse(path) is not None


@pytest.mark.parametrize("name", ["a.png", "a", "a.svg.gz", "missing/a.svg"])
def test_bad_paths(tmp_path, name):
    with pytest.raises(OptionError, match="Cannot write"):
        draw_ancestry(random_generation(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_draw(tmp_path):
    generation = random_generation()
    with pytest.raises(InputError, match="no request 2"):
        draw_ancestry(generation, tmp_path / "a.svg", request=2)
    none = {"ancestors": generation.ancestors[:, :0], "ess": generation.ess[:, :0]}
    empty = replace(generation, **none, stats=Stats("autoregressive", 5))
    with pytest.raises(InputError, match="no genealogy"):
        draw_ancestry(empty, tmp_path / "a.svg")
