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


READS_TEXT = "what reads the text before it draws goes to generate(..., logits_processor=[...])"
BEHIND = "call it behind the loop, or end a text by its words with generate(..., stop_strings=[...], tokenizer=...)"

# What the first lines of Dynamo's message hold -> what is to be done. The first that fits is taken.
_ADVICE = [
    (r"TracedNumber", f"a token's number may be compared, kept in a list and made a tensor again; {READS_TEXT}"),
    (r"torch\.Generator|`Generator|_C\.Generator",
     "pass the generator as an argument of the function, or pass seed=0 as an option"),
    (r"[Dd]ata-dependent (branching|jump|expression)|guard on data-dependent",
     "let the branch end the loop (break, return) in a function whose source is known, or use torch.where"),
    (r"Tensor\.(item|tolist)|_local_scalar_dense", f"keep it in a tensor: compare with torch.where; {READS_TEXT}"),
    (r"decode|convert_ids_to_tokens|endswith", BEHIND),
    (r"[Dd]ynamic shape operator|nonzero|unique", READS_TEXT),
]  # fmt: skip


@contextmanager
def dynamo_errors() -> Iterator[None]:
    """Inside, what Dynamo raises becomes a LoopError. Other errors are the user's own and stay as they are."""
    try:
        yield
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
        if "bind arguments" in str(error):
            raise failed_loop(error, context=True) from error
        raise Untraceable(
            "The decode loop holds code that Dynamo cannot trace.",
            _reason(error),
            advice(_reason(error)),
            _frames(error),
        ) from error
    except torch._dynamo.exc.TorchRuntimeError as error:
        raise failed_loop(error) from error


def advice(message: str) -> str:
    """What a user can do about a message of Dynamo's; nothing is said where that is not known."""
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
    of_a_number = "TracedNumber" in str(error)  # which does not do what a number does
    return FailedLoop(
        "the loop fails with these arguments",
        "\n".join(line.removeprefix("Developer debug context: ")[:300] for line in lines) or first_lines(error),
        advice("TracedNumber")
        if of_a_number
        else "run the plain loop to see the error, or name the number of iterations: decode(trip_count='n')",
    )


def first_lines(error: Exception, count: int = 3) -> str:
    """The beginning of an error's message in one line."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[: 120 * count]
