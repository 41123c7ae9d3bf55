"""meki-run --prompt-cache: the states of prompts in a directory, for later runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..prefix_cache import common_prefix, pack
from ..session import Session
from ..session_file import Origin, open_session, write_session

SUFFIX = ".session"
MOST_FILES = 32
MOST_BYTES = 4 << 30
LEAST_TOKENS = 64
"""Fewer are computed again rather than read or written."""
_STALE_S = 3600.0
"""After which a file that is still being written has been given up by a process that was killed."""


class PromptCache:
    """A directory of session files, one for a prompt, of any models: those that were used last. Processes may share it:
    a file comes and goes as a whole."""

    def __init__(self, directory: Path, warn: Callable[[str], None]) -> None:
        """Makes the directory. warn: told of every file that cannot be used or written; the prompt is then computed.
        OSError if there is none and none can be made."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{directory}: cannot be made: {error.strerror}; choose another directory") from error
        self._directory = directory
        self._warn = warn

    def load(self, session: Session, token_ids: Sequence[int]) -> None:
        """Brings the longest beginning of `token_ids` that there is into a new session."""
        found = []
        for path in self._directory.glob(f"{_tag(session.origin)}-*{SUFFIX}"):
            with self._warnings(), open_session(path, session.origin) as file:
                shared = common_prefix(file.tokens[: file.computed], token_ids[:-1])
                if shared >= LEAST_TOKENS and len(file.tokens) <= session.context:
                    found.append((shared, -len(file.tokens), path))
        for _, _, path in sorted(found, reverse=True):
            with self._warnings():
                session.load(path)
                with contextlib.suppress(OSError):  # of a directory that is only read
                    os.utime(path)  # it was used
                return

    def save(self, session: Session, length: int, cached: int) -> None:
        """Writes the first `length` tokens of a session, of which it has found `cached` ones computed, if the rest is
        worth it, and removes what was not used for longest."""
        tokens = session.computed_tokens[:length]
        if len(tokens) < length or length - cached < LEAST_TOKENS:
            return
        path = self._directory / f"{_tag(session.origin)}-{hashlib.sha256(pack(tokens)).hexdigest()[:32]}{SUFFIX}"
        with self._warnings():
            snapshot = session.snapshot(length)
            if snapshot.tokens:
                write_session(path, session.origin, tokens, snapshot)
            self._trim()

    def _trim(self) -> None:
        files = []
        for path in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                status = path.stat()
                if path.suffix == SUFFIX:
                    files.append((status.st_mtime_ns, status.st_size, path))
                elif path.name.endswith(".partial") and time.time() - status.st_mtime > _STALE_S:
                    path.unlink()
        files.sort(reverse=True)
        total = 0
        for index, (_, size, path) in enumerate(files):
            total += size
            if index >= MOST_FILES or total > MOST_BYTES:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _warnings(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            pass  # another process has removed it
        except (OSError, MemoryError) as error:
            self._warn(f"prompt cache: {str(error) or 'out of memory'}")


def _tag(origin: Origin) -> str:
    """What the names of such sessions' files begin with."""
    kind = f"{origin.model.hex()} {origin.provider} {origin.kv_type} {origin.memory}"
    return hashlib.sha256(kind.encode()).hexdigest()[:16]
