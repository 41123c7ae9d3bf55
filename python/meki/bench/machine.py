"""What Linux tells about the machine and this process (proc(5)). Where it does not, the value is None."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

_STATUS = {"VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared", "VmHWM": "peak"}


def resident_memory() -> dict[str, int] | None:
    """Bytes of this process: "resident", of it "anonymous" (heap and caches), "file" (mapped files) and "shared", and
    "peak", the greatest that "resident" ever was."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE))
    return {name: int(fields[field]) * 1024 for field, name in _STATUS.items() if field in fields}


def storage_bytes() -> int | None:
    """Bytes that this process has had fetched from storage so far: what the page cache had is not among them."""
    try:
        counters = Path("/proc/self/io").read_text()
    except OSError:
        return None
    found = re.search(r"^read_bytes: (\d+)$", counters, re.MULTILINE)
    return int(found[1]) if found else None


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
