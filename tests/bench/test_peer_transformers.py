"""The bench's peer is the same model in the library: same weights in memory, same logits."""

from __future__ import annotations

import pytest
import torch

from smc_compile.bench import peer_transformers as transformers_peer
from smc_compile.bench.peer_transformers import FEW_TOKENS, cut_note, library_twin, tokens_within
from smc_compile.pairs.llama import Llama, LlamaConfig

pytest.importorskip("transformers")


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_the_twin_gives_the_same_logits_from_the_same_memory(heads, kv_heads):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(50, 32, 2, heads, kv_heads, 48, max_positions=64, rope_base=5000.0)).double().eval()
    twin = library_twin(model)
    ids = torch.randint(0, 50, (2, 40))
    with torch.no_grad():
        # The library's rotary table is float32.
        torch.testing.assert_close(twin(ids).logits, model(ids), atol=1e-6, rtol=1e-5)
    assert twin.model.embed_tokens.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert twin.lm_head.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in model.parameters()}


def test_the_twin_generates_as_many_tokens_as_it_is_asked_for():
    torch.manual_seed(0)
    twin = library_twin(Llama(LlamaConfig(50, 32, 2, 4, 2, 48, max_positions=64)).eval())
    ids = torch.randint(0, 50, (1, 7))
    assert twin.generate(ids, max_new_tokens=9, do_sample=True, temperature=0.8, top_k=0).shape == (1, 16)


@pytest.mark.parametrize(("each", "timed"), [(0.01, 256), (0.5, 100), (30.0, FEW_TOKENS)])
def test_a_peer_that_would_take_minutes_is_timed_on_fewer_tokens(monkeypatch, each, timed):
    now = 0.0

    def run(tokens: int) -> None:
        nonlocal now
        now += 10 + each * tokens  # the prompt takes ten seconds

    monkeypatch.setattr(transformers_peer.time, "perf_counter", lambda: now)
    assert tokens_within(60, run, 256) == pytest.approx(timed, abs=1)
    assert ("first" in cut_note(timed, 256)) == (timed < 256)
