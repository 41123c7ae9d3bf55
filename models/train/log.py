"""What a run logs: lines of JSON, and TensorBoard's events if that is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

LINES, EVENTS = "log.jsonl", "tensorboard"


class Log:
    def __init__(self, out: Path, step: int) -> None:
        """In the directory of a run, which goes on after `step`."""
        self._lines = (out / LINES).open("a", buffering=1)
        self._events = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            # Steps that a killed run logged, and that are done once more, are hidden.
            self._events = SummaryWriter(out / EVENTS, purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        if self._events:
            self._events.close()

    def write(self, entry: dict[str, Any]) -> None:
        """entry: `step`, and numbers by name."""
        self._lines.write(json.dumps(entry) + "\n")
        if self._events:
            for name, value in entry.items():
                if name != "step":
                    self._events.add_scalar(name, value, entry["step"])


def read_log(out: Path) -> list[dict[str, Any]]:
    """The entries, a line for each step: a run that was killed logged some twice, of which the last counts."""
    entries = [json.loads(line) for line in (out / LINES).read_text().splitlines()]
    return sorted({entry["step"]: entry for entry in entries}.values(), key=lambda entry: entry["step"])
