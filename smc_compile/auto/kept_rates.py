"""What was measured of this machine is kept beside Inductor's code, so that every process predicts the same.

Without that a choice, and so the text of a seed, would change from one process to the next with the noise of timings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Numbers = Mapping[str, "float | list[float]"]
TOLD = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags")  # of /proc/cpuinfo


def kept(name: str, device: torch.device, measure: Callable[[], Numbers]) -> Numbers:
    """The numbers of that name for this device: read, or measured and written.

    A file that cannot be read, or holds something else, is measured anew; where none can be written, each process
    measures.
    """
    path = place(name, device)
    if (found := _read(path)) is not None:
        return found
    measured = measure()
    _write(path, measured)
    return measured


def place(name: str, device: torch.device) -> Path:
    """Where the numbers of that name are kept for this device: in the folder smc_rates of Inductor's cache."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    told = json.dumps([name, torch.__version__, machine_of(device)])
    return Path(cache_dir(), "smc_rates", hashlib.sha256(told.encode()).hexdigest()[:20] + ".json")


def machine_of(device: torch.device) -> list[str]:
    """What tells this device from others."""
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device)]
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        first = []
    named = [line for line in first if line.split("\t")[0].split(":")[0].strip() in TOLD]
    return named or [platform.machine(), platform.processor()]


def _read(path: Path) -> Numbers | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and all(map(_is_numbers, found.values())) else None


def _is_numbers(value: object) -> bool:
    """Seconds, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(v, float | int) and math.isfinite(v) and v >= 0 for v in values)


def _write(path: Path, numbers: Numbers) -> None:
    """Whole or not at all, whoever writes beside us."""
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(dict(numbers)))
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
