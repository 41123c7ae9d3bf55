"""What a measurement depends on besides the package's shape: the machine, the software, and what was chosen.

What Linux tells about the machine is in proc(5); where it does not, the value is None.
"""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import _core
from ..package import has_random_weights
from .contender import Package

_BUSY = 0.5
"""Load average above which the start of a run was not quiet."""


def describe(package: Package, engine: _core.Engine) -> dict[str, Any]:
    """A report's "environment", at the start of a run."""
    manifest, load = package.manifest, _load_average()
    busy = load is not None and load > _BUSY
    return {
        "model": manifest["name"],
        "random_weights": has_random_weights(manifest),
        "weights": manifest["weights"]["type"],
        "rows": manifest["memory"]["row_type"] if package.has_memory else None,
        "kv_type": engine.kv_type,
        "context": package.context,
        "cpu": _cpu_model(),
        "simd": _core.cpu_kernels(),
        "cores": os.cpu_count(),
        "available_cores": len(os.sched_getaffinity(0)),
        "rom_access": engine.rom_access,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "meki": version("meki"),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": load,
        "machine_note": f"other work was running at the start: load average {load:.2f}" if busy else None,
    }


def _cpu_model() -> str:
    """The processor's name, or at least its architecture."""
    try:
        found = re.search(
            r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def _load_average() -> float | None:
    """Mean number of running tasks over the last minute."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None
