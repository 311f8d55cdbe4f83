"""Who takes part in a bench: peers in order, and those that cannot be built with the reason."""

from __future__ import annotations

import io
from argparse import Namespace

import torch
from rich.console import Console

from smc_compile.bench.ceilings import ModelSize, loop_passes
from smc_compile.bench.line_up import build_peers, peer_builders
from smc_compile.bench.measure import Contestant
from smc_compile.pairs.llama import Llama, LlamaConfig

IDS = torch.zeros(1, 6, dtype=torch.int64)
ASKED = {"new_tokens": 8, "temperature": 1.0, "assistant_tokens": [2], "skip_transformers": False}


def test_peers_that_cannot_be_built_are_named_with_the_reason():
    def broken() -> Contestant:
        raise ValueError("no such file\nsomewhere")

    there = Contestant("other", lambda seed: IDS, 8, peer=True)
    peers, missing = build_peers({"broken": broken, "other": lambda: there}, Console(file=io.StringIO()))
    assert peers == [there]
    assert missing == {"broken": "ValueError: no such file"}


def test_further_peers_stand_last_and_know_what_a_token_must_read():
    model, size, given = Llama(LlamaConfig(10, 8, 1, 1, 1, 8, 32)), ModelSize(100, 4, 8), []

    def further(*arguments: object) -> Contestant:
        given.append(arguments)
        return Contestant("other", lambda seed: IDS, 8, peer=True)

    for skipped, names in (
        ({"skip_assisted": False}, ["transformers", "assisted", "other"]),
        ({"skip_assisted": True}, ["transformers", "other"]),
        ({"skip_transformers": True}, ["other"]),
    ):
        asked = Namespace(**{**ASKED, **skipped})
        builders = peer_builders(model, model, IDS, asked, size, {"other": further})
        assert list(builders) == names
        assert builders["other"]().method == "other"
        assert given.pop() == (model, IDS, asked, loop_passes(size, 6, 8))
