"""Progress of a command, for people at a terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class ProgressBars:
    """Bars on stderr, one after the other: phases that count to the same total share one. options: tqdm's."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._bar: tqdm | None = None

    def update(self, phase: str, done: int, total: int) -> None:
        if self._bar is None or self._bar.total != total:
            self.close()
            self._bar = tqdm(total=total, file=sys.stderr, disable=None, **self._options)  # None: no terminal
        self._bar.set_description(phase, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
