"""``model.generate(custom_generate=smc_compile.transformers.generate)`` against the library's own generate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.enumeration import chi_square_p_value

import smc_compile
from smc_compile.control import Regex
from smc_compile.errors import InputError, OptionError
from smc_compile.inputs.generation_config import OURS, PREPARED, check_config
from smc_compile.pairs.shipped import load_pair
from smc_compile.program.from_model import programs

transformers = pytest.importorskip("transformers")
VOCAB = 11
IDS = torch.tensor([[5, 3, 7, 1], [1, 9, 0, 2]])
interpreted = pytest.mark.usefixtures("interpreted")


def llama(seed: int, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, initializer_range=0.6,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def target() -> Any:
    return llama(0)


@pytest.fixture(scope="module")
def draft() -> Any:
    return llama(1, layers=1)


@pytest.fixture(scope="module")
def ours(target, draft):
    def call(ids: torch.Tensor = IDS, **options: Any) -> Any:
        options = {"compiler": "eager", "draft_model": draft, "seed": 0, "n_particles": 4, "lookahead": 2, **options}
        return target.generate(ids, custom_generate=smc_compile.transformers.generate, **options)

    return call


@interpreted
@pytest.mark.parametrize("method", ["smc", "autoregressive", "speculative"])
def test_greedy_equals_the_library(target, ours, method):
    expected = target.generate(IDS, max_new_tokens=20, do_sample=False)
    assert torch.equal(ours(max_new_tokens=20, do_sample=False, method=method), expected)


@interpreted
def test_greedy_stops_pads_and_cuts_as_the_library_does(target, ours):
    """Every token serves as the end once: rows end at different places, some not at all."""
    ended = 0
    for eos in range(VOCAB):
        stop = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": eos, "pad_token_id": 4}
        expected = target.generate(IDS, **stop)
        assert torch.equal(ours(**stop), expected), eos
        ended += expected.shape[1] < IDS.shape[1] + 12
    assert ended > 0


DISTRIBUTIONS = [
    {"temperature": 0.7, "top_k": 0},
    {"top_k": 4},
    {"top_k": 0, "top_p": 0.7},
    {"top_k": 0, "min_p": 0.2},
    {"top_k": 0, "typical_p": 0.8},
    {"top_k": 6, "temperature": 1.3, "top_p": 0.9, "suppress_tokens": [3]},
]


@interpreted
@pytest.mark.parametrize("settings", DISTRIBUTIONS, ids=str)
def test_processors_give_the_librarys_distribution(target, ours, settings):
    """The first token of 4096 draws: chi-square at level 1e-4 each, against the library's own processed scores."""
    own = target.generate(
        IDS[:1], max_new_tokens=1, do_sample=True, output_scores=True, return_dict_in_generate=True, **settings
    )
    distribution = own.scores[0][0].double().softmax(-1)
    many = IDS[:1].expand(4096, -1)
    drawn = ours(many, max_new_tokens=1, do_sample=True, method="autoregressive", **settings)[:, -1:]
    assert chi_square_p_value(drawn, distribution) > 1e-4


@interpreted
def test_the_population_comes_back_when_asked(ours):
    output = ours(max_new_tokens=9, do_sample=True, eos_token_id=2, pad_token_id=4, return_dict_in_generate=True)
    assert output.sequences.shape[0] == 2
    assert output["particles"].shape[:2] == (2, 4)
    assert output.log_weights.shape == (2, 4)
    assert output.log_evidence.shape == (2,)
    for row in output.particles.flatten(0, 1)[:, IDS.shape[1] :].tolist():
        if 2 in row:
            assert set(row[row.index(2) + 1 :]) <= {4}, "nothing but padding after the end"


@interpreted
def test_each_returned_sequence_is_an_independent_request(ours):
    rows = ours(IDS[:1], max_new_tokens=12, do_sample=True, top_k=0, num_return_sequences=3)
    assert rows.shape == (3, IDS.shape[1] + 12)
    assert len({tuple(row) for row in rows.tolist()}) == 3


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_compile_with_truncating_processors(dtype):
    """Rounding decides which token is the last that top-k keeps: that is no difference between the two models."""
    model = llama(0, layers=1).to(dtype)
    options = {"draft_model": llama(1, layers=1).to(dtype), "compiler": "eager", "seed": 0, "lookahead": 2}
    result = model.generate(
        IDS, max_new_tokens=6, do_sample=True, top_k=5, custom_generate=smc_compile.transformers.generate, **options
    )
    assert result.shape == (2, IDS.shape[1] + 6)


@interpreted
def test_settings_that_are_numbers_of_warpers_share_a_program(ours):
    ours(max_new_tokens=3, do_sample=True, top_p=0.8, seed=1)
    before = len(programs), list(programs)[-1]
    ours(max_new_tokens=7, do_sample=True, top_p=0.85, temperature=1.3, seed=2)
    assert (len(programs), list(programs)[-1]) == before
    ours(max_new_tokens=3, do_sample=True, typical_p=0.8, seed=1)
    assert list(programs)[-1] != before[1]


