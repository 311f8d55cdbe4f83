import pytest
import torch
from helpers.enumeration import (
    chi_square_p_value,
    draw,
    sample_loop,
    sequence_distribution,
    total_variation,
    tv_noise_floor,
)
from helpers.toys import TableLM, TinyTransformerLM

PROMPT = torch.tensor([1, 0])


def top_two(logits):
    return logits.masked_fill(logits < logits.topk(2).values[..., -1:], float("-inf"))


def two_state_chain():
    model = TableLM(vocab=2).double()
    with torch.no_grad():
        model.table.copy_(torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64).log())
    return model


def test_distribution_by_hand():
    distribution = sequence_distribution(two_state_chain(), PROMPT, 2, vocab=2)
    expected = [[0.25 * 0.25, 0.25 * 0.75], [0.75 * 0.5, 0.75 * 0.5]]
    torch.testing.assert_close(distribution, torch.tensor(expected, dtype=torch.float64))


def test_distribution_by_hand_with_eos():
    distribution = sequence_distribution(
        two_state_chain(), PROMPT, 2, vocab=2, eos=1
    )  # the 1 in the prompt does not end anything
    torch.testing.assert_close(distribution, torch.tensor([[0.0625, 0.1875], [0.0, 0.75]], dtype=torch.float64))


def test_distribution_with_temperature_zero_and_processor():
    model = two_state_chain()
    assert sequence_distribution(model, PROMPT, 3, vocab=2, temperature=0)[1, 0, 1] == 1  # ties go to the first
    cold = sequence_distribution(model, PROMPT, 1, vocab=2, temperature=0.5)
    torch.testing.assert_close(cold, torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert (sequence_distribution(TableLM(vocab=4), PROMPT, 2, vocab=4, process=top_two) > 0).sum() == 4


@pytest.mark.parametrize("eos", [None, 3])
def test_distribution_sums_to_one_and_is_the_product_of_conditionals(eos):
    model = TinyTransformerLM(vocab=4).double()
    distribution = sequence_distribution(model, PROMPT, 5, vocab=4, temperature=0.8, eos=eos, rows=100)
    assert distribution.shape == (4,) * 5
    assert abs(distribution.sum().item() - 1) < 1e-12
    tokens = [2, 0, 1, 2, 3]
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *tokens]]))[0, 1:-1] / 0.8
    p = logits.softmax(-1)[range(5), tokens].prod()
    torch.testing.assert_close(distribution[tuple(tokens)], p)


@pytest.mark.parametrize("eos", [None, 0])
def test_exact_samplers_are_accepted(eos):
    model, generator = TinyTransformerLM(vocab=3), torch.Generator().manual_seed(0)
    distribution = sequence_distribution(model, PROMPT, 4, vocab=3, eos=eos)
    count = 4000
    for samples in (
        sample_loop(model, PROMPT.expand(count, -1), 4, generator=generator, eos=eos),
        draw(distribution, count, generator),
    ):
        assert samples.shape == (count, 4)
        assert chi_square_p_value(samples, distribution) > 0.001
        assert total_variation(samples, distribution) < tv_noise_floor(distribution, count) + 2.7 / count**0.5


def test_wrong_samplers_are_rejected():
    model, generator = TinyTransformerLM(vocab=3), torch.Generator().manual_seed(0)
    distribution, count = sequence_distribution(model, PROMPT, 4, vocab=3), 4000
    rows = PROMPT.expand(count, -1)
    for samples in (
        sample_loop(model, rows, 4, temperature=1.25, generator=generator),
        sample_loop(TinyTransformerLM(vocab=3, seed=1), rows, 4, generator=generator),
        sample_loop(lambda ids: model(ids[:, -2:]), rows, 4, generator=generator),  # forgets
    ):
        assert chi_square_p_value(samples, distribution) < 1e-6
        assert total_variation(samples, distribution) > 1.5 * tv_noise_floor(distribution, count)


def test_excluded_sequence_is_rejected():
    distribution = sequence_distribution(two_state_chain(), PROMPT, 2, vocab=2, eos=1)
    samples = draw(distribution, 1000, torch.Generator().manual_seed(0))
    assert chi_square_p_value(samples, distribution) > 0.001
    samples[0] = torch.tensor([1, 0])
    assert chi_square_p_value(samples, distribution) == 0


def test_p_values_are_uniform_under_the_distribution():
    distribution, generator = (
        sequence_distribution(TableLM(vocab=3), PROMPT, 4, vocab=3),
        torch.Generator().manual_seed(0),
    )
    p = torch.tensor([chi_square_p_value(draw(distribution, 500, generator), distribution) for _ in range(300)])
    assert abs(p.mean() - 0.5) < 0.06
    assert 0.02 < (p < 0.1).double().mean() < 0.18


@pytest.mark.parametrize("count", [20, 500])  # 20 draws leave most of the 81 cells empty
def test_noise_floor_is_what_exact_samplers_show(count):
    distribution, generator = (
        sequence_distribution(TableLM(vocab=3), PROMPT, 4, vocab=3),
        torch.Generator().manual_seed(0),
    )
    shown = sum(total_variation(draw(distribution, count, generator), distribution) for _ in range(400)) / 400
    assert abs(shown / tv_noise_floor(distribution, count) - 1) < 0.02


def test_degenerate_distribution():
    distribution = sequence_distribution(two_state_chain(), PROMPT, 2, vocab=2, temperature=0)
    samples = sample_loop(two_state_chain(), PROMPT.expand(50, -1), 2, temperature=0)
    assert tv_noise_floor(distribution, 50) == total_variation(samples, distribution) == 0
    assert chi_square_p_value(samples, distribution) == 1
