"""gpt-fast's loop on our weights: the same logits, its settings kept to itself, other files refused.

A stand-in with its interface takes the place of its files; SMC_COMPILE_GPT_FAST names a folder with the real ones.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from helpers.scripts import load_script

from smc_compile.errors import OptionError, ValidationError
from smc_compile.pairs.llama import Llama, LlamaConfig
from smc_compile.pairs.random_weights import build

gpt_fast_peer = load_script("benchmarks/gpt_fast_peer.py")
STAND_IN = Path(__file__).parents[1] / "helpers" / "gpt_fast_stand_in"
FOLDERS = [STAND_IN, *map(Path, filter(None, [os.environ.get("SMC_COMPILE_GPT_FAST")]))]
IDS = torch.randint(0, 50, (1, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(gpt_fast_peer, "compile_mode", lambda device: None)  # a mode is Inductor's
    return request.param


def model(dtype: torch.dtype = torch.float32, kv_heads: int = 2) -> Llama:
    torch.manual_seed(0)
    return build(LlamaConfig(50, 32, 2, 4, kv_heads, 48, 64, rope_base=500.0), dtype, torch.device("cpu"))


def logits_of(twin: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return twin(IDS, torch.arange(IDS.shape[1]))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_logits_are_ours_and_the_weights_are_shared(folder, dtype, kv_heads):
    target = model(dtype, kv_heads)
    twin = gpt_fast_peer.gpt_fast_twin(target, gpt_fast_peer.load_files(folder)[0])
    twin.setup_caches(max_batch_size=1, max_seq_length=16)
    gpt_fast_peer.check_agreement(target, twin, IDS)
    torch.testing.assert_close(logits_of(twin), target(IDS), atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)
    assert twin.output.weight.data_ptr() == target.embedding.weight.data_ptr()


def test_it_generates_as_many_tokens_as_it_is_asked_for_after_the_same_prompt(folder):
    loop = gpt_fast_peer.gpt_fast_loop(model(), IDS, str(folder), new_tokens=9, temperature=0.8)
    assert loop.warm_up is not None
    loop.warm_up(0)
    text = loop.run(3)
    assert text.shape == (1, 16)
    assert torch.equal(text[:, :7], IDS)
    assert torch.equal(text, loop.run(3))


def test_its_settings_and_modules_do_not_stay(folder):
    before, path = torch._inductor.config.coordinate_descent_tuning, list(sys.path)
    _, settings = gpt_fast_peer.load_files(folder)
    assert settings["coordinate_descent_tuning"] is True
    assert torch._inductor.config.coordinate_descent_tuning == before
    assert sys.path == path
    assert not {"model", "tokenizer"} & set(sys.modules)


def test_other_logits_are_refused(folder):
    target = model()
    twin = gpt_fast_peer.gpt_fast_twin(target, gpt_fast_peer.load_files(folder)[0])
    twin.setup_caches(max_batch_size=1, max_seq_length=16)
    with torch.no_grad():
        twin.layers[0].attention.wqkv.weight[:32] = target.layers[0].attention.wq.weight  # rows in our order
    with pytest.raises(ValidationError, match="not the target's"):
        gpt_fast_peer.check_agreement(target, twin, IDS)


def test_a_folder_without_its_files_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"has no model\.py"):
        gpt_fast_peer.load_files(tmp_path)


def test_rows_of_a_head_are_interleaved():
    weight = torch.arange(8)[:, None].expand(8, 3)
    assert gpt_fast_peer.interleaved(weight, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


TINY = (
    "--layers 1 --dim 16 --heads 2 --kv-heads 1 --hidden 24 --vocab 50 --draft-layers 1 --draft-dim 16 --draft-heads 2 "
    "--draft-kv-heads 1 --draft-hidden 24 --acceptance none --dtype float32 --prompt-length 6 --new-tokens 6 "
    "--lookahead 1 --n-particles 2 --repeats 1 --skip-transformers --skip-speculative --skip-auto"
)


def bench_rows(folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The JSON file of the script on a tiny pair, with regions of ours as they are written."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(gpt_fast_peer, "compile_mode", lambda device: None)
    with torch.compiler.set_stance("force_eager"):
        assert gpt_fast_peer.main([str(folder), *TINY.split(), "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_the_script_is_the_bench_with_one_row_more(tmp_path, monkeypatch, capsys):
    report = bench_rows(STAND_IN, tmp_path / "rows.json", monkeypatch)
    assert [row["method"] for row in report["rows"]] == ["eager", "gpt-fast", "autoregressive", "smc"]
    assert "gpt-fast: the loop in" in " ".join(capsys.readouterr().out.split())


def test_where_the_files_are_not_there_the_rest_of_the_bench_runs(tmp_path, monkeypatch, capsys):
    report = bench_rows(tmp_path, tmp_path / "rows.json", monkeypatch)
    assert list(report["not_measured"]) == ["gpt-fast"]
    assert "gpt-fast: not measured:" in capsys.readouterr().out
    assert "has no model.py" in report["not_measured"]["gpt-fast"]
