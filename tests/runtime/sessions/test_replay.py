"""Recorded cycles: what a CUDA graph would replay, by a recorder that runs on any machine (helpers/recorder.py)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.model_parts import perturbed
from helpers.models import CACHEABLE
from helpers.recorder import Records, set_recorder
from helpers.toys import GRUStep, TableLM, TinyTransformerLM
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from smc_compile import Generation, generate
from smc_compile.errors import GenerationError, InputError, OptionError
from smc_compile.inputs.requests import build_request, settings_of
from smc_compile.kernels.copy_rows import RowCopy
from smc_compile.runtime.sessions import replay
from smc_compile.runtime.sessions.replay import Answer, Asked, Recording, Replay
from smc_compile.runtime.sessions.run import Run
from smc_compile.runtime.state.population import Population

VOCAB = 5
PROMPTS = torch.tensor([[1, 0, 2], [3, 3, 4], [0, 4, 1], [2, 1, 0]])
OPTIONS = {"n_particles": 6, "lookahead": 2, "ess_threshold": 0.9, "compiler": "eager", "validate": False}
METHODS = ("smc", "autoregressive")
Work = Callable[[], None]
interpreted = pytest.mark.usefixtures("interpreted")


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Records:
    """Programs made from here on record their cycles; those of other tests are not touched."""
    records = Records()
    set_recorder(monkeypatch, records)
    return records


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    target = TinyTransformerLM(VOCAB, max_positions=512).double()
    return target, perturbed(target, 0.5)


def run(pair: Any, ids: Tensor = PROMPTS, n: Any = 12, **options: Any) -> Generation:
    return generate(*pair, ids, max_new_tokens=n, **{"seed": 7, **OPTIONS, **options})


def by_host(pair: Any, *args: Any, **options: Any) -> Generation:
    """The same without recordings, by a program of its own whose regions are interpreted."""
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        set_recorder(patch, None)
        return run(pair, *args, **options)


def assert_same(a: Generation, b: Generation) -> None:
    """The same tokens; numbers but for their last bits, since prompts of another width are summed in another order."""
    for name in ("sequences", "particles", "ancestors", "new_lengths"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, msg=name)
    for name in ("log_weights", "log_evidence", "ess", "log_probs"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-9, equal_nan=True, msg=name)
    assert a.stats.resamplings == b.stats.resamplings
    assert (a.stats.cuts, a.stats.dropped) == (b.stats.cuts, b.stats.dropped)


# --- the same as from the host ---------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "sliding_window", "alibi", "eager"])
def test_a_replayed_cycle_is_the_host_s_cycle(records, method, kind):
    target = CACHEABLE[kind](layers=1).double()
    pair, ids = (target, perturbed(target, 0.3)), torch.tensor([[1, 5, 2, 7], [3, 9, 4, 1]])
    replayed = run(pair, ids, 11, method=method)
    assert_same(replayed, by_host(pair, ids, 11, method=method))
    assert len(records) == 1
    assert replayed.stats.replayed == {"smc": 3, "autoregressive": 10}[method], "all but the first cycle"


@interpreted
@pytest.mark.parametrize("method", METHODS)
def test_lengths_ends_and_requests_that_leave(records, pair, method):
    options = {"method": method, "ids": PROMPTS.repeat(2, 1), "n": [12, 30, 9, 17, 40, 1, 2, 25]}
    assert_same(run(pair, **options, eos_token_id=3), by_host(pair, **options, eos_token_id=3))
    run(pair, PROMPTS[:2], method=method)
    for _ in range(2):  # batches shrink to two requests, a size that has run
        replayed = run(pair, **options)
        assert_same(replayed, by_host(pair, **options))
    session = replayed.program.session
    assert session._sizes == {2, 8}
    assert len({r.run.request.batch for r in session._replay._recordings}) == 2


@interpreted
def test_padded_prompts(records, pair):
    ids, mask = torch.tensor([[0, 0, 2], [0, 3, 4], [0, 4, 1]]), torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]])
    assert_same(run(pair, ids, attention_mask=mask), by_host(pair, ids, attention_mask=mask))


@interpreted
@pytest.mark.parametrize("settings", [{"temperature": [0.5, 1.0, 1.5, 2.0]}, {"top_k": 3, "top_p": 0.8}])
def test_settings_of_each_request(records, pair, settings):
    assert_same(run(pair, **settings), by_host(pair, **settings))
    assert records


@interpreted
def test_a_longer_answer_takes_new_recordings_as_it_grows(records, pair):
    options = {"n": 230, "ids": PROMPTS[:1], "n_particles": 3, "lookahead": 7}
    assert_same(run(pair, **options), by_host(pair, **options))
    assert len(records) == 3, "128, 192 and 256 slots"


@interpreted
def test_a_recorded_cycle_drops_a_block_of_which_a_population_would_die(records):
    class TopK(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = TableLM(VOCAB).double()

        def forward(self, ids: Tensor) -> Tensor:
            logits = self.model(ids)
            return logits.masked_fill(logits < logits.topk(2).values[..., -1:], -math.inf)

    pair = TopK(), perturbed(TableLM(VOCAB).double(), 0.5)
    options = {"ids": PROMPTS[:1].expand(64, -1), "n": 9, "n_particles": 2, "lookahead": 3}
    replayed = run(pair, **options)
    assert replayed.stats.dropped > 0
    assert replayed.stats.replayed == replayed.stats.cycles - 1
    assert_same(replayed, by_host(pair, **options))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_regions_are_recorded_and_compile_once(monkeypatch, method):
    """What is recorded here is the call of compiled code itself."""
    recordings: list[Work] = []

    def record(work: Work) -> Work:
        recordings.append(work)
        return work

    set_recorder(monkeypatch, record)
    target = CACHEABLE["llama"](layers=1)
    pair, options = (target, perturbed(target, 0.3)), {"compiler": "aot_eager", "method": method}
    ids = torch.tensor([[1, 5, 2, 7]])
    assert torch.equal(run(pair, ids, **options).sequences, by_host(pair, ids, **options).sequences)
    program = run(pair, ids, **options).program
    compiled = {region.name: region.compilations for region in program.regions}
    assert all(count <= 1 for count in compiled.values()), compiled
    assert {"uniforms", {"smc": "weigh", "autoregressive": "close"}[method]} <= set(compiled)
    assert run(pair, torch.tensor([[1, 5]]), n=9, seed=3, **options).program is program
    assert compiled == {region.name: region.compilations for region in program.regions}
    assert len(recordings) == 1


# --- one recording for many calls ------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("method", METHODS)
def test_a_recording_serves_other_prompts_lengths_and_seeds(records, pair, method):
    for ids, n, seed in ((PROMPTS, 12, 7), (PROMPTS.flip(0), 12, 8), (PROMPTS[:, :2], 33, 9), (PROMPTS, 100, 1)):
        assert_same(run(pair, ids, n, seed=seed, method=method), by_host(pair, ids, n, seed=seed, method=method))
    assert len(records) == 1


@interpreted
def test_a_result_is_not_touched_by_the_next_call(records, pair):
    first = run(pair)
    kept = copy.deepcopy(first)
    run(pair, seed=8)
    assert_same(first, kept)


@interpreted
def test_weights_are_read_at_every_call_wherever_they_are(records):
    target = TinyTransformerLM(VOCAB, max_positions=512).double()
    pair = target, perturbed(target, 0.5)
    run(pair)
    with torch.no_grad():
        target.head.weight.mul_(0.5)
    assert_same(run(pair), by_host(pair))
    assert len(records) == 1, "changed in place"
    target.head.weight.data = 3 * target.head.weight.data
    assert_same(run(pair), by_host(pair))
    assert len(records) == 2, "elsewhere"


@interpreted
def test_calls_under_way_together_do_not_share_a_recording(records, pair):
    whole = [run(pair, PROMPTS[:1], n=20, seed=seed) for seed in (1, 2)]
    session, settings = whole[-1].program.session, settings_of(1, temperature=1.0)
    requests = [build_request(PROMPTS[:1], 20, torch.tensor([seed]), settings=settings) for seed in (1, 2)]
    asked = [session.cycles(request) for request in requests]
    for together in zip(*asked, strict=True):
        runs = together
    for one, alone in zip(runs, whole, strict=True):
        assert torch.equal(one.result(True).sequences, alone.sequences)
    assert len(records) == 2


@interpreted
def test_a_call_that_has_grown_does_not_share_with_another(records, pair):
    whole = [run(pair, PROMPTS[:1], n=170, seed=seed) for seed in (1, 2)]
    settings, session = settings_of(1, temperature=1.0), whole[-1].program.session
    first, second = (
        session.cycles(build_request(PROMPTS[:1], 170, torch.tensor([seed]), settings=settings)) for seed in (1, 2)
    )
    one = next(run for run in first if run.p.generated > 140)  # in suffixes of the second size
    *_, other = second
    *_, one = first
    assert torch.equal(one.result(True).sequences, whole[0].sequences)
    assert torch.equal(other.result(True).sequences, whole[1].sequences)


@interpreted
@pytest.mark.parametrize("kind", ["gpt_sliced_positions", "gpt"])
def test_neither_weights_nor_requests_are_written_to(records, kind):
    """Position tables may be views of weights, and a request is the caller's."""
    target = CACHEABLE[kind](layers=1, max_positions=300).double()
    pair, before = (target, perturbed(target, 0.3)), copy.deepcopy(target.state_dict())
    session = run(pair, torch.ones(1, 128, dtype=torch.int64), n=128).program.session  # tables of the recorded length
    generated, settings = len(records), settings_of(1, temperature=1.0)
    requests = [
        build_request(torch.full((1, length), 2), 128, torch.tensor([length]), settings=settings) for length in (9, 70)
    ]
    first = session.run(requests[0])
    session.run(requests[1])
    assert_same(session.run(requests[0]), first)
    assert len(records) == generated, "all of them in the first call's"
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


