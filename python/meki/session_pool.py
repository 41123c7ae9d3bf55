"""Which session a generation gets: one that has computed most of its tokens, so that few others are lost."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from . import _core
from .prefix_cache import WORTH, Kept, PrefixCache, pack, packed_length, packed_prefix
from .session import Session


@dataclass(frozen=True, eq=False)
class _Begun:
    """A session, and what of its sequence the one that is to come begins with."""

    session: Session
    sequence: bytes
    """Packed: what is computed."""
    shared: int
    """Tokens of it that stay."""


class SessionPool:
    """Sessions of one kind between their generations. Thread-safe.

    What a session gives up of its sequence goes to the cache, and comes back from there when it is wanted again.
    """

    def __init__(self, cache: PrefixCache, most: int) -> None:
        """most: sessions that there are, unless more are out at once."""
        self._cache = cache
        self._most = most
        self._lock = threading.Lock()
        self._idle: list[Session] = []  # the last used at the end
        self._count = 0  # with those that are out

    def take(
        self, token_ids: Sequence[int], make_session: Callable[[], Session], running: Collection[Session] = ()
    ) -> Session | None:
        """A session whose sequence is to become `token_ids`, and begins so as far as anything that is computed does.
        running: sessions that are out, of this thread, to copy beginnings from. None: one of them is about to compute
        more of what `token_ids` begins with; ask again then. Raises what `make_session` raises."""
        wanted = pack(token_ids[:-1])  # the last is computed in any case
        with self._lock:
            idle = [_begun(session, wanted) for session in self._idle]
            begun = [*idle, *(_begun(session, wanted) for session in running)]
            kept_tokens, kept = self._cache.longest(wanted)
            best = max([kept_tokens, *(its.shared for its in begun)])
            if any(packed_prefix(pack(session.tokens), wanted) >= best + WORTH for session in running):
                return None
            chosen = self._choose(idle, best)
            session = make_session() if chosen is None else chosen.session
            if chosen is None:
                self._count += 1
            else:
                self._idle.remove(session)
            try:
                snapshot = None
                if best >= WORTH + (chosen.shared if chosen else 0):
                    # The cache is the engine's: what it keeps may be longer than sessions of this pool can be.
                    if kept is not None and kept_tokens == best and kept.length <= session.context:
                        snapshot = self._cache.take(kept, best)
                    elif source := next((its.session for its in begun if its.shared == best), None):
                        snapshot = self._copy(source, best, common=True)
                if chosen is not None:
                    self._save(chosen)
                if snapshot is not None:
                    session.become(snapshot)
            except BaseException:
                self._idle.append(session)
                raise
        return session

    def give(self, session: Session) -> None:
        """Takes back what `take` gave, when its generation is over."""
        with self._lock:
            self._idle.append(session)
            if self._count > self._most:
                self._drop()

    def close(self) -> None:
        """Lets the sessions go; what they have computed is in the cache. Those that are out are not to come back."""
        with self._lock:
            while self._idle:
                self._drop()

    def _choose(self, idle: list[_Begun], best: int) -> _Begun | None:
        """The idle session that goes on where it stands, as far as anybody could; None: a new one, while there may be
        more; or else the one that loses nothing or was used least recently."""
        harmless = [its for its in idle if self._lost(its) < WORTH]
        nearest = max(harmless, key=lambda its: its.shared, default=None)
        if nearest is not None and nearest.shared > best - WORTH:
            return nearest
        if not idle or self._count < self._most:
            return None
        return nearest or idle[0]

    def _lost(self, its: _Begun) -> int:
        """Tokens that nobody has any more once the session goes back to what is shared. Those of an answer do not
        count: a conversation that goes on has them as its template writes them."""
        kept_tokens, _ = self._cache.longest(its.sequence)
        return min(its.session.prompt_length, packed_length(its.sequence)) - max(its.shared, kept_tokens)

    def _save(self, its: _Begun) -> None:
        if self._lost(its) < WORTH:
            return
        whole = packed_length(its.sequence)
        # A snapshot of a window is of use at its end alone: better that of a prompt, which comes again as it is.
        lengths = [min(its.session.prompt_length, whole), whole] if self._cache.window else [whole]
        for length in lengths:
            if self._cache.make_room(its.session.snapshot_bytes(length)) and self._copy(its.session, length):
                return

    def _copy(self, session: Session, length: int, *, common: bool = False) -> _core.Snapshot | None:
        """The first `length` tokens, which the cache keeps, too; None: without memory for them, or where their state is
        overwritten already."""
        sequence = pack(session.tokens[:length])
        self._cache.make_room(session.snapshot_bytes(length) + len(sequence))
        with contextlib.suppress(MemoryError):
            snapshot = session.snapshot(length)
            if snapshot.tokens:
                self._cache.put(Kept(sequence, snapshot, common))
                return snapshot
        return None

    def _drop(self) -> None:
        self._save(_begun(self._idle.pop(0), b""))
        self._count -= 1


def _begun(session: Session, wanted: bytes) -> _Begun:
    sequence = pack(session.computed_tokens)
    return _Begun(session, sequence, packed_prefix(sequence, wanted))
