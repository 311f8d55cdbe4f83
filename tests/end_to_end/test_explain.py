"""``explain`` tells what was found and built, or why a loop cannot be compiled."""

from __future__ import annotations

import time

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.refused_models import REFUSED
from helpers.toys import TableLM, TinyTransformerLM
from torch import Tensor, nn

from smc_compile import decode, explain, generate
from smc_compile.errors import CacheError, LoopError, OptionError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
untraced = pytest.mark.usefixtures("untraced_regions")
MODEL = TinyTransformerLM()
DRAFT = perturbed(MODEL)
IDS = torch.tensor([[0, 1, 2], [3, 2, 0]])
OPTIONS = {"draft": DRAFT, "compiler": "eager", "n_particles": 4, "lookahead": 2, "seed": 0}


def loop(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        probs = torch.softmax(model(ids)[:, -1] / 0.8, -1)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], 1)
    return ids


def greedy(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def hurried(model: nn.Module, ids: Tensor, n: int) -> Tensor:
    start = time.time()
    for _ in range(n):
        ids = torch.cat([ids, torch.multinomial(torch.softmax(model(ids)[:, -1], -1), 1)], 1)
        if time.time() - start > 9:
            break
    return ids


def test_a_report_tells_of_loop_sampler_caches_and_regions():
    report = explain(loop, MODEL, IDS, 5, **OPTIONS)
    assert report.compiled
    assert report.reason is None
    text = str(report)
    for heading in ("loop", "sampler", "method", "target", "draft", "regions", "time"):
        assert report.sections[heading], heading
        assert f"{heading}\n  " in text
    assert report.sections["sampler"] == ["multinomial of softmax: softmax of logits, temperature 0.8"]
    for model in ("target", "draft"):
        lines = "\n".join(report.sections[model])
        assert "cache memory" in lines
        assert "positions: " in lines
        assert "largest relative difference" in lines
    names = {line.split(":")[0] for line in report.sections["regions"]}
    assert names == {"draft_head", "draft_step", "score", "weigh"}


@untraced
@pytest.mark.parametrize(("learned", "reported_as"), [(64, "no limit up to 32"), (20, "at most 20")])
def test_the_end_of_learned_positions_is_told(learned, reported_as):
    model = TinyTransformerLM(max_positions=learned)
    report = explain(loop, model, IDS, 5, **{**OPTIONS, "draft": perturbed(model)})
    assert f"positions: {reported_as}" in report.sections["target"]


@untraced
def test_a_greedy_loop_says_what_its_draft_does():
    report = explain(greedy, MODEL, IDS, 5, **OPTIONS)
    assert report.sections["sampler"] == ["argmax (greedy): argmax, temperature 1"]
    assert report.sections["method"][0].startswith("speculative (exact, the greedy text; ")
    assert report.sections["draft"]


@untraced
def test_a_greedy_loop_says_that_it_needs_no_draft():
    report = explain(greedy, MODEL, IDS, 5, **{**OPTIONS, "draft": None})
    assert report.sections["method"][0].startswith("autoregressive (the cached one-token loop; ")
    assert report.sections["draft"] == []
    report = explain(greedy, MODEL, IDS, 5, **{**OPTIONS, "method": "autoregressive"})
    assert report.sections["method"] == ["autoregressive"]


@untraced
def test_what_decode_has_compiled_can_be_explained():
    compiled = decode(greedy, **OPTIONS)
    compiled(MODEL, IDS, 5)
    assert (
        explain(compiled, MODEL, IDS, 5).sections["loop"] == explain(greedy, MODEL, IDS, 5, **OPTIONS).sections["loop"]
    )


@pytest.mark.parametrize(
    ("function", "model", "kind", "word"),
    [
        (hurried, MODEL, LoopError, "looks at the clock"),
        (loop, REFUSED["bidirectional"][0](vocab=4), CacheError, "attention"),
        (lambda model, ids, n: ids + n, MODEL, LoopError, "no argument counts the iterations"),
    ],
)
def test_a_refused_loop_has_a_reason_and_no_report(function, model, kind, word):
    report = explain(function, model, IDS, 5, **OPTIONS)
    assert not report.compiled
    assert isinstance(report.reason, kind)
    assert word in str(report.reason)
    assert str(report).startswith("cannot be compiled: ")
    assert report.sections == {}


def test_a_bad_option_is_an_error():
    with pytest.raises(OptionError):
        explain(loop, MODEL, IDS, 5, particles=3)


def test_generate_is_explained_with_its_rules():
    """What compiles and what runs on the host is told apart."""
    target = TableLM(5).double()
    calls: list[int] = []

    def on_host(ids, scores):
        calls.append(1)
        return torch.stack([row + len(set(text)) for text, row in zip(ids.tolist(), scores, strict=True)])

    def traced(ids, scores):
        return scores + (torch.arange(scores.shape[1]) == ids[:, -1:])

    options = {"max_new_tokens": 5, "compiler": "eager", "n_particles": 3, "lookahead": 2}
    ids = torch.tensor([[1, 2]])
    report = explain(generate, target, perturbed(target), ids, logits_processor=[traced], top_k=3, **options)
    assert report.sections["rules on the text"] == ["traced: compiled, on target and draft"]
    assert report.sections["sampler"] == [
        "softmax of logits after temperature, top_k",
        "draft: the same of its own logits, mixed with 10% of its distribution under the temperature alone",
    ]
    assert "rules" in {line.split(":")[0] for line in report.sections["regions"]}
    report = explain(generate, target, perturbed(target), ids, logits_processor=[on_host], **options)
    assert report.sections["rules on the text"] == ["on_host: on the host, once a position, on target and draft"]
    assert calls