@interpreted
def test_what_cannot_be_recorded_is_told_with_what_there_is(monkeypatch, pair):
    def refuse(work: Work) -> Work:
        raise RuntimeError("operation not permitted when stream is capturing")

    good = by_host(pair, PROMPTS[:1], n=20, ess_threshold=0.0)
    set_recorder(monkeypatch, refuse)
    with pytest.raises(GenerationError, match="cannot be recorded as a CUDA graph") as error:
        run(pair, PROMPTS[:1], n=20, ess_threshold=0.0)
    generated = error.value.partial.sequences.shape[1]
    assert generated == 3 + 1 + 2 * 3, "the first cycle, and the one that compiled"
    assert torch.equal(error.value.partial.particles, good.particles[:, :, :generated])


@interpreted
def test_recordings_are_kept_up_to_a_number(records, pair, monkeypatch):
    monkeypatch.setattr(replay, "KEPT", 2)
    for batch in (1, 2, 3, 4):
        result = run(pair, PROMPTS[:batch])
    assert len(result.program.session._replay._recordings) <= 3, "those kept, and the one in use"


@interpreted
def test_recordings_give_their_memory_back_before_a_call_is_refused(records, pair, monkeypatch):
    session = run(pair).program.session
    monkeypatch.setattr(
        "smc_compile.runtime.execution.memory.free_bytes", lambda _: 0 if session._replay._recordings else 2**40
    )
    run(pair)
    assert len(records) == 2
    monkeypatch.setattr("smc_compile.runtime.execution.memory.free_bytes", lambda _: 0)
    with pytest.raises(InputError, match="do not fit into memory"):
        run(pair)