# ---- processors that read the text, ends, stops: token for token what the library's own greedy loop makes -----------

HISTORY = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5], [7, 3], [1, 2, 3]]},
    {"sequence_bias": [[[4], 2.5], [[9, 2], -3.0]]},
    {"min_new_tokens": 5, "eos_token_id": [2, 5, 9]},
    {"min_length": 8, "eos_token_id": [2, 5, 9]},
    {"forced_eos_token_id": 2},
    {"suppress_tokens": [1, 2, 3], "begin_suppress_tokens": [4, 5]},
    {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 2},
    {"begin_suppress_tokens": list(range(6))},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[6]], "eos_token_id": [2, 9]},
]


@interpreted
@pytest.mark.parametrize("padded", [False, True], ids=["one length", "padded"])
@pytest.mark.parametrize("settings", HISTORY, ids=lambda s: "+".join(s))
def test_greedy_with_processors_equals_the_library(target, ours, settings, padded):
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]) if padded else torch.ones_like(IDS)
    given = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "pad_token_id": 10, **settings}
    expected = target.generate(IDS, **given)
    assert torch.equal(ours(**given), expected)


def test_compiled_processors_equal_the_library(target, ours):
    given = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 10, **HISTORY[-1]}
    assert torch.equal(ours(**given), target.generate(IDS, **given))


@interpreted
@pytest.mark.parametrize("length", [1, 4, 6, 7, 8])
def test_rules_on_the_length_hold_at_every_length(target, ours, length):
    """A trace at some length must not take a branch at that length for none."""
    ids = (torch.arange(2 * length).view(2, length) * 3) % 9
    given = {"max_length": length + 1, "do_sample": False, "pad_token_id": 10}
    for settings in ({"forced_eos_token_id": 2}, {"begin_suppress_tokens": list(range(9))}):
        assert torch.equal(ours(ids, **given, **settings), target.generate(ids, **given, **settings))


class Alternating(transformers.LogitsProcessor):
    """A custom rule on the text: an even token follows an odd one."""

    def __call__(self, input_ids, scores):
        same = torch.arange(scores.shape[1]) % 2 == input_ids[:, -1:] % 2
        return scores.masked_fill(same, -math.inf)


class LastThree(transformers.StoppingCriteria):
    """Stops when three tokens in a row fall."""

    def __call__(self, input_ids, scores, **kwargs):
        a, b, c = input_ids[:, -3], input_ids[:, -2], input_ids[:, -1]
        return (a > b) & (b > c)


@interpreted
def test_custom_processors_and_criteria_equal_the_library(target, ours):
    given = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 10, "eos_token_id": 7}
    given["logits_processor"] = transformers.LogitsProcessorList([Alternating()])
    given["stopping_criteria"] = transformers.StoppingCriteriaList([LastThree()])
    expected = target.generate(IDS, **given)
    assert torch.equal(ours(**given), expected)
    assert expected.shape[1] < IDS.shape[1] + 14 or (expected[:, -1] == 10).any(), "the criterion must stop something"


@interpreted
def test_allowed_tokens_are_asked_for_each_request(target, ours):
    def allowed(request: int, text: torch.Tensor) -> list[int]:
        return [t for t in range(VOCAB) if t % 2 == request]

    given = {"max_new_tokens": 6, "prefix_allowed_tokens_fn": allowed, "pad_token_id": 10}
    assert torch.equal(ours(do_sample=False, **given), target.generate(IDS, do_sample=False, **given))
    drawn = ours(do_sample=True, seed=0, **given)[:, IDS.shape[1] :]
    assert (drawn % 2 == torch.tensor([[0], [1]])).all()


@interpreted
def test_rotary_positions_beyond_the_configuration_are_told(target, ours, caplog):
    """Both models were configured for 64 positions and run on, as in the library."""
    out = ours(IDS, max_new_tokens=62, do_sample=True, return_dict_in_generate=True)
    assert [warning.split(":")[0] for warning in out.stats.warnings if "positions" in warning] == [
        f"the {name} was asked for 65 positions, and its configuration names 64" for name in ("target", "draft")
    ]
    assert "beyond them it may do worse" in caplog.text
    warnings = ours(IDS, max_new_tokens=61, do_sample=True, return_dict_in_generate=True).stats.warnings
    assert not any("positions" in warning for warning in warnings)


