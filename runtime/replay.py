"""Cycles that are recorded once, with all that they read and write at fixed addresses, and replayed: CUDA graphs.

Nothing in a recorded cycle is decided by the host. It says at which token a cycle stands, replays it, and reads one
small tensor that tells what came of it. A recording serves every later call of the same shapes, whose tensors are
copied to where the recorded ones stand.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smc_compile.errors import InputError
from smc_compile.kernels.copy_rows import RowCopy

from .memory import require_memory
from .request import Request
from .run import Run

KEPT = 8  # recordings of a session
# A recording serves prompts and answers up to the next multiple.
PROMPTS = 128
ANSWERS = 128

# What it is handed works in place on tensors that stay where they are; what it returns does the same again.
Record = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_graphs(device: torch.device) -> Record:
    """Record CUDA graphs on ``device``, one at a time in use: they share the memory in between. What is recorded has
    run once before, so that everything is compiled."""
    pool: list[Any] = []

    def record(work: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, *pool):
                work()
            pool[:] = [graph.pool()]
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

    made: Tensor  # []
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
        replay: None until it has run once.
        user: the call that is using them.
    """

    run: Run
    at: At
    copy_rows: RowCopy
    key: Any
    user: weakref.ref[Run]
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
        """The cycle behind ``run.p.made`` tokens; what the host counts is left to the caller. tries: [B]."""
        recording = self._recording_of(run)
        at = recording.at
        at.made.fill_(run.p.made)
        at.cycle.fill_(cycle)
        at.tries.copy_(tries)
        if recording.replay is None:
            self._work(recording.run, at, recording.copy_rows)
            recording.replay = self._record(lambda: self._work(recording.run, at, recording.copy_rows))
        else:
            recording.replay()
        return Status(*at.status.cpu()), at

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
    """One that takes over the tensors of ``run``, which goes on using them."""
    p = replace(run.p, ess=[], ancestors=[], lag=[])
    home = replace(run, p=p, outcomes=[], watcher=None)
    return Recording(home, At.of(run), RowCopy([*p.target, *p.draft]), key, weakref.ref(run))


def written(run: Run) -> list[Tensor]:
    """What a cycle changes in place."""
    p = run.p
    return [p.tokens, p.log_p, p.ended, p.stopped, p.length, p.log_w, p.log_evidence, p.shared, *p.target, *p.draft]


def read(run: Run) -> list[Tensor]:
    """What it only reads, weights apart."""
    request = run.request
    contexts = [tensor for prompts, tables, _ in run.contexts for tensor in (*prompts, *tables)]
    small = [*run.ends, *run.settings.values(), request.lengths, request.new_tokens, run.streams.seeds]
    return [run.keys, *small, *contexts]


def signature(run: Run) -> Any:
    """Runs of equal signatures can use one recording: shapes, types, and where the weights are."""
    weights = tuple(weight.data_ptr() for *_, weights in run.contexts for weight in weights)
    return tuple((tensor.shape, tensor.dtype) for tensor in (*written(run), *read(run))), weights


def move(run: Run, home: Run) -> None:
    """Let ``run`` go on in the tensors of ``home``."""
    for mine, theirs in zip((*written(home), *read(home)), (*written(run), *read(run)), strict=True):
        mine.copy_(theirs)
    for name in ("tokens", "log_p", "ended", "stopped", "length", "log_w", "log_evidence", "shared", "target", "draft"):
        setattr(run.p, name, getattr(home.p, name))
    run.contexts, run.keys = home.contexts, home.keys
