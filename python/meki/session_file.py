"""A session in a file: its tokens, and the state of those that are computed (docs/session-format.md)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import stat
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import _core
from .package import compiled_targets
from .package.files import replace_file

_MAGIC = b"MEKISES\n"
_VERSION = 1
_BYTE_ORDER = 0x01020304
_HEADER = struct.Struct("<8sIIQQQQ32s16s16sII132xI")
"""The last field is the checksum of all before it."""
_TOKEN_BYTES = 4
_CHECKSUM_BYTES = 4
_BLOCK = 1 << 20
"""Bytes of the state that have a checksum of their own."""


class SessionFileError(OSError):
    """A session file that cannot be used: damaged, cut off, or of a session that this one cannot go on with."""


@dataclass(frozen=True)
class Origin:
    """What a state depends on besides its tokens."""

    model: bytes
    """`model_digest` of the package."""
    provider: str
    kv_type: str
    memory: bool
    """False: of the backbone without its memory."""
    vocab_size: int
    """No token is as large."""
    context: int
    """Tokens of a sequence at most."""


class _Header(NamedTuple):
    """The fields of `_HEADER`."""

    magic: bytes
    version: int
    byte_order: int
    tokens: int
    computed: int
    state_bytes: int
    file_bytes: int
    model: bytes
    provider: bytes
    kv_type: bytes
    memory: int
    tokens_checksum: int
    checksum: int


def model_digest(manifest: dict[str, Any], chip: str | None) -> bytes:
    """32 bytes that tell one model from another: a SHA-256 sum of the checksums, as the manifest has them, of its
    graphs, weights and ROM, and of what is compiled for `chip`. The tokenizer, the chat template and the README do not
    count, as no state depends on them."""
    tokenizer = manifest["tokenizer"]
    left_out = {"README.md", *(entry["file"] for entry in (tokenizer, tokenizer["chat_template"]) if entry)}
    files = {name: entry["sha256"] for name, entry in manifest["files"].items() if name not in left_out}
    if chip is not None:
        target = compiled_targets(manifest)[chip]["files"]
        files |= {f"{chip}/{name}": entry["sha256"] for name, entry in target.items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).digest()


def write_session(path: Path, origin: Origin, tokens: Sequence[int], snapshot: _core.Snapshot) -> None:
    """Writes a session whose first tokens are the snapshot's. At `path` stands what stood there before, or all of the
    new file. OSError that says why it cannot be written."""
    state = snapshot.state
    ids = array("i", tokens).tobytes()
    blocks = -(-state.nbytes // _BLOCK)
    fields = _Header(
        magic=_MAGIC,
        version=_VERSION,
        byte_order=_BYTE_ORDER,
        tokens=len(tokens),
        computed=len(snapshot.tokens) // _TOKEN_BYTES,
        state_bytes=state.nbytes,
        file_bytes=_HEADER.size + len(ids) + state.nbytes + _CHECKSUM_BYTES * blocks,
        model=origin.model,
        provider=origin.provider.encode(),
        kv_type=origin.kv_type.encode(),
        memory=origin.memory,
        tokens_checksum=_core.crc32c(ids),
        checksum=0,
    )
    header = _HEADER.pack(*fields)[:-_CHECKSUM_BYTES]
    checksums = bytearray()
    try:
        with replace_file(path) as partial, partial.open("wb") as file:
            file.write(header + struct.pack("<I", _core.crc32c(header)) + ids)
            for begin in range(0, state.nbytes, _BLOCK):
                block = state[begin : begin + _BLOCK]
                checksums += struct.pack("<I", _core.crc32c(block))
                file.write(block)
            file.write(checksums)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path}: cannot be written: {reason}; make room for it or choose another path") from error


@contextlib.contextmanager
def open_session(path: Path, origin: Origin) -> Iterator[SessionFile]:
    """A session file for reading, whose head is checked. SessionFileError for one that is not whole, or of a session of
    another origin; OSError if it cannot be read."""
    # A pipe in the place of the file is refused, not waited for.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        yield _read_head(path, origin, file)


class SessionFile:
    """An open session file."""

    def __init__(self, path: Path, file: io.BufferedReader, tokens: list[int], computed: int, state_bytes: int) -> None:
        self.path = path
        self.tokens = tokens
        """The whole sequence."""
        self.computed = computed
        """Tokens at its beginning whose state is there."""
        self.state_bytes = state_bytes
        """Of that state."""
        self._file = file

    def read(self, state_bytes: int) -> memoryview:
        """The state, once. state_bytes: expected. SessionFileError if it is damaged, MemoryError without memory for
        it."""
        if self.state_bytes != state_bytes:
            raise damaged(self.path, f"its state has {self.state_bytes:,} bytes, expected {state_bytes:,}")
        state = memoryview(bytearray(self.state_bytes))
        blocks = [state[begin : begin + _BLOCK] for begin in range(0, self.state_bytes, _BLOCK)]
        checksums = []
        for block in blocks:
            self._file.readinto(block)
            checksums.append(_core.crc32c(block))
        expected = self._file.read()
        if expected != struct.pack(f"<{len(checksums)}I", *checksums):
            raise damaged(self.path, "a checksum of its state is wrong")
        return state


def damaged(path: Path, what: str) -> SessionFileError:
    """The error for such a file."""
    return SessionFileError(f"{path}: damaged: {what}; save the session again")


def _read_head(path: Path, origin: Origin, file: io.BufferedReader) -> SessionFile:
    status = os.fstat(file.fileno())
    header = file.read(_HEADER.size) if stat.S_ISREG(status.st_mode) else b""
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise SessionFileError(f"{path}: not a session file; give one that Session.save has written")
    fields = _Header(*_HEADER.unpack(header))
    if fields.version != _VERSION:
        raise SessionFileError(
            f"{path}: has version {fields.version}, expected {_VERSION}; another version of meki has written it: "
            "save the session again with this one"
        )
    checksum = _core.crc32c(header[:-_CHECKSUM_BYTES])
    if fields.byte_order != _BYTE_ORDER or fields.checksum != checksum:
        raise damaged(path, f"the header's checksum is {fields.checksum:#010x}, expected {checksum:#010x}")
    for name, got, expected in (
        ("model", fields.model.hex()[:16], origin.model.hex()[:16]),
        ("provider", _text(fields.provider), origin.provider),
        ("kv_type", _text(fields.kv_type), origin.kv_type),
        ("memory", "on" if fields.memory else "off", "on" if origin.memory else "off"),
    ):
        if got != expected:
            raise SessionFileError(
                f"{path}: the {name} of its session is {got}, expected {expected}; "
                "open the engine that the session was made with, or save another one"
            )
    size = _HEADER.size + _TOKEN_BYTES * fields.tokens + fields.state_bytes
    size += _CHECKSUM_BYTES * -(-fields.state_bytes // _BLOCK)
    if not status.st_size == fields.file_bytes == size:
        raise damaged(path, f"it has {status.st_size:,} bytes, expected {fields.file_bytes:,}")
    if not fields.computed <= fields.tokens <= origin.context:
        raise damaged(path, f"{fields.computed:,} of {fields.tokens:,} tokens are computed")
    ids = file.read(_TOKEN_BYTES * fields.tokens)
    checksum = _core.crc32c(ids)
    if fields.tokens_checksum != checksum:
        raise damaged(path, f"the tokens' checksum is {fields.tokens_checksum:#010x}, expected {checksum:#010x}")
    tokens = array("i", ids).tolist()
    if tokens and not 0 <= min(tokens) <= max(tokens) < origin.vocab_size:
        raise damaged(path, f"a token is outside the vocabulary of {origin.vocab_size:,}")
    return SessionFile(path, file, tokens, fields.computed, fields.state_bytes)


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", "backslashreplace")
