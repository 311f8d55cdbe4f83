"""The shipped pair loads, is what its record says, and models Python source."""

import inspect
import json
import json.decoder
import os
import random
import string
from importlib.resources import files

import pytest
import torch
from torch.nn import functional as F

from smc_compile.pairs.shipped import END, Pair, load_pair

SOURCE = inspect.getsource(json.decoder)  # a held-out file
DATA = files("smc_compile.pairs") / "data"
NAMES = ("target", "draft")


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load_pair()


@pytest.fixture(scope="module")
def logits(pair: Pair) -> dict[str, torch.Tensor]:
    """Logits [S, V] of both models on the first 512 tokens of SOURCE."""
    ids = torch.tensor([pair.tokenizer.encode(SOURCE).ids[:512]])
    return {name: getattr(pair, name)(ids)[0] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_models_are_what_the_record_says(pair: Pair, name: str) -> None:
    model, record = getattr(pair, name), pair.info[name]
    assert vars(model.config) == record["config"]
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert len((DATA / f"{name}.safetensors").read_bytes()) == record["file_bytes"]
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == pair.tokenizer.get_vocab_size()


def test_files_are_small() -> None:
    assert sum(len((DATA / f"{name}.safetensors").read_bytes()) for name in NAMES) <= 8_000_000


def test_target_is_the_slow_one(pair: Pair) -> None:
    assert pair.info["target"]["parameters"] > 4 * pair.info["draft"]["parameters"]
    assert pair.target.config.n_layers >= 5 * pair.draft.config.n_layers


@pytest.mark.parametrize(("name", "bound"), [("target", 4.0), ("draft", 4.5)])
def test_loss_on_a_held_out_file(pair: Pair, logits: dict[str, torch.Tensor], name: str, bound: float) -> None:
    assert "json/decoder.py" in pair.info["data"]["held_out_files"]
    following = torch.tensor(pair.tokenizer.encode(SOURCE).ids[1:512])
    loss = F.cross_entropy(logits[name][:-1], following).item()
    assert loss < bound
    assert abs(loss - pair.info["held_out"][f"{name}_nats"]) < 1.0  # one file against the mean of all


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_draft_agrees_with_target(pair: Pair, logits: dict[str, torch.Tensor], temperature: float) -> None:
    p, q = ((logits[name] / temperature).softmax(-1) for name in NAMES)
    acceptance = torch.minimum(p, q).sum(-1).mean().item()
    assert abs(acceptance - pair.info["held_out"][f"acceptance_{temperature}"]) < 0.1


def test_late_positions_are_learnt(pair: Pair) -> None:
    """Positions beyond the short training context predict as well as the bound asks of early ones."""
    ids = torch.tensor([pair.tokenizer.encode(SOURCE).ids[:1024]])
    assert ids.shape[1] == pair.target.config.max_positions
    loss = F.cross_entropy(pair.target(ids)[0, 768:-1], ids[0, 769:]).item()
    assert loss < 4.0


def test_tokenizer_round_trips(pair: Pair) -> None:
    tokenizer = pair.tokenizer
    unusual = 'x = "é → 語 \U0001f40d"\n\tif x:\r\n        pass\n'
    for text in (SOURCE, inspect.getsource(random), unusual, string.printable):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode(END).ids == [tokenizer.token_to_id(END)]


def test_loads_from_any_directory_and_leaves_the_generator_alone(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    loaded = load_pair(torch.bfloat16)
    assert torch.equal(state, torch.get_rng_state())
    logits = loaded.target(torch.tensor([loaded.tokenizer.encode("import os\n").ids]))
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_no_machine_paths() -> None:
    record = (DATA / "pair.json").read_text()
    assert os.path.expanduser("~") not in record
    assert all(not name.startswith("/") for name in json.loads(record)["data"]["held_out_files"])