# --- what breaks, and what stays with the host -----------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("method", METHODS)
def test_nan_in_the_middle_raises_with_what_was_generated(records, pair, method):
    target = copy.deepcopy(pair[0])
    options = {"method": method, "ess_threshold": 0.0, "n": 40, "ids": PROMPTS[:1, :1], "seed": 6}
    options |= {"n_particles": 2, "lookahead": 1}  # token 3 comes in the third cycle then
    good = run((target, pair[1]), **options)
    with torch.no_grad():
        target.embed.weight[3] = math.nan
    with pytest.raises(GenerationError, match="target's logits are NaN") as error:
        run((target, pair[1]), **options)
    generated = error.value.partial.sequences.shape[1]
    assert error.value.partial.stats.replayed > 0
    assert torch.equal(error.value.partial.particles, good.particles[:, :, :generated])


@interpreted
def test_nan_logits_of_the_draft_are_told_apart(records, pair):
    draft = copy.deepcopy(pair[1])
    with torch.no_grad():
        draft.embed.weight[3] = math.nan
    with pytest.raises(GenerationError, match="draft's logits are NaN"):
        run((pair[0], draft), PROMPTS[:1, :1], 40)


@interpreted
def test_requests_that_are_cut_differently_are_recorded_together(records, pair):
    options = {"max_divergence": 0.2, "n": [12, 30, 9, 17], "eos_token_id": 3}
    replayed = run(pair, **options)
    assert replayed.stats.cuts > 0
    assert replayed.stats.replayed == replayed.stats.cycles - 1
    assert_same(replayed, by_host(pair, **options))


