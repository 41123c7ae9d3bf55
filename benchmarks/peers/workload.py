"""What every engine of compare.py measures, and how it says what went wrong."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

STDERR_LINES = 8


class PeerError(RuntimeError):
    """An engine that is missing, failed or answered what cannot be understood."""


@dataclass(frozen=True)
class Workload:
    """`tokens` tokens of prefill or decode with `depth` tokens in the KV cache."""

    kind: str
    """`prefill` or `decode`."""
    depth: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.kind} {self.tokens} at depth {self.depth:,}"


class Engine(Protocol):
    """Measures the workloads that it was made with, in rounds."""

    name: str

    def prepare(self) -> None:
        """What is done once, before all rounds, and may take minutes: finds the best setting of each workload."""

    def round(self) -> list[float]:
        """tokens/s of each workload, in their order."""

    def settings(self) -> Sequence[str]:
        """What each workload runs with; "" where there was nothing to choose."""

    def describe(self) -> str:
        """Its version and its model. After a round."""

    def figures(self) -> dict[str, Any]:
        """What else it knows, for JSON."""

    def close(self) -> None:
        """Ends its processes."""


def find_binary(name: str, remedy: str) -> str:
    """The path of a command: beside this Python first, so that a virtual environment need not be activated."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise PeerError(f"{name}: no such executable; {remedy}")
    return found


def failure(binary: str, status: int, stderr: str) -> PeerError:
    how = f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"
    last = "\n  ".join(stderr.strip().splitlines()[-STDERR_LINES:]) or "(nothing)"
    return PeerError(f"{binary} {how}; the last of its stderr:\n  {last}")


def positive_speed(value: object, source: str) -> float:
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise PeerError(f"{source}: got {value!r}, expected tokens/s, a positive number")
    return float(value)
