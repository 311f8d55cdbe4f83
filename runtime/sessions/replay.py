"""Cycles that are recorded once, with all that they read and write at fixed addresses, and replayed: CUDA graphs.

Nothing in a recorded cycle is decided by the host. The host writes at which token a cycle stands (``Asked``), replays
it, and reads what came of it in one small tensor (``Answer.status``). A recording serves every later call of the same
shapes, whose tensors are copied to where the recorded ones stand.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from smc_compile.errors import GenerationError
from smc_compile.kernels.copy_rows import RowCopy
from smc_compile.runtime.sessions.cycle import Status
from smc_compile.runtime.sessions.run import Run
from smc_compile.runtime.state.population import Population
from smc_compile.runtime.state.request import Request

KEPT = 8  # recordings of a session
# A recording serves prompts and answers up to the next multiple.
PROMPTS = 128
ANSWERS = 128

# Takes work that reads and writes tensors in place, and returns what does the same work on the same tensors again.
Record = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_graphs(device: torch.device) -> Record:
    """Records CUDA graphs on ``device``. They share the memory of what a cycle makes in between, so one may run at a
    time. Work is recorded after it has run once, so that everything is compiled."""
    first: list[Any] = []  # a graph that keeps this memory from being given back, and the stream of all graphs

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
    """Whether the cycles of a request are recorded: those in which the host takes no part, and that are not conditioned
    on anything, whose tables are of no fixed size."""
    free = request.stop is None and request.max_lag is None and request.conditioning is None
    return replay is not None and free


def in_shape(request: Request, capacity: int) -> tuple[Request, int]:
    """The same request and ``capacity``, padded to shapes that other requests share."""
    return request.padded(PROMPTS, ANSWERS), capacity + -capacity % ANSWERS


class Asked(NamedTuple):
    """What the host writes before a recorded cycle, on its device."""

    cycle: Tensor  # [], number of the cycle

    @classmethod
    def of(cls, run: Run) -> Asked:
        return cls(torch.zeros((), dtype=torch.int64, device=run.keys.device))


class Answer(NamedTuple):
    """What a recorded cycle writes for the host, as of ``CycleInfo``."""

    status: Tensor  # [7, B] int64, the fields of ``Status``
    ess: Tensor  # [B]
    cost: Tensor  # [B]
    ancestors: Tensor  # [B, N]

    @classmethod
    def of(cls, run: Run) -> Answer:
        batch, device = run.request.batch, run.keys.device
        status = torch.zeros(len(Status._fields), batch, dtype=torch.int64, device=device)
        ess = torch.empty_like(run.p.state.weights.log_evidence)
        return cls(status, ess, ess.clone(), torch.zeros(batch, run.p.n, dtype=torch.int64, device=device))

    def write(self, status: Tensor, ess: Tensor, cost: Tensor, ancestors: Tensor) -> None:
        """Overwrite all fields, in place."""
        for kept, value in zip(self, (status, ess, cost, ancestors), strict=True):
            kept.copy_(value)


# Reads and writes the tensors of a run, an ``Asked`` and an ``Answer``, and copies rows of caches by the last argument.
Work = Callable[[Run, Asked, Answer, RowCopy], None]


@dataclass(eq=False)
class Recording:
    """A cycle with its tensors.

    Attributes:
        run: holds the tensors that the cycle reads and writes.
        key: the ``signature`` of the runs that can use it.
        user: the call that is using the tensors.
        ran: whether the cycle has run once: then everything is compiled, and it can be recorded.
        replay: runs the cycle; None until it is recorded.
    """

    run: Run
    asked: Asked
    answer: Answer
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
    """The recordings of one session; ``work`` is its cycle."""

    def __init__(self, record: Record, work: Work) -> None:
        self._record, self._work = record, work
        self._recordings: list[Recording] = []  # the last used stands last

    def __call__(self, run: Run, cycle: int) -> tuple[Status, Answer]:
        """Cycle number ``cycle``.

        It changes the tensors of the run's state. The answer's tensors are overwritten by the next cycle.

        Raises:
            GenerationError: when the cycle cannot be recorded, before it runs.
        """
        recording = self._recording_of(run)
        recording.asked.cycle.fill_(cycle)
        if not recording.ran:
            self._run(recording)
            recording.ran = True
        else:
            recording.replay = recording.replay or self._recorded(recording)
            recording.replay()
        return Status(*recording.answer.status.cpu()), recording.answer

    def _run(self, recording: Recording) -> None:
        self._work(recording.run, recording.asked, recording.answer, recording.copy_rows)

    def _recorded(self, recording: Recording) -> Callable[[], None]:
        try:
            return self._record(lambda: self._run(recording))
        except Exception as error:
            raise GenerationError(
                "a cycle cannot be recorded as a CUDA graph",
                f"{type(error).__name__}: {error}",
                "pass cuda_graph=False to run cycles from the host; error.partial holds what was generated before",
            ) from error

    def forget(self) -> bool:
        """Free the memory of recordings that no call is using. Returns whether there were any."""
        before = len(self._recordings)
        self._recordings = [r for r in self._recordings if r.busy]
        return len(self._recordings) < before

    def _recording_of(self, run: Run) -> Recording:
        """The recording whose tensors ``run`` uses. If there is none, its tensors move to an idle one or a new one."""
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
    """A recording with tensors of its own, which ``run`` uses from here on. Those before may be the caller's, or
    weights, and nothing may write to them."""
    request, streams, state = run.request, copy(run.streams), run.p.state
    streams.seeds = fixed(streams.seeds)
    home = replace(
        run,
        request=replace(request, lengths=fixed(request.lengths), new_tokens=fixed(request.new_tokens), watch=None),
        p=Population(run.p.n, pytree.tree_map_only(Tensor, fixed, state), run.p.made),
        streams=streams,
        contexts=[(list(map(fixed, a)), list(map(fixed, b)), weights) for a, b, weights in run.contexts],
        keys=fixed(run.keys),
        outcomes=[],
        watcher=None,
    )
    use_tensors_of(home, run)
    copy_rows = RowCopy([*home.p.state.target, *home.p.state.draft])
    return Recording(home, Asked.of(run), Answer.of(run), copy_rows, key, weakref.ref(run))


def fixed(tensor: Tensor) -> Tensor:
    """A copy of which the same dimensions are marked as dynamic."""
    copied = tensor.clone()
    copied.__dict__.update(tensor.__dict__)  # marks are attributes of a tensor
    return copied


def read(run: Run) -> list[Tensor]:
    """The inputs of a cycle that it does not write, weights apart."""
    request = run.request
    contexts = [tensor for prompts, tables, _ in run.contexts for tensor in (*prompts, *tables)]
    settings = [run.settings[name] for name in sorted(run.settings)]
    small = [*run.eos_ids, *settings, request.lengths, request.new_tokens, run.streams.seeds]
    return [run.keys, *small, *contexts]


def signature(run: Run) -> Any:
    """Shapes, types, and where the weights are: runs of equal signatures can use one recording."""
    weights = tuple(weight.data_ptr() for *_, weights in run.contexts for weight in weights)
    kinds = tuple((tensor.shape, tensor.dtype) for tensor in (*run.p.state.tensors, *read(run)))
    return kinds, tuple(sorted(run.settings)), weights


def move(run: Run, home: Run) -> None:
    """Copy what ``run`` holds into the tensors of ``home``, and let it use these from here on."""
    kept, values = (*home.p.state.tensors, *read(home)), (*run.p.state.tensors, *read(run))
    for mine, theirs in zip(kept, values, strict=True):
        mine.copy_(theirs)
    use_tensors_of(home, run)


def use_tensors_of(home: Run, run: Run) -> None:
    """Let ``run`` use the tensors of ``home``, which hold what its own hold."""
    run.p.state = home.p.state
    run.contexts, run.keys = list(home.contexts), home.keys