@interpreted
@pytest.mark.parametrize(
    "options",
    [
        {"stopping_criteria": [lambda ids, scores=None: ids[:, -1] == 3]},
        {"logits_processor": [lambda ids, scores: scores.masked_fill(ids[:, -1:] == 2, 0.5)]},
        {"max_lag": 4, "streamer": lambda _: None},
    ],
    ids=["stop", "rule", "max_lag"],
)
def test_where_the_host_takes_part_cycles_run_from_there(records, pair, options, monkeypatch):
    if "streamer" in options:
        options = options | {"streamer": type("Stream", (), {"put": lambda *_: None, "end": lambda _: None})()}
    result = run(pair, PROMPTS[:1], **options)
    assert not records
    assert result.stats.replayed == 0
    assert_same(result, by_host(pair, PROMPTS[:1], **options))


@interpreted
def test_nothing_is_recorded_without_a_gpu_or_for_states_of_their_own(pair):
    assert run(pair).stats.replayed == 0
    recurrent = GRUStep(VOCAB).double()
    assert run((recurrent, recurrent)).stats.replayed == 0


def test_the_option_is_a_switch(pair):
    with pytest.raises(OptionError, match="cuda_graph must be True or False"):
        run(pair, cuda_graph="yes")


# --- nothing goes to the host, nothing comes from it -----------------------------------------------------------------


class OnMeta(TorchDispatchMode):
    """Every tensor of every op is on the device that has no values."""

    ops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves((args, kwargs, out)):
            assert not isinstance(tensor, Tensor) or tensor.is_meta, f"{function} has a tensor of the host"
        self.ops += 1
        return out


@interpreted
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{}, {"top_k": 3, "top_p": 0.8, "temperature": 0.7}])
@pytest.mark.parametrize("kind", ["llama", "eager"])
def test_a_cycle_runs_on_a_device_whose_values_cannot_be_read(monkeypatch, method, settings, kind):
    """Not one value, and not one tensor, passes between the host and the device: a CUDA graph cannot do that."""
    works: list[tuple[Any, Run, Asked, Answer]] = []

    class Remembers(Replay):
        def _recording_of(self, run: Run) -> Recording:
            recording = super()._recording_of(run)
            works.append((self._work, recording.run, recording.asked, recording.answer))
            return recording

    monkeypatch.setattr("smc_compile.runtime.sessions.smc.Replay", Remembers)
    monkeypatch.setattr("smc_compile.runtime.sessions.autoregressive.Replay", Remembers)
    set_recorder(monkeypatch, lambda work: work)
    target = CACHEABLE[kind](layers=1)
    run((target, perturbed(target)), torch.tensor([[1, 5, 2]]), method=method, **settings)
    work, home, asked, answer = works[0]
    home, asked, answer = on_meta(home), moved(asked), moved(answer)
    with torch.no_grad(), OnMeta() as seen:
        work(home, asked, answer, RowCopy([*home.p.state.target, *home.p.state.draft]))
    assert seen.ops > 100, "the cycle ran op by op"


def moved(value: Any) -> Any:
    """The same with tensors that have no values."""
    return pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, value)


def on_meta(home: Run) -> Run:
    p = Population(home.p.n, moved(home.p.state), home.p.made)
    request = replace(home.request, **{name: moved(value) for name, value in vars(home.request).items()})
    streams = copy.copy(home.streams)
    streams.seeds = streams.seeds.to("meta")
    run = copy.copy(home)
    run.p, run.request, run.streams, run.contexts, run.keys = (
        p,
        request,
        streams,
        moved(home.contexts),
        moved(home.keys),
    )
    run.eos_ids, run.settings, run.no_tokens = moved(home.eos_ids), moved(home.settings), moved(home.no_tokens)
    return run
