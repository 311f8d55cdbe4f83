"""Cycles that are recorded once, with all that they read and write at fixed addresses, and replayed: CUDA graphs.

Nothing in a recorded cycle is decided by the host. It says at which token a cycle stands, replays it, and reads one
small tensor that tells what came of it. A recording serves every later call of the same shapes, whose tensors are
copied to where the recorded ones stand.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smc_compile.errors import GenerationError, InputError
from smc_compile.kernels.copy_rows import RowCopy
from smc_compile.runtime.execution.memory import require_memory
from smc_compile.runtime.sessions.run import Run
from smc_compile.runtime.state.request import Request

KEPT = 8  # recordings of a session
# A recording serves prompts and answers up to the next multiple.
PROMPTS = 128
ANSWERS = 128

VALUES = ("tokens", "log_p", "ended", "stopped", "length", "log_w", "log_evidence", "shared")  # of a population

# What it is handed works in place on tensors that stay where they are; what it returns does the same again.
Record = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_graphs(device: torch.device) -> Record:
    """Record CUDA graphs on ``device``, one at a time in use: they share the memory in between. What is recorded has
    run once before, so that everything is compiled."""
    first: list[Any] = []  # a graph that keeps their memory from being given back, and the stream of all

    def record(work: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(device):
            if not first:
                first.extend((torch.cuda.CUDAGraph(), torch.cuda.Stream(device)))
                with torch.cuda.graph(first[0], stream=first[1]):
                    torch.zeros(1, device=device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, first[0].pool(), first[1], "thread_local"):
                work()
        return graph.replay

    return record


def replays(replay: Replay | None, request: Request) -> bool:
    """Whether the cycles of a request are: none has a part for the host."""
    return replay is not None and request.stop is None and request.max_lag is None


def in_shape(request: Request, capacity: int) -> tuple[Request, int]:
    """The same request, and slots for its answer, in a shape that others share."""
    return request.padded(PROMPTS, ANSWERS), capacity + -capacity % ANSWERS


def make_room(replay: Replay | None, request: Request, *what: Any) -> None:
    """As ``require_memory``, which see; what recordings hold is given up before a call is refused."""
    try:
        require_memory(request, *what)
    except InputError:
        if replay is None or not replay.forget():
            raise
        require_memory(request, *what)


class At(NamedTuple):
    """What the host tells a recorded cycle, and what it hears of it."""

    generated: Tensor  # []
    cycle: Tensor  # []
    tries: Tensor  # [B]
    status: Tensor  # [5, B] bool, as of closing.Closed
    ess: Tensor  # [B]
    ancestors: Tensor  # [B, N]

    @classmethod
    def of(cls, run: Run) -> At:
        p, batch = run.p, run.request.batch
        zero = torch.zeros((), dtype=torch.int64, device=p.tokens.device)
        status = torch.zeros(5, batch, dtype=torch.bool, device=zero.device)
        return cls(
            zero, zero.clone(), zero.repeat(batch), status, torch.empty_like(p.log_evidence), zero.repeat(batch, p.n)
        )


class Status(NamedTuple):
    """What came of a cycle, on the host: [B] bool each."""

    undefined: Tensor
    undefined_draft: Tensor
    dead: Tensor
    resampled: Tensor
    finished: Tensor

    @property
    def sound(self) -> bool:
        """Whether the cycle counts."""
        return not bool((self.undefined | self.undefined_draft | self.dead).any())


@dataclass(eq=False)
class Recording:
    """A cycle with its tensors.

    Attributes:
        run: holds the tensors that it reads and writes.
        user: the call that is using them.
        ran: whether it ran once, so that everything is compiled and can be recorded.
        replay: once it is recorded.
    """

    run: Run
    at: At
    copy_rows: RowCopy
    key: Any
    user: weakref.ref[Run]
    ran: bool = False
    replay: Callable[[], None] | None = None

    @property
    def busy(self) -> bool:
        user = self.user()
        return user is not None and user.keys is self.run.keys


class Replay:
    """The recordings of one session.

    ``work`` is a cycle: it reads and writes the tensors of a run, with what the host tells, and copies rows of caches
    by the last argument.
    """

    def __init__(self, record: Record, work: Callable[[Run, At, RowCopy], None]) -> None:
        self._record, self._work = record, work
        self._recordings: list[Recording] = []  # the last used stands last

    def __call__(self, run: Run, cycle: int, tries: Tensor) -> tuple[Status, At]:
        """The cycle behind ``run.p.made`` tokens; what the host counts is left to the caller. tries: [B].

        Raises:
            GenerationError: when it cannot be recorded, before it runs.
        """
        recording = self._recording_of(run)
        at = recording.at
        at.generated.fill_(run.p.generated)
        at.cycle.fill_(cycle)
        at.tries.copy_(tries)
        if not recording.ran:
            self._work(recording.run, at, recording.copy_rows)
            recording.ran = True
        else:
            recording.replay = recording.replay or self._recorded(recording)
            recording.replay()
        return Status(*at.status.cpu()), at

    def _recorded(self, recording: Recording) -> Callable[[], None]:
        try:
            return self._record(lambda: self._work(recording.run, recording.at, recording.copy_rows))
        except Exception as error:
            raise GenerationError(
                "a cycle cannot be recorded as a CUDA graph",
                f"{type(error).__name__}: {error}",
                "pass cuda_graph=False to run cycles from the host; error.partial holds what was generated before",
            ) from error

    def forget(self) -> bool:
        """Free the memory of recordings that no call is using. Whether there were any."""
        before = len(self._recordings)
        self._recordings = [r for r in self._recordings if r.busy]
        return len(self._recordings) < before

    def _recording_of(self, run: Run) -> Recording:
        """The one whose tensors are those of ``run``; they are moved there if they are not, and an idle one is free."""
        found = next((r for r in self._recordings if r.run.keys is run.keys), None) or self._taken(run)
        others = [r for r in self._recordings if r is not found]
        idle = [r for r in others if not r.busy]
        dropped = idle[: max(len(others) + 1 - KEPT, 0)]
        self._recordings = [*(r for r in others if r not in dropped), found]
        return found

    def _taken(self, run: Run) -> Recording:
        key = signature(run)
        free = next((r for r in self._recordings if r.key == key and not r.busy), None)
        if free is None:
            return new_recording(run, key)
        move(run, free.run)
        free.user = weakref.ref(run)
        return free


def new_recording(run: Run, key: Any) -> Recording:
    """One with tensors of its own, in which ``run`` goes on. Those that it had may be the caller's, or weights."""
    request, streams = run.request, copy(run.streams)
    streams.seeds = fixed(streams.seeds)
    states: dict[str, Any] = {name: list(map(fixed, getattr(run.p, name))) for name in ("target", "draft")}
    values: dict[str, Any] = {name: fixed(getattr(run.p, name)) for name in VALUES}
    home = replace(
        run,
        request=replace(request, lengths=fixed(request.lengths), new_tokens=fixed(request.new_tokens), watch=None),
        p=replace(run.p, **values, **states, ess=[], ancestors=[], lag=[]),
        streams=streams,
        contexts=[(list(map(fixed, a)), list(map(fixed, b)), weights) for a, b, weights in run.contexts],
        keys=fixed(run.keys),
        outcomes=[],
        watcher=None,
    )
    go_on_in(run, home)
    return Recording(home, At.of(run), RowCopy([*home.p.target, *home.p.draft]), key, weakref.ref(run))


