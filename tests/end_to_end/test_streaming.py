"""What is streamed as settled is never taken back; the leader is shown as it stands."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.toys import TableLM, TinyTransformerLM

from smc_compile import GenerationError, generate
from smc_compile.errors import OptionError
from smc_compile.runtime.state.settling import settled_tokens

pytestmark = pytest.mark.usefixtures("interpreted")

VOCAB = 5
PROMPTS = torch.tensor([[1, 0, 2], [3, 3, 4], [0, 4, 1]])
OPTIONS = {"n_particles": 6, "lookahead": 2, "ess_threshold": 0.9, "compiler": "eager", "validate": False, "seed": 3}


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.put_calls: list[torch.Tensor] = []
        self.ended = 0
        self.fails_at = fails_at

    def put(self, value: torch.Tensor) -> None:
        if self.fails_at is not None and len(self.put_calls) >= self.fails_at:
            raise ConnectionError("the reader has gone")
        assert not self.ended
        self.put_calls.append(value.clone())

    def end(self) -> None:
        self.ended += 1

    @property
    def tokens(self) -> list[int]:
        return torch.cat([value.flatten() for value in self.put_calls]).tolist()


@pytest.fixture(scope="module")
def pair():
    target = TinyTransformerLM(VOCAB, max_positions=64).double()
    return target, perturbed(target, 0.5)


def run(pair, ids=PROMPTS, n=20, **options):
    return generate(*pair, ids, max_new_tokens=n, **{**OPTIONS, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": 2},
        {"ess_threshold": 0.0},
        {"max_lag": 0},
        {"max_lag": 4, "ess_threshold": 0.0},
        {"n_particles": 1},
        {"method": "autoregressive", "eos_token_id": 2},
        {"temperature": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_was_streamed_is_the_answer(pair, options, seed):
    """Prompt first, then every token once, and one end; asking for a stream changes nothing but ``lag``."""
    streamers = [Recorder() for _ in PROMPTS]
    streamed = run(pair, n=[20, 9, 14], streamer=streamers, **{**options, "seed": seed})
    for b, streamer in enumerate(streamers):
        length = int(streamed.new_lengths[b])
        assert streamer.tokens == streamed.sequences[b, : 3 + length].tolist()
        assert streamer.ended == 1
    if "max_lag" not in options:
        assert torch.equal(run(pair, n=[20, 9, 14], **{**options, "seed": seed}).particles, streamed.particles)


def test_tokens_come_while_the_generation_runs(pair):
    came: list[tuple[int, int]] = []
    g = run(pair, PROMPTS[:1], 30, streamer=lambda p: came.append((len(p.tokens), p.finished)), max_lag=6)
    before_the_end = [length for length, finished in came if not finished]
    assert before_the_end == sorted(before_the_end)
    assert before_the_end[-1] >= 30 - 6 - 3
    assert came[-1] == (30, True)
    assert g.lag.shape == g.ess.shape
    assert (g.lag <= 6 + 3).all(), "a lag of at most max_lag and one cycle"
    assert g.stats.settled_early > 0


def test_the_lag_without_a_bound_is_told(pair):
    g = run(pair, PROMPTS[:1], 30, streamer=lambda p: None, ess_threshold=0.0)
    assert g.lag[0, -1] == 30 - settled_tokens(g.particles[0, :, 3:], g.log_weights[0])
    assert run(pair, PROMPTS[:1], 6).lag.shape == (1, 0)


def test_the_leader_is_the_heaviest_particle_and_may_be_revised(pair):
    seen = []
    g = run(pair, PROMPTS[:1], 30, streamer=seen.append, stream="leader", ess_threshold=0.0)
    running = [p for p in seen if not p.finished]
    assert all(len(p.tokens) >= p.settled for p in running)
    assert torch.equal(running[-1].tokens, g.particles[0, g.log_weights[0].argmax(), 3:])
    assert torch.equal(seen[-1].tokens, g.sequences[0, 3:])
    pairs = itertools.pairwise(running)
    assert any(not torch.equal(a.tokens, b.tokens[: len(a.tokens)]) for a, b in pairs), "some leader was overtaken"
    for p in running:
        assert torch.equal(p.tokens[: p.settled], g.sequences[0, 3 : 3 + p.settled])


def test_a_finished_request_is_told_at_once(pair):
    order: list[tuple[int, bool]] = []
    run(pair, n=[20, 4, 12], streamer=lambda p: order.append((p.request, p.finished)))
    assert [request for request, finished in order if finished] == [1, 2, 0]
    assert (1, False) not in order[order.index((1, True)) :]


@pytest.mark.parametrize("fails_at", [0, 1, 5])
def test_a_streamer_that_raises_loses_nothing(pair, fails_at):
    with pytest.raises(GenerationError, match=r"streamer broke off[\s\S]*ConnectionError: the reader") as caught:
        run(pair, PROMPTS[:1], streamer=Recorder(fails_at), max_lag=2)
    assert isinstance(caught.value.__cause__, ConnectionError)
    partial = caught.value.partial
    assert torch.equal(partial.sequences[:, :3], PROMPTS[:1])
    assert partial.sequences.shape[1] > 3


BAD = [
    ({"streamer": Recorder()}, "1 streamers for 3 requests"),
    ({"streamer": [Recorder(), Recorder()]}, "2 streamers for 3 requests"),
    ({"streamer": [Recorder()] * 3, "stream": "leader"}, 'stream="leader" needs a function'),
    ({"stream": "leader"}, 'stream="leader" needs a streamer'),
    ({"streamer": 3}, "must have put"),
    ({"streamer": print, "stream": "best"}, "stream 'best' is unknown"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: str(v)[:40])
def test_a_streamer_that_does_not_fit_is_refused(pair, options, message):
    with pytest.raises(OptionError, match=message):
        run(pair, **options)


def test_dead_particles_do_not_hold_tokens_back():
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4], [0, 0, 0]])
    assert settled_tokens(tokens, torch.tensor([0.0, -1.0, -torch.inf])) == 2
    assert settled_tokens(tokens, torch.tensor([0.0, -1.0, -50.0])) == 0
    assert settled_tokens(tokens, torch.tensor([0.0, -torch.inf, -torch.inf])) == 3


def test_a_stream_of_a_table_model_is_its_answer():
    """Weights that differ much settle fast: some tokens come before the end without any bound."""
    target = TableLM(VOCAB).double()
    pair = target, perturbed(target, 2.0)
    seen = []
    run(pair, PROMPTS[:1], 24, streamer=seen.append)
    assert 0 < max(p.settled for p in seen if not p.finished) < 24
