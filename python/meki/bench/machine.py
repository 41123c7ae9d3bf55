"""What Linux tells about the machine and this process (proc(5)). Where it does not, the value is None."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from .._core import resident_memory

__all__ = ["available_cores", "cpu_model", "load_average", "resident_memory"]


def cpu_model() -> str:
    """The processor's name, or at least its architecture."""
    try:
        found = re.search(
            r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


def load_average() -> float | None:
    """Mean number of running tasks over the last minute."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None