def fixed(tensor: Tensor) -> Tensor:
    """A copy to be recorded, of which the same dimensions may vary."""
    copied = tensor.clone()
    copied.__dict__.update(tensor.__dict__)  # mark_dynamic notes them there
    return copied


def written(run: Run) -> list[Tensor]:
    """What a cycle changes in place."""
    p = run.p
    return [*(getattr(p, name) for name in VALUES), *p.target, *p.draft]


def read(run: Run) -> list[Tensor]:
    """What it only reads, weights apart."""
    request = run.request
    contexts = [tensor for prompts, tables, _ in run.contexts for tensor in (*prompts, *tables)]
    settings = [run.settings[name] for name in sorted(run.settings)]
    small = [*run.eos_ids, *settings, request.lengths, request.new_tokens, run.streams.seeds]
    return [run.keys, *small, *contexts]


def signature(run: Run) -> Any:
    """Runs of equal signatures can use one recording: shapes, types, and where the weights are."""
    weights = tuple(weight.data_ptr() for *_, weights in run.contexts for weight in weights)
    kinds = tuple((tensor.shape, tensor.dtype) for tensor in (*written(run), *read(run)))
    return kinds, tuple(sorted(run.settings)), weights


def move(run: Run, home: Run) -> None:
    """Let ``run`` go on in the tensors of ``home``."""
    for mine, theirs in zip((*written(home), *read(home)), (*written(run), *read(run)), strict=True):
        mine.copy_(theirs)
    go_on_in(run, home)


def go_on_in(run: Run, home: Run) -> None:
    """Let ``run`` use the tensors of ``home``, which hold what its own do; lists stay its own."""
    for name in VALUES:
        setattr(run.p, name, getattr(home.p, name))
    run.p.target, run.p.draft = list(home.p.target), list(home.p.draft)
    run.contexts, run.keys = list(home.contexts), home.keys
