"""What Linux tells about the machine and this process (proc(5)). Where it does not, the value is None."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

_STATUS = {"VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared", "VmHWM": "peak"}


def resident_memory(rom: Path | None) -> dict[str, int] | None:
    """Bytes of this process: "resident", of it "anonymous" (heap and caches), "file" (mapped files) and "shared";
    "peak", the greatest that "resident" ever was; and "rom", what of "file" is the file `rom`."""
    try:
        status = Path("/proc/self/status").read_text()
        memory = _kilobytes(_STATUS, status)
        if rom is not None:
            memory["rom"] = _resident_of(rom.resolve(), Path("/proc/self/smaps").read_text())
    except OSError:
        return None
    return memory


def _kilobytes(fields: Mapping[str, str], text: str) -> dict[str, int]:
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    return {name: int(found[field]) * 1024 for field, name in fields.items() if field in found}


def _resident_of(path: Path, smaps: str) -> int:
    """Resident bytes of all mappings of a file. In smaps a line that ends with its path begins each."""
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)
    its = [mapping for mapping in mappings if mapping.partition("\n")[0].endswith(f" {path}")]
    return sum(_kilobytes({"Rss": "rss"}, mapping)["rss"] for mapping in its)


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
