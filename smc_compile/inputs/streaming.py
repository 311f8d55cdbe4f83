"""Hand tokens out while a generation runs: those that can no longer change, or the leader as it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smc_compile.errors import GenerationError, OptionError
from smc_compile.runtime.state.settling import Progress

STREAMS = ("settled", "leader")


@dataclass(frozen=True)
class Streaming:
    """What a user wants to see while a generation runs.

    Attributes:
        streamer, stream: see ``watch_for``.
        max_lag: settle what is older than so many tokens by drawing one of the particles' pasts; None never does.
    """

    streamer: Any = None
    stream: str = "settled"
    max_lag: Any = None

    def of(self, ids: Tensor) -> dict[str, Any]:
        """The arguments of ``build_request`` for prompts ``ids`` [B, P].

        Raises:
            OptionError: streamer and stream do not fit each other or the batch, or ``max_lag`` is no number of tokens.
        """
        lag = self.max_lag
        if lag is not None and (isinstance(lag, bool) or not isinstance(lag, int) or lag < 0):
            raise OptionError("max_lag must be a number of tokens of at least 0", f"got {lag!r}")
        return {"max_lag": lag, "watch": watch_for(self.streamer, self.stream, ids)}


def watch_for(streamer: Any, stream: str, ids: Tensor) -> Callable[[Progress], None] | None:
    """What a session calls after each cycle for ``streamer``.

    Args:
        streamer: an object with ``put(token_ids)`` and ``end()`` (a list of them for several requests), which gets the
            prompt and then tokens as they settle, never to be taken back; or a function that takes a ``Progress``.
        stream: "settled", or "leader": the best particle as it stands, which may be revised. Only a function gets it.
        ids: the prompts [B, P].

    Raises:
        OptionError: when streamer and stream do not fit each other, or the batch.
    """
    if stream not in STREAMS:
        raise OptionError(f"stream {stream!r} is unknown", f"valid values are {', '.join(STREAMS)}")
    if streamer is None:
        if stream == "leader":
            raise OptionError('stream="leader" needs a streamer', "nothing would be shown", "pass streamer=function")
        return None
    streamers = list(streamer) if isinstance(streamer, (list, tuple)) else [streamer]
    if len(streamers) == 1 and not hasattr(streamers[0], "put"):
        return _function(streamers[0], stream)
    for one in streamers:
        if not callable(getattr(one, "put", None)) or not callable(getattr(one, "end", None)):
            raise OptionError(
                "a streamer must have put(token_ids) and end(), or be a function of a Progress",
                f"got {type(one).__name__}",
            )
    if stream == "leader":
        raise OptionError(
            'stream="leader" needs a function',
            "the leader may be revised, and what was put cannot be taken back",
            'pass streamer=lambda progress: ..., or use stream="settled"',
        )
    if len(streamers) != len(ids):
        raise OptionError(
            f"{len(streamers)} streamers for {len(ids)} requests",
            "each request settles at its own pace",
            "pass a list with a streamer for each request, or a function of a Progress",
        )
    return _Settled(streamers, ids)


def _function(streamer: Any, stream: str) -> Callable[[Progress], None]:
    if not callable(streamer):
        raise OptionError("a streamer must have put(token_ids) and end(), or be a function", f"got {streamer!r}")

    def watch(progress: Progress) -> None:
        shown = progress.tokens if stream == "leader" else progress.tokens[: progress.settled]
        _guarded(streamer, Progress(progress.request, shown, progress.settled, progress.finished))

    return watch


class _Settled:
    """Puts every token once, when it settles; ends a request's streamer when the request ends."""

    def __init__(self, streamers: Sequence[Any], ids: Tensor) -> None:
        self._streamers, self._ids = streamers, ids
        self._done = [-1] * len(streamers)  # tokens put; -1: not even the prompt

    def __call__(self, progress: Progress) -> None:
        b = progress.request
        streamer = self._streamers[b]
        if self._done[b] < 0:
            _guarded(streamer.put, self._ids[b : b + 1].cpu())
            self._done[b] = 0
        for token in progress.tokens[self._done[b] : progress.settled].cpu():
            _guarded(streamer.put, token[None])
        self._done[b] = max(self._done[b], progress.settled)
        if progress.finished:
            _guarded(streamer.end)


def _guarded(call: Callable[..., Any], *arguments: Any) -> None:
    try:
        call(*arguments)
    except Exception as error:
        raise GenerationError(
            "the streamer broke off the generation",
            f"it raised {type(error).__name__}: {error}",
            "error.partial holds what was generated before",
        ) from error