@interpreted
def test_scores_and_logits_are_those_of_the_library(target, ours):
    given = {"max_new_tokens": 5, "do_sample": False, "repetition_penalty": 1.4, "pad_token_id": 10}
    given |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    mine, theirs = ours(**given), target.generate(IDS, **given)
    assert len(mine.logits) == len(theirs.logits) == 5
    torch.testing.assert_close(torch.stack(mine.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(mine.scores), torch.stack(theirs.scores), rtol=1e-4, atol=1e-5)
    of_tokens = torch.stack(theirs.scores, 1).log_softmax(-1).gather(2, mine.sequences[:, IDS.shape[1] :, None])[..., 0]
    torch.testing.assert_close(mine.log_probs.float(), of_tokens, rtol=1e-4, atol=1e-4)


@interpreted
def test_a_potential_gives_what_it_gives_without_the_library(target, draft, ours):
    """Also where a config is handed to our own generate; the tokenizer has a name that the library leaves free."""
    tokens = [bytes([97 + i]) for i in range(VOCAB - 1)] + [None]
    pattern = Regex("a(b|c)*d")
    own = smc_compile.generate(
        target, draft, IDS, potential=pattern, tokenizer=tokens, max_new_tokens=8, eos_token_id=10, n_particles=4,
        lookahead=2, seed=0, compiler="eager",
    )  # fmt: skip
    given = {"max_new_tokens": 8, "do_sample": True, "top_k": 0, "eos_token_id": 10, "pad_token_id": 10}
    through = ours(
        potential=pattern, text_tokenizer=tokens, return_dict_in_generate=True, attention_mask=IDS.ge(0), **given
    )
    config = transformers.GenerationConfig(**given)
    beside = smc_compile.generate(
        target, draft, IDS, generation_config=config, potential=pattern, tokenizer=tokens, n_particles=4, lookahead=2,
        seed=0, compiler="eager",
    )  # fmt: skip
    for other in (through, beside):
        assert torch.equal(other.log_evidence, own.log_evidence)
        assert torch.equal(other.sequences, own.sequences[:, : other.sequences.shape[1]])
    with pytest.raises(OptionError, match="a potential needs the tokenizer"):
        ours(potential=pattern, **given)


REFUSED = [
    ({"num_beams": 3}, "num_beams=3 is not supported"),
    ({"encoder_repetition_penalty": 1.4}, "encoder_repetition_penalty=1.4 is not supported"),
    ({"guidance_scale": 1.5}, "guidance_scale=1.5 is not supported"),
    ({"at_limit": "cut"}, "at_limit needs a potential"),
    ({"max_lag": -3}, "max_lag must be"),
    ({"draft_model": None}, "no draft model was given"),
    ({"n_particles": 0}, "n_particles must be at least 1"),
    ({"stream": "lead"}, "stream 'lead' is unknown"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_honoured_is_refused_by_name(ours, settings, message):
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        ours(max_new_tokens=6, **{"do_sample": True, **settings})


@pytest.mark.parametrize(
    ("mask", "message"),
    [([[1, 1, 1, 0], [1, 1, 1, 1]], "hides its last token"), ([[1, 0, 1, 1], [1, 1, 1, 1]], "has a hole")],
)
def test_padding_stands_in_front(ours, mask, message):
    with pytest.raises(InputError, match=message):
        ours(max_new_tokens=3, do_sample=True, attention_mask=torch.tensor(mask))


def test_no_field_of_the_config_is_ignored():
    """A field is acted on by the loop, by what the library prepares, or refused with its name."""
    known = {*OURS, *PREPARED}
    for name in vars(transformers.GenerationConfig()):
        if name in known or name.startswith("_"):
            continue
        config = transformers.GenerationConfig()
        setattr(config, name, "asked for")
        with pytest.raises(OptionError, match=f"{name}='asked for' is not supported"):
            check_config(config)


@interpreted
def test_stop_strings_stop_where_the_library_stops():
    """Three ways: the library's criterion, a config with stop strings beside it, and strings alone."""
    *_, pieces, _ = load_pair()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=pieces.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.tensor([pieces.encode("def add(a, b):").ids])
    given = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    free = model.generate(ids, **given)
    word = pieces.decode(free[0, ids.shape[1] + 4 : ids.shape[1] + 6].tolist()).strip()
    expected = model.generate(ids, stop_strings=[word], tokenizer=tokenizer, **given)
    assert ids.shape[1] < expected.shape[1] < free.shape[1]
    criterion = transformers.StopStringCriteria(tokenizer, [word])
    ours = {"custom_generate": smc_compile.transformers.generate, "compiler": "eager"}
    assert torch.equal(model.generate(ids, stopping_criteria=[criterion], **ours, **given), expected)
    plain = transformers.GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    beside = {"generation_config": plain, "stop_strings": [word], "tokenizer": tokenizer, "compiler": "eager"}
    own = smc_compile.generate(model, None, ids, attention_mask=torch.ones_like(ids), **beside)
    assert torch.equal(own.sequences, expected)
    alone = {
        "max_new_tokens": 12,
        "temperature": 0,
        "stop_strings": [word],
        "tokenizer": tokenizer,
        "compiler": "eager",
    }
    assert smc_compile.generate(model, None, ids, **alone).new_lengths == expected.shape[1] - ids.shape[1]
