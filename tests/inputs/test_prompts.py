"""Prompts, each for one request or several, and values given for all or for each."""

from __future__ import annotations

import pytest
import torch

from smc_compile.errors import InputError, OptionError
from smc_compile.inputs.prompts import prompts_of
from smc_compile.inputs.sampler_settings import Sampling

IDS, MASK = torch.tensor([[1, 2], [0, 3]]), torch.tensor([[1, 1], [0, 1]])


def test_each_prompt_is_repeated_with_its_mask_and_its_values() -> None:
    prompts = prompts_of(IDS, MASK, 2)
    assert prompts.batch == 4
    assert prompts.ids.tolist() == [[1, 2], [1, 2], [0, 3], [0, 3]]
    assert prompts.mask.tolist() == [[1, 1], [1, 1], [0, 1], [0, 1]]
    assert prompts.each([5, 6]) == [5, 5, 6, 6]
    assert prompts.each(torch.tensor([5, 6])) == [5, 5, 6, 6]
    assert prompts.each(7) == 7
    assert prompts.each([1, 2, 3, 4]) == [1, 2, 3, 4], "one for each request already"
    assert prompts_of(IDS, None, 1).mask is None


@pytest.mark.parametrize("copies", [0, 1.5, True])
def test_the_number_of_requests_is_positive(copies: object) -> None:
    with pytest.raises(OptionError, match="num_return_sequences must be a positive integer"):
        prompts_of(IDS, None, copies)


@pytest.mark.parametrize("ids", [[[1, 2]], IDS[0], IDS.float(), IDS[:, :0]])
def test_what_is_no_prompt_is_refused(ids: object) -> None:
    with pytest.raises(InputError):
        prompts_of(ids, None, 1)


def test_settings_are_those_that_change_something() -> None:
    prompts = prompts_of(IDS, None, 2)
    assert {name: v.tolist() for name, v in Sampling().settings(prompts).items()} == {"temperature": [1.0] * 4}
    found = Sampling(temperature=[0.5, 2.0], top_k=3).settings(prompts)
    assert {name: v.tolist() for name, v in found.items()} == {"temperature": [0.5, 0.5, 2.0, 2.0], "top_k": [3.0] * 4}
    assert Sampling(temperature=0, top_k=3).settings(prompts) == {}, "greedy"
    with pytest.raises(OptionError, match="cannot share a batch"):
        Sampling(temperature=[0, 1]).settings(prompts)
