"""The random stream: known answers, and what it means to be a function of (seed, particle, step, purpose).

Statistical tests use fixed seeds, so they either pass for ever or fail for ever; the rate stated with each is the
probability that a perfect generator would have failed it when the seeds were chosen.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from smc_compile.runtime.algorithms.philox import (
    ACCEPT,
    PROPOSE,
    RESAMPLE,
    SELECT,
    SETTLE,
    TARGET,
    multiply_high_low,
    philox,
    uniforms,
)

WORD = st.integers(0, 2**32 - 1)
PURPOSES = (PROPOSE, TARGET, RESAMPLE, SELECT, SETTLE, ACCEPT)


def words(text: str) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


def hexadecimal(x: tuple[Tensor, ...]) -> str:
    return " ".join(f"{int(word):08x}" for word in x)


def philox_of_integers(counter: list[int], key: list[int]) -> list[int]:
    """Figure and constants of the paper, in Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, answer: str) -> None:
    assert hexadecimal(philox(words(counter), words(key))) == answer  # type: ignore[arg-type]


@given(a=WORD, b=WORD)
def test_product_is_exact(a: int, b: int) -> None:
    high, low = multiply_high_low(a, torch.tensor(b))
    assert (int(high), int(low)) == divmod(a * b, 2**32)


@given(counter=st.lists(WORD, min_size=4, max_size=4), key=st.lists(WORD, min_size=2, max_size=2))
def test_agrees_with_unbounded_integers(counter: list[int], key: list[int]) -> None:
    out = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))  # type: ignore[arg-type]
    assert [int(x) for x in out] == philox_of_integers(counter, key)


@settings(max_examples=50)
@given(seed=st.integers(-(2**63), 2**63 - 1), particle=st.integers(0, 63), step=WORD, purpose=st.sampled_from(PURPOSES))
def test_a_uniform_is_53_bits_of_one_philox_block(seed: int, particle: int, step: int, purpose: int) -> None:
    u = uniforms(torch.tensor([seed]), 64, torch.tensor([step]), purpose)[0, particle, 0]
    x0, x1, _, _ = philox_of_integers([particle, step, purpose, 0], [seed % 2**32, (seed >> 32) % 2**32])
    assert float(u) == ((x0 >> 5) * 2**26 + (x1 >> 6)) / 2**53
    assert 0 <= float(u) < 1


def test_shape_and_type() -> None:
    u = uniforms(torch.tensor([1, 2]), 3, torch.arange(5), PROPOSE)
    assert u.shape == (2, 3, 5)
    assert u.dtype == torch.float64


def test_does_not_depend_on_the_rest_of_the_batch() -> None:
    seeds, steps = torch.tensor([7, -3, 2**62]), torch.arange(20)
    whole = uniforms(seeds, 16, steps, TARGET)
    assert torch.equal(uniforms(seeds[1:2], 16, steps, TARGET), whole[1:2])
    assert torch.equal(uniforms(seeds, 5, steps, TARGET), whole[:, :5])
    assert torch.equal(uniforms(seeds, 16, steps[[13, 4]], TARGET), whole[:, :, [13, 4]])


def test_seed_step_particle_and_purpose_all_matter() -> None:
    seeds = torch.tensor([0, 1, -1, 2**32, -(2**32), 2**63 - 1, -(2**63)])
    u = torch.stack([uniforms(seeds, 8, torch.arange(8), purpose) for purpose in PURPOSES])
    assert u.unique().numel() == u.numel()  # a chance collision of 53 bits: 4e-10


@pytest.mark.parametrize("purpose", PURPOSES)
def test_uniform_in_distribution(purpose: int) -> None:
    """Kolmogorov-Smirnov, and chi-square of 256 cells on the high and on the low bits: 1e-5 each, 12 tests."""
    u = uniforms(torch.arange(-4, 4), 32, torch.arange(128), purpose).flatten()
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-5
    for bits in ((u * 256).long(), (u * 2.0**53).long() & 255):
        assert stats.chisquare(torch.bincount(bits, minlength=256).numpy()).pvalue > 1e-5


def correlation_z(x: Tensor, y: Tensor) -> float:
    """Standard normal if x and y are independent uniforms."""
    x, y = ((x - 0.5) * 12**0.5).flatten(), ((y - 0.5) * 12**0.5).flatten()
    return float((x * y).sum() / x.numel() ** 0.5)


def test_neighbours_are_uncorrelated() -> None:
    """Adjacent particles, steps, seeds, both halves of the seed, purposes. |z| < 4.5: 7e-6 each, 6 tests."""
    seeds, steps = torch.arange(-8, 8), torch.arange(64)
    u = uniforms(seeds, 64, steps, PROPOSE)  # [16, 64, 64]
    others = {
        "particle": (u[:, 1:], u[:, :-1]),
        "step": (u[:, :, 1:], u[:, :, :-1]),
        "seed": (u[1:], u[:-1]),
        "high half of the seed": (u, uniforms(seeds + 2**32, 64, steps, PROPOSE)),
        "purpose": (u, uniforms(seeds, 64, steps, TARGET)),
    }
    upper = torch.ones(64, 64).triu(1).bool().expand_as(u)
    others["particle and step swapped"] = (u[upper], u.mT[upper])
    for name, (x, y) in others.items():
        assert abs(correlation_z(x, y)) < 4.5, name


def test_compiled_equals_eager_bit_for_bit() -> None:
    compiled = torch.compile(uniforms, fullgraph=True, dynamic=False)
    arguments = (torch.tensor([3, -(2**63), 2**63 - 1]), 17, torch.tensor([0, 5, 2**32 - 1]), SELECT)
    assert torch.equal(compiled(*arguments), uniforms(*arguments))
