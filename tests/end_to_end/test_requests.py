"""Requests of one batch differ in prompt, sampler, seed, end and length, and nothing of one depends on another."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.models import CACHEABLE
from helpers.toys import TableLM, TinyTransformerLM
from torch import Tensor, nn

from smc_compile import Generation, generate
from smc_compile.errors import GenerationError, InputError, OptionError

VOCAB = 7
PROMPTS = torch.tensor([[6, 6, 1, 0, 2], [3, 3, 4, 1, 5], [6, 6, 6, 6, 2], [6, 2, 1, 0, 4]])
LENGTHS = [3, 5, 1, 4]
MASK = torch.arange(5) >= 5 - torch.tensor(LENGTHS)[:, None]
OPTIONS = {"n_particles": 5, "lookahead": 2, "ess_threshold": 0.9, "compiler": "eager", "validate": False}
FIELDS = ("log_weights", "log_evidence")
interpreted = pytest.mark.usefixtures("interpreted")


@pytest.fixture(scope="module")
def pair():
    target = TinyTransformerLM(VOCAB, max_positions=64).double()
    return target, perturbed(target, 0.5)


def run(pair, ids: Tensor = PROMPTS, n=12, **options) -> Generation:
    return generate(*pair, ids, max_new_tokens=n, **{"seed": 7, **OPTIONS, **options})


def assert_row_is(together: Generation, b: int, alone: Generation, prompt: int, n: int) -> None:
    """Row b of a batch against a call of its own with a prompt of its own length."""
    width = PROMPTS.shape[1]
    assert torch.equal(together.particles[b, :, width : width + n], alone.particles[0, :, prompt:])
    assert torch.equal(together.sequences[b, width : width + n], alone.sequences[0, prompt:])
    assert torch.equal(together.new_lengths[b], alone.new_lengths[0])
    for name in FIELDS:
        torch.testing.assert_close(getattr(together, name)[b], getattr(alone, name)[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(together.log_probs[b, :n], alone.log_probs[0], atol=1e-9, rtol=0)
    cycles = alone.ess.shape[1]
    torch.testing.assert_close(together.ess[b, :cycles], alone.ess[0], atol=1e-6, rtol=0)
    assert together.ess[b, cycles:].isnan().all()


# ---- the last position -----------------------------------------------------------------------------------------------


class TableMask(nn.Module):
    """Learned positions and a mask of so many, sliced: what a key past the last of them is, no table says."""

    def __init__(self, positions: int, seed: int, transposed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(size, generator=generator) for size in ((VOCAB, 4), (40, 4), (4, VOCAB))]
        self.embed, self.place, self.head = (nn.Parameter(w.double()) for w in weights)
        self.place = nn.Parameter(self.place[:positions].clone())
        seen = torch.ones(positions, positions, dtype=torch.bool).tril()
        self.register_buffer("seen", seen.T.contiguous() if transposed else seen)
        self.transposed = transposed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed[ids] + self.place[: ids.shape[1]]  # [B, S, d]
        seen, scores = self.seen[: ids.shape[1], : ids.shape[1]], 2 * x @ x.mT
        if self.transposed:
            scores = scores.mT.masked_fill(~seen, -1e9).softmax(1).mT  # over keys, which stand in front
        else:
            scores = scores.masked_fill(~seen, -1e9).softmax(-1)
        return (x + scores @ x) @ self.head


def of_learned_positions(positions: int, seed: int) -> nn.Module:
    model, longest = (TinyTransformerLM(VOCAB, max_positions=n, seed=seed).double() for n in (positions, 40))
    weights, size = model.state_dict(), longest.state_dict()
    model.load_state_dict({name: size[name][: len(weight)] for name, weight in weights.items()})
    return model


LIMITED = {
    "learned positions": of_learned_positions,
    "a table as the mask": TableMask,
    "keys in front": lambda positions, seed: TableMask(positions, seed, transposed=True),
}


@interpreted
@pytest.mark.parametrize("kind", LIMITED)
@pytest.mark.parametrize("method", ["smc", "speculative", "autoregressive"])
def test_the_last_token_needs_no_position(method, kind):
    """It is drawn and never read; slots of a block that lie past it change nothing."""
    short, long = ([LIMITED[kind](positions, seed) for seed in (0, 1)] for positions in (12, 40))
    for lookahead in (1, 2, 3, 5) if method != "autoregressive" else (1,):
        options = {"method": method, "attention_mask": MASK, "n": [8, 3, 10, 9], "lookahead": lookahead}
        there = run(short, **options)
        room = run(long, **options)
        assert torch.equal(there.particles, room.particles)
        for name in (*FIELDS, "log_probs"):
            torch.testing.assert_close(getattr(there, name), getattr(room, name), equal_nan=True)


# ---- prompts of several lengths --------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    "kind", [n for n in CACHEABLE if n in ("gpt", "llama", "alibi", "sliding_window", "merged_heads")]
)
@pytest.mark.parametrize("method", ["smc", "autoregressive"])
def test_a_padded_prompt_is_the_prompt(kind, method):
    target = CACHEABLE[kind](vocab=VOCAB, layers=1).double()
    pair = target, perturbed(target, 0.5)
    together = run(pair, attention_mask=MASK, method=method)
    assert torch.equal(together.sequences[:, :5], PROMPTS), "the prompt comes back as it was given"
    for b, length in enumerate(LENGTHS):
        alone = run(pair, PROMPTS[b : b + 1, 5 - length :], seed=7 + b, method=method)
        assert_row_is(together, b, alone, length, 12)


@interpreted
def test_what_the_padding_is_does_not_matter(pair):
    other = torch.where(MASK, PROMPTS, 0)
    a, b = run(pair, attention_mask=MASK), run(pair, other, attention_mask=MASK)
    assert torch.equal(a.particles[..., 5:], b.particles[..., 5:])
    assert torch.equal(a.log_weights, b.log_weights)


@interpreted
@pytest.mark.parametrize("kind", ["gpt", "gpt_sliced_positions"])
def test_the_shorter_prompt_may_take_all_positions(kind):
    """Learned positions end at nine: 5 + 5 and 3 + 7 fit, and padding is hidden from the last of them."""
    target = CACHEABLE[kind](vocab=VOCAB, max_positions=9).double()
    pair = target, perturbed(target, 0.5)
    together = run(pair, PROMPTS[:2], [7, 5], attention_mask=MASK[:2])
    for b, n in enumerate((7, 5)):
        alone = run(pair, PROMPTS[b : b + 1, 5 - LENGTHS[b] :], n, seed=7 + b)
        assert_row_is(together, b, alone, LENGTHS[b], n)
    with pytest.raises(InputError, match="3 \\+ 8 - 1 > 9"):
        run(pair, PROMPTS[:2], [8, 5], attention_mask=MASK[:2])


# ---- settings of each request ----------------------------------------------------------------------------------------

EACH = {
    "temperature": [0.5, 1.0, 1.7, 0.9],
    "top_k": [0, 3, 0, 2],
    "top_p": [1.0, 0.8, 0.9, 1.0],
    "min_p": [0.0, 0.0, 0.2, 0.1],
    "seed": [3, 1, 4, 1],
    "eos_token_id": [[1, 2], [], [0], [3, 4, 5, 6, 2]],
    "pad_token_id": [0, 1, 2, 3],
}


@interpreted
@pytest.mark.parametrize("method", ["smc", "autoregressive"])
def test_settings_of_one_request_are_its_own(pair, method):
    caps = [12, 5, 9, 1]
    together = run(pair, n=caps, attention_mask=MASK, method=method, **EACH)
    for b, length in enumerate(LENGTHS):
        own = {name: [values[b]] for name, values in EACH.items()}
        alone = run(pair, PROMPTS[b : b + 1, 5 - length :], caps[b], method=method, **own)
        assert_row_is(together, b, alone, length, caps[b])
        assert (together.sequences[b, 5 + caps[b] :] == EACH["pad_token_id"][b]).all()


def test_nothing_recompiles_when_settings_seeds_ends_caps_and_lengths_change(pair):
    program = run(pair, n=6, temperature=0.8, top_p=0.9, eos_token_id=2).program
    before = {region.name: region.compilations for region in program.regions}
    run(pair, n=[9, 3, 4, 8], temperature=[0.4, 1.0, 2.0, 3.0], top_p=[0.5, 1.0, 0.7, 0.2], seed=[1, 2, 3, 4])
    last = run(pair, n=7, top_p=0.3, eos_token_id=[[1], [1, 2, 3], [], [0]], attention_mask=MASK, stop_strings=None)
    assert last.program is program
    assert {region.name: region.compilations for region in program.regions} == before


@interpreted
def test_a_finished_request_leaves_when_a_smaller_batch_is_compiled(pair):
    session = run(pair, PROMPTS[:1], 3).program.session
    sizes: list[int] = []
    cycle = type(session).advance
    try:
        type(session).advance = lambda self, run: (sizes.append(run.request.batch), cycle(self, run))[1]
        together = run(pair, n=[14, 2, 2, 2])
    finally:
        type(session).advance = cycle
    assert sizes == [4, 1, 1, 1, 1]
    alone = run(pair, PROMPTS[:1], 14)
    assert torch.equal(together.particles[0], alone.particles[0])


@interpreted
@pytest.mark.parametrize("method", ["smc", "autoregressive"])
def test_a_recurrent_model_counts_positions_past_a_neighbours_cap(method):
    """A request that has finished stays on its last position; the others go on."""
    target = Recurrent()
    together = run((target, target), PROMPTS[:2], [3, 12], method=method)
    alone = run((target, target), PROMPTS[1:2], 12, seed=8, method=method)
    assert_row_is(together, 1, alone, 5, 12)


class Recurrent(nn.Module):
    """Follows the step protocol; its logits depend on the position and on the sum of the tokens."""

    def initial_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1, dtype=torch.float64)

    def step(self, tokens: Tensor, pos: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        sums = state + tokens.double().cumsum(1)  # [R, T]
        places = pos + torch.arange(tokens.shape[1])
        logits = torch.sin(sums[..., None] + 1.3 * places[:, None] + torch.arange(VOCAB)) * 2
        return logits, sums[:, -1:]


@interpreted
def test_nan_beyond_the_cap_of_a_finished_request_is_nobodys_trouble():
    target = TableLM(VOCAB).double()
    with torch.no_grad():
        target.table[6] = math.nan
    ids = torch.tensor([[1], [2]])
    ended = 0
    for seed in range(12):
        options = {"method": "autoregressive", "seed": seed, "eos_token_id": 6}
        try:
            alone = run((target, None), ids[1:], 4, **{**options, "seed": seed + 1})
        except GenerationError:
            continue
        together = run((target, None), ids, [1, 4], **{**options, "eos_token_id": [[], [6]]})
        assert torch.equal(together.sequences[1], alone.sequences[0])
        ended += int(together.sequences[0, 1] == 6)
    assert ended > 0, "some first token must lead to NaN, or this test sees nothing"


@interpreted
def test_a_list_for_each_prompt_serves_all_its_sequences(pair):
    options = {"num_return_sequences": 2, "seed": [1, 2, 3, 4]}
    g = run(pair, PROMPTS[:2], [3, 7], temperature=[0.5, 1.5], eos_token_id=[[2], []], **options)
    assert g.particle_lengths.amax(1).tolist()[2:] == [7, 7]
    alone = run(pair, PROMPTS[1:2], 7, temperature=1.5, seed=4)
    assert torch.equal(g.particles[3, :, : 5 + 7], alone.particles[0])


def test_a_model_that_raises_loses_nothing():
    class Fails(nn.Module):
        def initial_state(self, batch: int) -> Tensor:
            return torch.zeros(batch, 1)

        def step(self, tokens: Tensor, pos: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            if int(pos) > 8:
                raise RuntimeError("out of paper")
            return torch.zeros(*tokens.shape, VOCAB), state

    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="out of paper") as caught:
        run((Fails(), Fails()), PROMPTS[:1])
    assert caught.value.partial.sequences.shape[1] > 5


# ---- log-probabilities -----------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("method", ["smc", "autoregressive"])
def test_log_probs_are_the_targets_own(pair, method):
    g = run(pair, method=method, temperature=0.7, eos_token_id=2, n=10)
    logits = pair[0](g.particles.flatten(0, 1)) / 0.7
    own = logits.log_softmax(-1)[:, 4:-1].gather(2, g.particles.flatten(0, 1)[:, 5:, None])[..., 0].view(4, -1, 10)
    counted = torch.arange(10) < g.particle_lengths[..., None]
    torch.testing.assert_close(g.particle_log_probs, torch.where(counted, own, 0.0), atol=1e-9, rtol=0)
    ended = (g.sequences[:, 5:] == 2).int().cumsum(1) > 0
    assert torch.equal(g.new_lengths, (~ended).sum(1) + ended.any(1))
    assert (g.log_probs != 0).sum(1).tolist() == g.new_lengths.tolist()


@interpreted
def test_a_result_reads_like_an_output_of_transformers(pair):
    g = run(pair, n=3)
    assert g["sequences"] is g.sequences
    assert g[0] is g.sequences
    assert "log_evidence" in g
    assert list(g) == g.keys()
    assert dict(g.items()).keys() == set(g.keys())
    assert g.to_tuple()[:2] == (g.sequences, g.particles)
    with pytest.raises(KeyError):
        g["logits"]


@interpreted
def test_each_return_sequence_is_a_population_of_its_own(pair):
    g = run(pair, PROMPTS[:2], 8, num_return_sequences=3)
    assert g.sequences.shape == (6, 13)
    assert torch.equal(g.sequences[:, :5], PROMPTS[:2].repeat_interleave(3, 0))
    alone = run(pair, PROMPTS[1:2], 8, seed=7 + 4)
    assert torch.equal(g.particles[4], alone.particles[0])


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = [
    ({"temperature": [1.0, 0.5]}, "temperature has 2 values for 4 requests"),
    ({"temperature": [1.0, 0.0, 1.0, 1.0]}, "temperature 0 and other temperatures"),
    ({"temperature": -1.0}, "temperature must be a number"),
    ({"temperature": math.nan}, "temperature must be a number"),
    ({"top_p": 1.5}, "top_p must be a number between 0 and 1"),
    ({"top_k": -2}, "top_k must be"),
    ({"eos_token_id": [[1], [2]]}, "eos_token_id has 2 lists for 4 requests"),
    ({"eos_token_id": -3}, "eos_token_id must be token ids"),
    ({"seed": [1, 2]}, "seed has 2 values for 4 requests"),
    ({"num_return_sequences": 0}, "num_return_sequences must be"),
    ({"max_lag": -1}, "max_lag must be"),
    ({"stop_strings": ["a"]}, "stop_strings need a tokenizer"),
    ({"generation_config": object(), "top_p": 0.5}, "top_p cannot be given beside generation_config"),
    ({"top_k": 4.9}, "top_k must be an integer"),
    ({"generation_config": object()}, "generation_config needs a transformers model"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: str(v)[:30])
def test_a_bad_option_is_refused(pair, options, message):
    with pytest.raises(OptionError, match=message):
        run(pair, **options)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK[:, 1:], "shape of the prompts"),
        (MASK.flip(1), "hides its last token"),
        (torch.tensor([[1, 0, 1, 1, 1]] * 4), "has a hole"),
        (MASK & torch.tensor([[True], [True], [False], [True]]), "hides all tokens of row 2"),
        ([[1] * 5] * 4, "shape of the prompts"),
    ],
)
def test_a_bad_mask_is_refused(pair, mask, message):
    with pytest.raises(InputError, match=message):
        run(pair, attention_mask=mask)


@pytest.mark.parametrize("n", [0, [3, 0, 1, 1], None, 2.5, True])
def test_a_bad_length_is_refused(pair, n):
    with pytest.raises(InputError, match="positive integer"):
        run(pair, n=n)


def test_a_pad_token_out_of_range_is_refused():
    target = TableLM(VOCAB).double()
    with pytest.raises(InputError, match="pad_token_id is out of range"):
        run((target, perturbed(target, 0.5)), pad_token_id=VOCAB)
