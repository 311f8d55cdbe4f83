"""Tiny models of the transformers library: configurations shrink, and the same model comes twice."""

from __future__ import annotations

import pytest
import torch

from smc_compile.pairs.tiny_transformers import build, small


class Config:
    """What the shrinking looks at: attributes, some derived."""

    attribute_map = {"num_hidden_layers": "n_layer"}  # noqa: RUF012
    sub_configs = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.n_layer, self.hidden_size, self.vocab_size, self.use_cache = 24, 1024, 50_000, True
        self.sliding_window, self.head_dim, self.num_key_value_heads = 4096, None, None
        self.layer_types = ["wide", "narrow", "narrow", "wide"]

    @property
    def intermediate_size(self) -> int:
        return 4 * self.hidden_size


def test_configurations_shrink_by_attribute() -> None:
    chosen = small(Config())
    assert (chosen["hidden_size"], chosen["vocab_size"], chosen["sliding_window"]) == (32, 97, 6)
    assert (chosen["head_dim"], chosen["num_key_value_heads"]) == (8, 2)  # unset: they follow from others
    assert (chosen["layer_types"], chosen["num_hidden_layers"]) == (["wide", "narrow"], 2)  # each kind once
    assert not {"intermediate_size", "use_cache", "num_experts"} & set(chosen)  # derived, no size, absent


class Periodic(Config):
    """Every fourth layer is of another kind, and layers of states have heads of their own."""

    def __init__(self) -> None:
        super().__init__()
        del self.layer_types
        self.num_hidden_layers, self.num_attention_heads, self.expand, self.is_decoder = 24, 16, 2, False
        self.mamba_n_heads, self.mamba_d_head, self.chunk_size = 128, 64, 256

    @property
    def layers_block_type(self) -> list[str]:
        return ["attention" if i % 4 == 3 else "recurrent" for i in range(24)]


def test_derived_layers_keep_each_kind_and_heads_of_states_fit_the_width() -> None:
    chosen = small(Periodic())
    assert chosen["num_hidden_layers"] == 4
    assert chosen["mamba_n_heads"] * chosen["mamba_d_head"] == 2 * chosen["hidden_size"]
    assert chosen["chunk_size"] < 8  # texts of the checks are longer
    assert chosen["is_decoder"] is True


def test_every_kind_can_come_twice() -> None:
    assert small(Config(), times=2)["layer_types"] == ["wide", "narrow"] * 2


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", minversion="5")


def test_small_models_are_reproducible(transformers) -> None:
    first, second = (build("gpt2", dtype=torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
