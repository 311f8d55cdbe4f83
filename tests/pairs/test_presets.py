"""Named shapes, and weights that do not fit."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from smc_compile.errors import OptionError
from smc_compile.pairs import presets
from smc_compile.pairs.llama import Llama, LlamaConfig
from smc_compile.pairs.nested import check_fits
from smc_compile.pairs.presets import DTYPES, PRESETS, check_memory, configs, fill_in, find_preset, weight_count

CPU = torch.device("cpu")
OPTIONS = ("layers", "dim", "heads", "kv_heads", "hidden")


def arguments(preset: str, **given: int) -> Namespace:
    unset = dict.fromkeys(["vocab", *OPTIONS, *(f"draft_{name}" for name in OPTIONS)])
    return Namespace(**{**unset, "preset": preset, "prompt_length": 8, "new_tokens": 8, **given})


@pytest.mark.parametrize(
    ("name", "millions"), [("336m-31m", (336, 31)), ("0.5b-60m", (494, 60)), ("llama-8b-1b", (7505, 1236))]
)
def test_sizes_are_those_of_the_name_and_the_draft_fits_inside_the_target(name, millions):
    filled = arguments(name)
    fill_in(filled)
    pair = configs(filled, 8)
    assert tuple(round(weight_count(config) / 1e6) for config in pair) == millions
    check_fits(*pair)


def test_single_options_change_a_preset():
    filled = arguments("336m-31m", layers=2, draft_hidden=96)
    fill_in(filled)
    target, draft = configs(filled, 8)
    assert (target.n_layers, target.dim, draft.n_layers, draft.hidden_dim) == (2, 1024, 4, 96)


def test_an_unknown_preset_is_named_with_the_nearest():
    with pytest.raises(OptionError, match="did you mean llama-8b-1b") as raised:
        find_preset("Llama-8B")
    assert all(name in raised.value.why for name in PRESETS)


def test_weights_are_counted_without_being_built():
    config = LlamaConfig(50, 32, 2, 4, 2, 48)
    assert weight_count(config) == sum(p.numel() for p in Llama(config).parameters())


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch):
    monkeypatch.setattr(presets, "free_bytes", lambda device: 3_000_000_000)
    check_memory(10**9, DTYPES["bfloat16"], CPU)
    with pytest.raises(OptionError) as raised:
        check_memory(10**9, DTYPES["float32"], CPU)
    assert "1000M numbers of 4 bytes need 4.0 GB, and 3.0 GB of cpu are free" in raised.value.why
    assert "--dtype bfloat16, --preset 336m-31m (1.5 GB), --preset 0.5b-60m (2.2 GB)" in raised.value.fix
    assert "llama-8b-1b" not in raised.value.fix
    assert "small" not in raised.value.fix, "it is nothing to time"


def test_where_the_system_does_not_tell_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(presets, "free_bytes", lambda device: None)
    check_memory(10**15, DTYPES["float32"], CPU)


def test_short_names_stand_for_presets_and_every_draft_fits():
    assert find_preset("bench") is PRESETS["336m-31m"]
    assert find_preset("llama-8b") is PRESETS["llama-8b-1b"]
    for name in PRESETS:
        filled = arguments(name)
        fill_in(filled)
        check_fits(*configs(filled, 1))
