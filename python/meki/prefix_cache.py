"""States of sequences in memory, for the next one that begins alike."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from . import _core

WORTH = 32
"""Tokens: fewer are computed again rather than copied and kept."""
_TOKEN_BYTES = 8


def pack(token_ids: Sequence[int]) -> bytes:
    """Token ids as int64: what `packed_prefix` compares."""
    return array("q", token_ids).tobytes()


def packed_length(sequence: bytes) -> int:
    """In tokens."""
    return len(sequence) // _TOKEN_BYTES


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return packed_prefix(pack(first), pack(second))


def packed_prefix(first: bytes, second: bytes) -> int:
    """The same of packed sequences."""
    alike, most = 0, min(packed_length(first), packed_length(second))
    while alike < most:  # memory is compared, no tokens: some microseconds for thousands
        middle = (alike + most + 1) // 2
        begin, end = alike * _TOKEN_BYTES, middle * _TOKEN_BYTES
        if first[begin:end] == second[begin:end]:
            alike = middle
        else:
            most = middle - 1
    return alike


@dataclass(frozen=True, eq=False)
class Kept:
    """A sequence and its state. Immutable."""

    sequence: bytes
    """Packed; all of it is computed."""
    snapshot: _core.Snapshot
    common: bool
    """Several sequences have begun so; otherwise it is the one that a session had."""

    @property
    def length(self) -> int:
        """In tokens."""
        return packed_length(self.sequence)

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.sequence) + self.snapshot.state.nbytes


class PrefixCache:
    """Snapshots of sessions, those that were used last, in a budget of memory. Thread-safe."""

    def __init__(self, most_bytes: int, window: int = 0) -> None:
        """most_bytes: of all snapshots together."""
        self._most_bytes = most_bytes
        self.window = window
        """Positions that the layer sees which sees fewest; 0: all layers see all."""
        self._lock = threading.Lock()
        self._kept: list[Kept] = []  # the last used at the end
        self._size = 0

    @property
    def size(self) -> int:
        """Of all that is kept, in bytes."""
        return self._size

    def longest(self, wanted: bytes) -> tuple[int, Kept | None]:
        """How many tokens a packed sequence begins with that are kept, and where; of equals the shortest."""
        with self._lock:
            kept = list(self._kept)
        reused = {its: self._reused(its, packed_prefix(its.sequence, wanted)) for its in kept}
        best = max(kept, key=lambda its: (reused[its], -its.length), default=None)
        return (0, None) if best is None or not reused[best] else (reused[best], best)

    def make_room(self, size: int) -> bool:
        """Lets go what was used least recently, before `size` bytes are taken. False: they are beyond the budget, and
        nothing goes."""
        if size > self._most_bytes:
            return False
        with self._lock:
            self._free(size)
        return True

    def put(self, kept: Kept) -> None:
        """It is the last used, and takes the place of one of the same sequence; nothing, if it is beyond the budget."""
        if kept.size > self._most_bytes:
            return
        with self._lock:
            for its in [its for its in self._kept if its.sequence == kept.sequence]:
                self._remove(its)
            self._free(kept.size)
            self._add(kept)

    def take(self, kept: Kept, tokens: int) -> _core.Snapshot:
        """For a session that goes on after its first `tokens` tokens: what was one session's sequence, and is again, as
        a whole, is not kept any longer."""
        with self._lock:
            if kept in self._kept:
                self._remove(kept)
                if kept.common or tokens < kept.length:
                    self._add(kept)
        return kept.snapshot

    def _reused(self, kept: Kept, shared: int) -> int:
        """How many of the first `shared` tokens are computed in a session that takes it and goes back to there. Of a
        window, a snapshot has what its last token sees."""
        within = not self.window or kept.length <= self.window or shared >= kept.length - 1
        return shared if within else 0

    def _free(self, size: int) -> None:
        while self._size + size > self._most_bytes:
            self._remove(self._kept[0])

    def _add(self, kept: Kept) -> None:
        self._kept.append(kept)
        self._size += kept.size

    def _remove(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self._size -= kept.size
