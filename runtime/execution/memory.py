"""Whether a call fits the memory of its device: asked before anything of it is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from smc_compile.errors import InputError
from smc_compile.runtime.execution.incremental import RuntimeModel
from smc_compile.runtime.state.request import Request

OF_A_TOKEN = 16  # bytes: the token, and its log-probability in float64


class Need(NamedTuple):
    """Bytes of a call; what else it allocates is not counted."""

    shared: int  # caches of the prompts, whatever N is
    each: int  # for each particle, in all requests: caches of its suffix, tokens, logits

    def of(self, n: int) -> int:
        """Bytes with N = ``n``."""
        return self.shared + n * self.each

    def most(self, free: int) -> int:
        """The largest N that fits into ``free`` bytes."""
        return max((free - self.shared) // self.each, 0)


def row_bytes(caches: int, capacity: int, width: int, logits: int) -> int:
    """Of one row: its caches, the tokens of ``capacity`` slots, logits of ``width`` positions of ``logits`` bytes."""
    return caches + OF_A_TOKEN * capacity + width * logits


def need_of(
    request: Request, capacity: int, width: int, target: RuntimeModel, draft: RuntimeModel | None = None
) -> Need:
    """Of rows with suffixes of ``capacity`` slots, of which the target scores ``width`` positions at once."""
    models = [model for model in (target, draft) if model is not None]
    batch, prompt = request.ids.shape
    caches = sum(model.state_bytes(capacity) for model in models)
    row = row_bytes(caches, capacity, width, target.logit_bytes())
    return Need(batch * sum(model.state_bytes(prompt) for model in models), batch * row)


def require_memory(
    request: Request, n: int, capacity: int, width: int, target: RuntimeModel, draft: RuntimeModel | None = None
) -> None:
    """Refuse a call of N = ``n`` rows a request that cannot fit; the rest as for ``need_of``.

    Raises:
        InputError: with the largest N that fits.
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
    """In decimal units, as memory is sold: 1 GB is 1e9 bytes."""
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if count >= s / 10), ("kB", 1e3))
    return f"{count / size:,.1f} {unit}"


def free_bytes(device: torch.device) -> int | None:
    """What may still be allocated on ``device``; None where that cannot be known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by the allocator
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    found = [count for count in (_available(), _left_to_group()) if count is not None]
    return min(found) if device.type == "cpu" and found else None


def _available(table: Path = Path("/proc/meminfo")) -> int | None:
    """What Linux says it can give without swapping."""
    value = _fields(table).get("MemAvailable:")
    return None if value is None else value * 1024


def _left_to_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What is left of the limit of a container (control groups, version 2 or 1); cached files give way."""
    for folder, limit, used, cached in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, now = _number(folder / limit), _number(folder / used)
        if most is not None and now is not None:
            return max(most - now + _fields(folder / "memory.stat").get(cached, 0), 0)
    return None


def _number(file: Path) -> int | None:
    """None also for the word "max", which is no limit."""
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
