"""The JSON file of a measurement, and what it was measured on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from smc_compile.bench.figures import Row
from smc_compile.errors import OptionError


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def device_name(device: torch.device) -> str:
    """What the vendor calls it."""
    return cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


def cpu_name() -> str:
    """The processor's own name where Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def check_json_path(path: str | None) -> None:
    """Refuse a file that cannot be written before minutes have been spent."""
    if path is None:
        return
    if Path(path).is_dir():
        raise OptionError(f"Cannot write {path}.", "it is a folder", "name a file")
    if not Path(path).absolute().parent.is_dir():
        raise OptionError(f"Cannot write {path}.", f"{Path(path).absolute().parent} is not a folder")


def write_json(path: str, command: str, arguments: dict[str, Any], rows: Sequence[Row], **more: Any) -> None:
    """Store rows with what they were measured on."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    report = {
        "command": command,
        "date": date,
        "arguments": arguments,
        "machine": machine(),
        **more,
        "rows": list(rows),
    }
    Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
