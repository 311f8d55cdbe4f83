"""What Dynamo cannot trace, in our words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from smc_compile.errors import LoopError


class Untraceable(LoopError):
    """Dynamo cannot trace the function.

    Attributes:
        frames: (file, line) of the calls that lead to the code, the outermost first.
    """

    def __init__(self, what: str, why: str, fix: str, frames: list[tuple[str, int]]) -> None:
        super().__init__(what, why, fix)
        self.frames = frames


class FailedLoop(LoopError):
    """The function fails while it is traced: its own fault, or a value that only a run for real would have."""


# What Dynamo's message holds -> what is to be done. The first that fits is taken.
_ADVICE = [
    (r"Tensor\.item|\.item\(\)|SymNodeVariable\(\)|aten\._local_scalar_dense", "keep the value in a tensor: compare with "
     "torch.where, and call .item() behind the loop"),
    (r"Generator", "pass seed=0 as an option instead: draws are the compiler's own, and generators are not read"),
    (r"[Dd]ata-dependent (branching|jump|expression)|guard on data-dependent", "write it as tensor code, torch.where; or "
     "let it end the loop, in the function itself"),
    (r"builtins?\.print|`print`|print\(", "print behind the loop, or watch the tokens with generate(..., streamer=...)"),
    (r"\bgenerator function|yield", "collect the tokens and return them; smc_compile.generate(..., streamer=...) streams"),
]  # fmt: skip


@contextmanager
def dynamo_errors() -> Iterator[None]:
    """Inside, what Dynamo raises becomes a LoopError. Other errors are the user's own and stay as they are."""
    try:
        yield
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
        if isinstance(error.__cause__, LoopError):
            raise error.__cause__ from None
        if "bind arguments" in str(error):
            raise failed_loop(error, context=True) from error
        raise Untraceable(
            "The decode loop holds code that Dynamo cannot trace.", _reason(error), advice(str(error)), _frames(error)
        ) from error
    except torch._dynamo.exc.TorchRuntimeError as error:
        raise failed_loop(error) from error


def advice(message: str) -> str:
    """What a user can do about a message of Dynamo's; '' where that is not known."""
    return next((fix for pattern, fix in _ADVICE if re.search(pattern, message)), "")


def _reason(error: Exception) -> str:
    """The first line of Dynamo's message, its explanation and the user's line."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [lines[0] if lines else type(error).__name__]
    found += [line.partition(":")[2].strip() for line in lines if line.startswith(("Explanation:", "Developer debug"))]
    frames = list(getattr(error, "real_stack", None) or ())
    at = [f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}: {frames[-1].line}"] if frames else []
    return "; ".join([*(part[:200] for part in found[:3]), *at])


def _frames(error: Exception) -> list[tuple[str, int]]:
    return [(frame.filename, frame.lineno or 0) for frame in getattr(error, "real_stack", None) or ()]


def failed_loop(error: Exception, context: bool = False) -> LoopError:
    """The loop itself fails; with ``context`` Dynamo says where, in lines of its own."""
    lines = [line.strip() for line in str(error).splitlines() if "context:" in line] if context else []
    return FailedLoop(
        "the loop fails with these arguments",
        "\n".join(line.removeprefix("Developer debug context: ")[:300] for line in lines) or first_lines(error),
        "run the plain loop to see the error, or name the number of iterations: decode(trip_count='n')",
    )


def first_lines(error: Exception, count: int = 3) -> str:
    """The beginning of an error's message in one line."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[: 120 * count]
