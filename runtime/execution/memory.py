"""Whether a call fits into the memory of its device. It is checked before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from smc_compile.errors import InputError
from smc_compile.runtime.execution.incremental import RuntimeModel
from smc_compile.runtime.state.request import Request

OF_A_TOKEN = 16  # bytes: the token in int64, its log-probability in float64


class Need(NamedTuple):
    """Bytes that a call takes at least: other allocations are not counted."""

    shared: int  # caches of the prompts, for any N
    each: int  # one more particle in every request: caches of the suffix, tokens, logits

    def of(self, n: int) -> int:
        """Bytes with N = ``n``."""
        return self.shared + n * self.each

    def most(self, free: int) -> int:
        """The largest N that fits into ``free`` bytes."""
        return max((free - self.shared) // self.each, 0)


def row_bytes(caches: int, capacity: int, width: int, logits: int) -> int:
    """Bytes of one row: ``caches``, tokens in ``capacity`` slots, and ``width`` positions of ``logits`` bytes."""
    return caches + OF_A_TOKEN * capacity + width * logits


def need_of(
    request: Request, capacity: int, width: int, target: RuntimeModel, draft: RuntimeModel | None = None
) -> Need:
    """Memory of a call with suffixes of ``capacity`` slots, whose target scores ``width`` positions at once."""
    models = [model for model in (target, draft) if model is not None]
    batch, prompt = request.ids.shape
    caches = sum(model.state_bytes(capacity) for model in models)
    row = row_bytes(caches, capacity, width, target.logit_bytes())
    return Need(batch * sum(model.state_bytes(prompt) for model in models), batch * row)


def require_memory(
    request: Request, n: int, capacity: int, width: int, target: RuntimeModel, draft: RuntimeModel | None = None
) -> None:
    """Refuse a call that cannot fit. n: rows of a request, N; other arguments as for ``need_of``.

    Raises:
        InputError: the call does not fit. It names the largest N that would.
    """
    device = request.ids.device
    free = free_bytes(device)
    if free is None:
        return
    need = need_of(request, capacity, width, target, draft)
    if need.of(n) <= free:
        return
    fits = need.most(free)
    batch, prompt = request.ids.shape
    requests = "1 request" if batch == 1 else f"{batch} requests"
    raise InputError(
        f"{n} particles a request do not fit into memory" if n > 1 else "this call does not fit into memory",
        f"caches, tokens and logits take at least {readable(need.of(n))}, and {readable(free)} are free on {device}: "
        f"{readable(need.shared)} for prompts of {prompt} tokens ({requests}), {readable(need.each)} for each "
        f"particle with {int(request.new_tokens.max())} new tokens",
        (f"pass n_particles={fits} at most for these lengths, or ask" if 0 < fits < n else "ask")
        + " for fewer new tokens or fewer requests at once",
    )


def readable(count: int) -> str:
    """``count`` bytes in decimal units: 1 GB is 1e9 bytes."""
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if count >= s / 10), ("kB", 1e3))
    return f"{count / size:,.1f} {unit}"


def free_bytes(device: torch.device) -> int | None:
    """Bytes that may still be allocated on ``device``; None where that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch's allocator
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    found = [count for count in (_available(), _left_to_group()) if count is not None]
    return min(found) if device.type == "cpu" and found else None


def _available(table: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that Linux can give without swapping."""
    value = _fields(table).get("MemAvailable:")
    return None if value is None else value * 1024


def _left_to_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left of the limit of a container (control groups, version 2 or 1). Cached files count as free."""
    for folder, limit, used, cached in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, now = _number(folder / limit), _number(folder / used)
        if most is not None and now is not None:
            return max(most - now + _fields(folder / "memory.stat").get(cached, 0), 0)
    return None


def _number(file: Path) -> int | None:
    """The number in a file; None where there is none, as in "max", which means no limit."""
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _fields(file: Path) -> dict[str, int]:
    """The number behind the first word of each line."""
    lines = (line.split() for line in _text(file).splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
