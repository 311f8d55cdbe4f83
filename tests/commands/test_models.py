"""``smc-compile models``: what its rows and tables say, and what is kept of a run that was interrupted."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from rich.console import Console

from smc_compile.__main__ import main
from smc_compile.commands import models
from smc_compile.commands.models import Row, show, try_family
from smc_compile.pairs import tiny_transformers as tiny
from smc_compile.pairs.tiny_transformers import build, small

ROWS = [
    Row("alpha", "sdpa", "compiled", None, "2 sdpa", [6], 3, 2.5e-15, 512, 1.25),
    Row("beta", "eager", "compiled", None, "1 sdpa + 1 matmul", [], 2, 1e-15, 1024, 10.0),
    Row("gamma[1]", "sdpa", "refused", f"conv1d has no position-by-position form ({'x' * 90})"),
    Row("delta", "-", "not built", "ValueError: no"),
    Row("epsilon", "eager", "own cache", "conv1d has no position-by-position form", error=3e-15, seconds=1.0),
    Row("zeta", "eager", "no decoder", "earlier logits change when the last token does"),
]


def shown(rows: list[Row]) -> str:
    console = Console(file=io.StringIO(), width=100)
    show(rows, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_tables_fit_and_say_everything() -> None:
    text = shown(ROWS)
    assert max(map(len, text.splitlines())) <= 100
    for word in (
        "alpha",
        "2 sdpa",
        " 6 ",
        "2e-15",
        "512",
        "1.25",
        "1 sdpa + 1 matmul",
        "gamma[1]",
        "conv1d has no",
        "…",
        "epsilon",
        "3e-15",
        "no decoder",
    ):
        assert word in text
    assert text.splitlines()[-1] == "2 compiled, 1 refused, 1 not built, 1 own cache, 1 no decoder"


def test_no_rows_no_tables() -> None:
    assert shown([]) == "nothing tried\n"


def test_without_transformers_the_error_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["models"]) == 2
    assert "smc_compile[transformers]" in capsys.readouterr().err


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


# ---- with the library ------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", minversion="5")


def test_rows_of_one_family(transformers) -> None:
    fused, written = try_family("mistral", (None, "eager"))
    assert [row.attention for row in (fused, written)] == ["sdpa", "eager"]
    assert [row.attention_ops for row in (fused, written)] == ["2 sdpa", "2 matmul"]
    for row in (fused, written):
        assert (row.status, row.windows, row.bytes_per_token) == ("compiled", [6], 2 * 2 * 2 * 8 * 8)
        assert row.error is not None
        assert row.error < 1e-9


def test_a_family_without_fused_attention_gives_one_row(transformers) -> None:
    assert [row.attention for row in try_family("bloom", (None, "eager"))] == ["eager"]


def test_what_does_not_compile_gives_its_reason(transformers) -> None:
    (row,) = try_family("rwkv", (None,))
    assert (row.status, row.error) == ("refused", None)
    assert row.reason is not None
    assert row.reason.startswith("pad mixes positions (`pad` (pad)")
    assert "its own cache: the model's own cache does not reproduce the model" in row.reason


def test_a_recurrent_model_is_tried_with_its_own_cache(transformers) -> None:
    (row,) = try_family("mamba", (None,))
    assert row.status == "own cache"
    assert row.reason is not None
    assert row.reason.startswith("conv1d has no position-by-position form")
    assert row.error is not None
    assert row.error < 1e-9


def test_a_model_whose_positions_read_later_ones_is_no_decoder(transformers) -> None:
    assert [row.status for row in try_family("xlnet", (None,))] == ["no decoder"]


def test_a_configuration_that_does_not_build_is_told_apart(transformers, monkeypatch) -> None:
    monkeypatch.setitem(tiny.SIZES, "hidden_size", 33)
    (row,) = try_family("gpt2", (None,))
    assert row.status == "not built"
    assert row.reason


def test_an_error_of_ours_is_not_called_a_refusal(transformers, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("node")

    monkeypatch.setattr(models, "trace_model", broken)
    (row,) = try_family("gpt2", (None,))
    assert (row.status, row.reason) == ("failed", "KeyError: 'node'")


def test_the_command_writes_rows(transformers, tmp_path, capsys) -> None:
    path = tmp_path / "rows.json"
    assert main(["models", "--only", "gpt2", "--json", str(path)]) == 0
    assert "1 compiled" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["transformers"] == transformers.__version__
    assert [row["family"] for row in report["rows"]] == ["gpt2"]


def test_unknown_families_are_refused_before_any_work(transformers, capsys) -> None:
    assert main(["models", "--only", "gpt2", "no_such_family"]) == 2
    assert "no_such_family" in capsys.readouterr().err


def test_an_interrupt_keeps_the_rows_so_far(transformers, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "rows.json"

    def interrupted(family: str, implementations: object) -> list[Row]:
        if family == "llama":
            raise KeyboardInterrupt
        return [Row(family, "sdpa", "refused", "reason")]

    monkeypatch.setattr(models, "try_family", interrupted)
    assert main(["models", "--only", "gpt2", "llama", "opt", "--json", str(path)]) == 130
    assert "1 refused" in capsys.readouterr().out
    assert [row["family"] for row in json.loads(path.read_text())["rows"]] == ["gpt2"]


def test_small_models_are_reproducible(transformers) -> None:
    first, second = (build("gpt2", dtype=torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
