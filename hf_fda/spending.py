"""What a run took: seconds and memory, and on what, as its card states them."""

from __future__ import annotations

import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


class Meter:
    """Measures one run from when it is made.

    `made` and `found` count pieces of work that were done, and those that an earlier run had finished.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.made = self.found = 0

    def count(self, finished: list[bool]) -> None:
        """Note which pieces of work were finished when the run came to them."""
        self.found += sum(finished)
        self.made += len(finished) - sum(finished)

    def spending(self, device: torch.device, processes: int) -> dict[str, Any] | None:
        """What the run has taken, as plain values; None where it had nothing to do.

        Args:
            device: where it computed.
            processes: how many there are.
        """
        if not self.made:
            return None
        return {
            "seconds": round(time.perf_counter() - self.start, 1),
            "peak_bytes": peak_bytes(),
            "device_peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            "hardware": hardware(device),
            "processes": processes,
            "resumed": self.found > 0,
        }


def forget_peak() -> None:
    """Let `peak_bytes` count from now on, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int | None:
    """The most memory that this process ever held (or since `forget_peak`), libraries included; None where the system
    does not say."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would start from the parent's
        lines = status.read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def hardware(device: torch.device) -> str:
    """What a device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} device"
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    """The name of the CPU, as far as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
